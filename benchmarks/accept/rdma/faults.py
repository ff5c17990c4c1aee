"""Row `faults`: what may go wrong under running leased transfers, and that nobody loses a byte without being told.

Each case begins a stream of RDMA WRITEs, one of messages and one over a pool between two pods of its own, disturbs
them, and counts: bytes that the library said have arrived and the listener has not (lost), what callers were told and
how long that took, retransmissions by the devices' counters, what is left of leases, guard entries and queue pairs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import namespaces
from benchmarks.peers.namespaces import SYSFS, End, Pair
from benchmarks.peers.transfers import POOL_SIZE
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from testbed.host import ARTIFACT, Host
from testbed.netem import lost, netem
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import Figure, StepError, need

PROGRAM = ("-m", "benchmarks.peers.transfers")
PINS = "/sys/fs/bpf/rdmanet"
CNI = {"cniVersion": "1.1.0", "name": "rdma", "type": "rdmanet", "rdma": True, "mtu": 1500}
KINDS = ("write", "send", "pool")
#: One for each stream, but for the pool's.
LEASES = len(KINDS) - 1 + POOL_SIZE
SIZE_BYTES = 16 << 10
MAX_LEASES = 16
#: What each operation of the streams is given; nothing may take longer without the caller being told.
WITHIN_S = 30.0
#: For so many rounds before, during and after.
ROUNDS = 10
ROUNDS_TIMEOUT_S = 240.0
#: A revoked entry stays until the kernel says that its queue pair is gone, asked at most every 60 s.
GONE_TIMEOUT_S = 90.0
#: How much later than its time-out an operation may be seen to end on a busy machine.
GRACE_S = 15.0


@dataclass
class Scene:
    """Two pods with a program each."""

    host: Host
    pair: Pair
    client: Peer
    server: Peer
    before: dict[str, int]
    more: dict[str, object] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[End, End]:
        """Both."""
        return self.pair.client, self.pair.server

    def run_on(self, rounds: int = ROUNDS) -> None:
        """Return when each stream that has not failed is so much further."""
        self.client.ask("reach", rounds=rounds, within_s=ROUNDS_TIMEOUT_S, timeout_s=ROUNDS_TIMEOUT_S + 30)


def counters(end: End) -> dict[str, int]:
    """The device's hw_counters; empty when it is gone."""
    directory = SYSFS / "infiniband" / end.device / "ports/1/hw_counters"
    found = {}
    for file in directory.glob("*"):
        with contextlib.suppress(OSError, ValueError):  # the device may be going; `lifespan` is not a count
            found[file.name] = int(file.read_text())
    return found


def retransmissions(ends: tuple[End, End]) -> dict[str, int]:
    """Of both devices together: what tells of packets that were sent again, and why."""
    names = ("completer_retry_err", "rcvd_seq_err", "duplicate_request", "out_of_seq_request", "retry_exceeded_err")
    return {name: sum(counters(end).get(name, 0) for end in ends) for name in names}


@contextlib.contextmanager
def scene(host: Host, name: str) -> Iterator[Scene]:
    """Fresh pods, so that what one case breaks is not the next one's fault."""
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(namespaces.ours(host, name))
        peers = [
            stack.enter_context(
                Peer.start(f"{end.pod.name}-transfers", end.pod.popen, [sys.executable, *PROGRAM], cwd=str(REPOSITORY))
            )
            for end in (pair.client, pair.server)
        ]
        for peer in peers:
            peer.tell("hello")
        for peer in peers:
            peer.answer()
        peers[1].ask("serve", service="params")
        yield Scene(host, pair, peers[0], peers[1], retransmissions((pair.client, pair.server)))


def begin(at: Scene, size_bytes: int = SIZE_BYTES) -> None:
    """Start the streams, and return when they run."""
    target = f"{at.pair.server.pod.name}:params"
    at.client.ask("begin", target=target, kinds=list(KINDS), size=size_bytes, within_s=WITHIN_S)
    at.run_on()


# What happens, each time to running streams. True: they live on.


def peer_killed(at: Scene) -> bool:
    """The listener's process gets SIGKILL."""
    at.server.process.kill()
    return False


def agent_killed(at: Scene) -> bool:
    """The agent gets SIGKILL, and another one comes."""
    at.host.kill_agent()
    at.run_on()
    at.host.start_agent(CONFIGURATION)
    at.run_on()
    need(len(at.host.api("GET", "/v1/status")["leases"]) == LEASES, "the new agent does not know the leases")
    return True


def pod_deleted(at: Scene) -> bool:
    """CNI DEL of the listener's pod while its process runs: sooner than any runtime does it."""
    pod = at.pair.server.pod
    outcome = at.host.cni("DEL", pod, CNI)
    need(outcome.returncode == 0, f"DEL of {pod.name}: {outcome.sentence}")
    return False


def disturbed(*what: str, drops: bool = False) -> Callable[[Scene], bool]:
    """netem does this to all that both pods send."""

    def disturb(at: Scene) -> bool:
        pods = [end.pod for end in at.ends]
        with netem(pods, *what):
            at.run_on(3 * ROUNDS)
            at.more["dropped"] = lost(pods)
        need(not drops or at.more["dropped"] != 0, "netem dropped nothing")
        return True

    return disturb


def limit_reached(at: Scene) -> bool:
    """The pods' lease limit is used up beside the streams."""
    target = f"{at.pair.server.pod.name}:params"
    refused = at.client.ask("connect", target=target, count=MAX_LEASES + 1)
    need("limit" in refused["sentence"], f"{refused['leased']} leases were granted: {refused['sentence']!r}")
    at.more["refused"] = refused["sentence"]
    at.run_on()
    return True


def device_removed(at: Scene) -> bool:
    """`rdma link delete` of the listener's device, on the host."""
    # It waits for the processes that have the device open: rxe cannot take it away from them.
    at.more["deleting"] = at.host.popen(["rdma", "link", "delete", at.pair.server.device])
    return False


def link_down(at: Scene) -> bool:
    """The listener's interface goes down."""
    pod = at.pair.server.pod
    at.host.exec(["nsenter", f"--net={pod.netns}", "ip", "link", "set", pod.ifname, "down"])
    return False


@dataclass(frozen=True, slots=True)
class Case:
    """A fault. Where the listener's pod or process goes with it, what has arrived there cannot be asked for."""

    work: Callable[[Scene], bool]
    listener_lives: bool = True
    size_bytes: int = SIZE_BYTES


CASES = {
    "peer-killed": Case(peer_killed, listener_lives=False),
    "agent-killed": Case(agent_killed),
    "pod-deleted": Case(pod_deleted),
    "loss-1%": Case(disturbed("loss", "1%", drops=True)),
    # A request is sent 7 times at most (retry_cnt 6): small ones have a chance.
    "loss-30%": Case(disturbed("loss", "30%", drops=True), size_bytes=4096),
    "reorder": Case(disturbed("delay", "1ms", "reorder", "25%", "50%")),
    "duplicate": Case(disturbed("duplicate", "20%")),
    "limit": Case(limit_reached),
    "device-removed": Case(device_removed),
    "link-down": Case(link_down),
}
#: Faults last until their case ends: repairs are another proof's (benchmarks/accept/reliability/reconcile.py).
CONFIGURATION: dict[str, dict[str, Any]] = {
    "rdma": {"max_leases_per_pod": MAX_LEASES},
    "agent": {"repair": False},
}


def measured(host: Host, name: str, case: Case) -> dict[str, Any]:
    """One case; StepError when a byte was lost, somebody was not told in time, or something is left."""
    with scene(host, f"f{list(CASES).index(name)}") as at:
        begin(at, case.size_bytes)
        lives = case.work(at)
        patience_s = WITHIN_S + GRACE_S
        outcomes = at.client.ask("end" if lives else "broken", within_s=patience_s, timeout_s=patience_s + 30)
        received = {}
        if case.listener_lives:
            received = at.server.ask("received", within_s=patience_s, timeout_s=patience_s + 30)
        at.client.close()
        at.server.close()
        deleting = at.more.pop("deleting", None)
        if deleting is not None:
            need(deleting.wait(WITHIN_S) == 0, "`rdma link delete` did not succeed")  # type: ignore[attr-defined]
            deleting.close()  # type: ignore[attr-defined]
        again = {key: count - at.before[key] for key, count in retransmissions(at.ends).items()}
        left = until_nothing_is_left(at)
    result = verdict(name, lives, outcomes, received)
    need(not left, f"{name}: left behind: {left}")
    return {**result, "retransmissions": again, **at.more}


def verdict(name: str, lives: bool, outcomes: dict[str, Any], received: dict[str, Any]) -> dict[str, Any]:
    """What became of every byte. StepError for the wrong end of a stream, or one that came too late."""
    lost_bytes = 0
    told = {}
    for kind in KINDS:
        outcome = outcomes[kind]
        lost_bytes += outcome["unequal_bytes"]
        if received:
            arrived = received[kind]
            need(not arrived["corrupt"] and not arrived["out_of_order"], f"{name}: {kind} arrived otherwise: {arrived}")
            lost_bytes += max(0, outcome["bytes"] - arrived["bytes"])
        told[kind] = outcome["error"]
        need(lives or bool(outcome["error"]), f"{name}: nobody was told about the {kind}s")
        need(
            outcome["waited_s"] <= WITHIN_S + GRACE_S,
            f"{name}: the caller of {kind} waited for {outcome['waited_s']} s",
        )
    need(lost_bytes == 0, f"{name}: {lost_bytes} bytes were lost, and nobody was told")
    return {
        "bytes": {kind: outcomes[kind]["bytes"] for kind in KINDS},
        "rounds": {kind: outcomes[kind]["rounds"] for kind in KINDS},
        "lost_bytes": lost_bytes,
        "told": told,
        "waited_s": {kind: outcomes[kind]["waited_s"] for kind in KINDS},
        "outcome": "exception" if any(told.values()) else "all arrived",
    }


def leftovers(at: Scene) -> list[str]:
    """Leases, guard entries and queue pairs that are there now; the pods' devices have one (QP1) of their own."""
    found = [f"lease {row['lease']}" for row in at.host.api("GET", "/v1/status")["leases"]]
    with Datapath.open(Artifact.load(ARTIFACT), at.host.path(PINS)) as datapath:
        found += [f"guard entry of QPN {qpn}" for _, qpn in datapath.guards()]
        found += [f"datagram entry {ends}" for ends in datapath.datagrams()]
    devices = {end.device for end in at.ends}
    for row in at.host.exec(["rdma", "-j", "resource", "show", "qp"]).json():
        if row["ifname"] in devices and row.get("comm") not in ("ib_core", "[ib_core]"):
            found.append(f"queue pair {row.get('lqpn')} of {row['ifname']}")
    return found


def until_nothing_is_left(at: Scene) -> list[str]:
    """What is still there after a while, asked again and again: nobody says when the kernel is done."""
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while (found := leftovers(at)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


@contextlib.contextmanager
def limited_host() -> Iterator[Host]:
    """A host whose agent grants few leases per pod."""
    with Host.scratch("faults") as host:
        host.start_agent(CONFIGURATION)
        yield host
        host.stop_agent()


def measure() -> Figure:
    """All cases, then the host is looked at once more when the pods are gone."""
    results: dict[str, object] = {}
    failed = []
    with limited_host() as host:
        for name, case in CASES.items():
            try:
                results[name] = measured(host, name, case)
            except StepError as error:
                results[name] = {"failed": error.sentence}
                failed.append(error.sentence)
        host.settle()
        devices = json.loads(host.exec(["rdma", "-j", "dev"]).stdout or "[]")
        if devices:
            failed.append(f"devices are left: {devices}")
        attachments = host.api("GET", "/v1/status")["attachments"]
        if attachments:
            failed.append(f"attachments are left: {attachments}")
    need(not failed, f"{len(failed)} of {len(CASES)} cases failed: " + "; ".join(failed))
    return Figure(
        0,
        "bytes",
        f"lost without a word in {len(CASES)} cases; every transfer went on or its caller was told within "
        f"{WITHIN_S:g} s; no lease, guard entry, queue pair or device was left",
        {"cases": results},
    )
