"""Row `counters`: every number that people see of RDMA, against traffic whose packets can be counted on paper.

Between two pods with rxe devices, over IPv4 and over IPv6: RDMA WRITEs of known length over a leased queue pair. What
the guard counted for each queue pair, the pod hook for each pod and each device for itself has to be what the
specification says of the packets, to the packet and the byte; messages that find no receive posted have to be seen as
such on both devices.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import namespaces
from benchmarks.peers.namespaces import Pair
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import Figure, need

PROGRAM = ("-m", "benchmarks.peers.known_traffic")
SIZE_BYTES = 64 << 10
TIMES = 10
#: So many times that without anything sent again; a busy machine may need many more.
ROUNDS, MAX_ROUNDS = 4, 60
#: More than a listener posts receives for (rdmanet.verbs.options.Options.messages).
MESSAGES = 40
#: Ethernet, IP by version, UDP, base transport header, RETH of a message's first packet, invariant CRC; an
#: acknowledgement has an AETH instead of data (InfiniBand 9.2 to 9.5, RoCEv2 annex A17.3).
ETHERNET, IP, UDP, BTH, RETH, AETH, ICRC = 14, {4: 20, 6: 40}, 8, 12, 16, 4, 4
TIMEOUT_S = 60.0
#: What rxe counts where something had to be sent again.
AGAIN = ("duplicate_request", "out_of_seq_request", "rcvd_seq_err", "completer_retry_err", "retry_exceeded_err")


@dataclass
class Scene:
    """Two pods with a program each."""

    host: Host
    pair: Pair
    client: Peer
    server: Peer

    def numbers(self) -> dict[str, Any]:
        """GET /v1/rdma."""
        found: dict[str, Any] = self.host.api("GET", "/v1/rdma")
        return found


@contextlib.contextmanager
def scene(name: str) -> Iterator[Scene]:
    """Of its own host and agent."""
    with namespaces.agent_host(name) as host, namespaces.ours(host, name) as pair, contextlib.ExitStack() as stack:
        peers = []
        for end in (pair.client, pair.server):
            peer = Peer.start(f"{end.pod.name}-known", end.pod.popen, [sys.executable, *PROGRAM], cwd=str(REPOSITORY))
            peers.append(stack.enter_context(peer))
            peer.ask("hello", timeout_s=120)
        yield Scene(host, pair, *peers)


def events(document: dict[str, Any], device: str) -> dict[str, int]:
    """What a device counted."""
    (row,) = [row for row in document["devices"] if row["device"] == device]
    return dict(row["events"])


def expected(size: int, mtu_bytes: int, times: int, version: int) -> tuple[dict[str, int], dict[str, int]]:
    """Packets and bytes of so many RDMA WRITEs: what reaches the listener, and the acknowledgements."""
    packets = -(-size // mtu_bytes)
    headers = ETHERNET + IP[version] + UDP + BTH + ICRC
    there = {"packets": times * packets, "bytes": times * (packets * headers + RETH + size)}
    return there, {"packets": times, "bytes": times * (headers + AETH)}


@dataclass
class Round:
    """What was counted while so many RDMA WRITEs were carried out."""

    queue_pairs: dict[str, dict[str, int]]  # by end of the lease, what arrived there
    pods: dict[str, dict[str, dict[str, int]]]  # by client and server, then sent and received
    devices: dict[str, dict[str, int]]  # by client and server, events

    @property
    def again(self) -> dict[str, int]:
        """What had to be sent again, by the devices: a busy machine's timers do that without any loss."""
        return {
            key: count for events in self.devices.values() for key, count in events.items() if key in AGAIN and count
        }

    def differences(self, there: dict[str, int], back: dict[str, int]) -> list[str]:
        """Every number that is not this one; packets alone of devices, which count no bytes on all kernels."""
        found = []
        for what, counted, wanted in (
            ("the listener's queue pair", self.queue_pairs["listener"], there),
            ("the connector's queue pair", self.queue_pairs["connector"], back),
            ("sent by the client's pod", self.pods["client"]["sent"], there),
            ("received by the server's pod", self.pods["server"]["received"], there),
            ("sent by the server's pod", self.pods["server"]["sent"], back),
            ("received by the client's pod", self.pods["client"]["received"], back),
        ):
            if counted != wanted:
                found.append(f"{what}: {counted}, expected {wanted}")
        for what, counted_packets, wanted in (
            ("sent by the client's device", self.devices["client"]["sent_pkts"], there),
            ("received by the server's device", self.devices["server"]["rcvd_pkts"], there),
            ("sent by the server's device", self.devices["server"]["sent_pkts"], back),
            ("received by the client's device", self.devices["client"]["rcvd_pkts"], back),
        ):
            if counted_packets != wanted["packets"]:
                found.append(f"{what}: {counted_packets} packets, expected {wanted['packets']}")
        return found


def carried_out(at: Scene, times: int) -> Round:
    """RDMA WRITEs over the one lease that there is, and what was counted meanwhile."""
    before = settled(at)
    at.client.ask("write", times=times, timeout_s=120)
    after = settled(at)
    ends = {"client": at.pair.client, "server": at.pair.server}

    def more(new: dict[str, int], old: dict[str, int]) -> dict[str, int]:
        return {key: new[key] - old[key] for key in new}

    ((new,), (old,)) = (document["leases"] for document in (after, before))
    pods: dict[str, dict[str, dict[str, int]]] = {}
    for name, end in ends.items():
        is_now, was = (
            next(row for row in document["pods"] if row["pod"] == f"default/{end.pod.name}")
            for document in (after, before)
        )
        pods[name] = {way: more(is_now[way], was[way]) for way in ("sent", "received")}
    return Round(
        {end: more(new[end]["received"], old[end]["received"]) for end in ("listener", "connector")},
        pods,
        {name: more(events(after, end.device), events(before, end.device)) for name, end in ends.items()},
    )


def writes(at: Scene, version: int, rounds: int = ROUNDS) -> dict[str, int]:
    """Compares rounds until so many went without anything being sent again. In those every number must be as on paper,
    in the others both ends must still agree. Returns packets that were compared, and how many rounds of each."""
    at.server.ask("serve", service="known", bytes=SIZE_BYTES)
    made = at.client.ask(
        "connect",
        target=f"{at.pair.server.pod.name}:known",
        address=at.pair.client.addresses[version],
        timeout_s=120,
    )
    (lease,) = at.numbers()["leases"]
    need(lease["connector"]["qpn"] == made["qpn"], "the lease shown is another's")
    there, back = expected(SIZE_BYTES, made["mtu_bytes"], TIMES, version)
    found = {"packets": 0, "rounds": 0, "rounds_with_packets_sent_again": 0}
    while found["rounds"] < rounds:
        one = carried_out(at, TIMES)
        if one.again:
            found["rounds_with_packets_sent_again"] += 1
            wrong = one.differences(one.queue_pairs["listener"], one.queue_pairs["connector"])
            attempts = found["rounds_with_packets_sent_again"]
            need(attempts < MAX_ROUNDS, f"{attempts} rounds with packets sent again, the last {one.again}")
        else:
            found["rounds"] += 1
            found["packets"] += there["packets"] + back["packets"]
            wrong = one.differences(there, back)
        need(not wrong, f"IPv{version}: " + "; ".join(wrong))
    at.client.ask("close")
    at.server.ask("close")
    return found


def settled(at: Scene) -> dict[str, Any]:
    """The numbers, when the last acknowledgements have been counted: twice the same."""
    deadline_s = time.monotonic() + TIMEOUT_S
    last = at.numbers()
    while time.monotonic() < deadline_s:
        now = at.numbers()
        if [now[key] for key in ("devices", "pods")] == [last[key] for key in ("devices", "pods")]:
            return now
        last = now
    return last


def unready_receiver(at: Scene) -> dict[str, int]:
    """Messages that find no receive posted: the receiver's device says so (RNR), the sender's counts it."""
    at.server.ask("serve", service="slow", bytes=4096)
    address = at.pair.client.addresses[4]
    at.client.ask("connect", target=f"{at.pair.server.pod.name}:slow", address=address, timeout_s=120)
    client, server = at.pair.client.device, at.pair.server.device
    before = at.numbers()
    at.client.ask("send", times=MESSAGES)
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        now = at.numbers()
        seen = {
            "rcvd_rnr_err": events(now, client)["rcvd_rnr_err"] - events(before, client)["rcvd_rnr_err"],
            "send_rnr_err": events(now, server)["send_rnr_err"] - events(before, server)["send_rnr_err"],
        }
        if all(seen.values()):
            break
        need(time.monotonic() < deadline_s, f"no RNR within {TIMEOUT_S:g} s: {seen}")
    at.server.ask("receive", times=MESSAGES, timeout_s=120)
    at.client.ask("close", timeout_s=120)
    at.server.ask("close")
    return seen


def shown(at: Scene) -> None:
    """`rdmanet rdma` and the metrics say what the API says."""
    document = settled(at)
    command = [sys.executable, "-m", "rdmanet", "rdma", "--config", at.host._config_file()]
    printed = json.loads(at.host.exec([*command, "-o", "json"], cwd=str(REPOSITORY), timeout_s=120).stdout)
    need(printed["devices"] == document["devices"], "`rdmanet rdma -o json` shows other counters than the API")
    table = at.host.exec(command, cwd=str(REPOSITORY), timeout_s=120).stdout
    text = at.host.api("GET", "/metrics")
    for row in document["devices"]:
        sent = row["events"]["sent_pkts"]
        line = f'{{device="{row["device"]}",event="sent_pkts",pod="{row["pods"][0]}"}} {float(sent)}'
        need(f"rdmanet_device_events_total{line}" in text, f"/metrics does not have {line}")
        need(f"sent_pkts {sent}" in table, f"`rdmanet rdma` does not show sent_pkts {sent}")
    with at.host.popen(
        [*command, "--watch", "-o", "json"], cwd=str(REPOSITORY), stdout=-1, environment={"PYTHONUNBUFFERED": "1"}
    ) as watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(2)]
    need(all(json.loads(line)["devices"] for line in lines), "`rdmanet rdma --watch` did not show devices twice")


def measure() -> Figure:
    """Both families."""
    with scene("cnt") as at:
        families = {f"IPv{version}": writes(at, version) for version in (4, 6)}
        rnr = unready_receiver(at)
        shown(at)
    again = sum(found["rounds_with_packets_sent_again"] for found in families.values())
    return Figure(
        sum(found["packets"] for found in families.values()),
        "packets",
        f"of {2 * ROUNDS * TIMES} RDMA WRITEs of {SIZE_BYTES} bytes, IPv4 and IPv6, counted by queue pair, pod and"
        f" device as on paper, to the byte; {again} rounds more with packets sent again, where both ends agree; RNR"
        " seen by both devices; `rdmanet rdma` and /metrics agree",
        {**families, "rnr": rnr},
    )
