"""Row `modes`: each way in which a pod gets a device, on each kernel that has it, and what happens when it goes.

rxe of each pod's own in shared and in exclusive mode; one rxe device of the host that pods share, on the newest kernel
and on the distribution's own. In each: leases over IPv4 and IPv6; the netdev goes down under a held queue pair, the
pod is unhealthy, the holder is told, and all is well when it is up again; the device is removed, and is noticed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.peers import host_device, namespaces
from benchmarks.peers.namespaces import End
from rdmanet.model import RdmaMode
from rdmanet.netlink.nldev import RdmaSocket
from rdmanet.node import kernel_release
from rdmanet.rdma.rxe import wanted_release
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.peer import Peer, PeerError
from testbed.rows import Figure, need

PROGRAM = ("-m", "benchmarks.peers.known_traffic")
SIZE_BYTES = 64 << 10
TIMES = 4
TIMEOUT_S = 60.0
PAUSE_S = 0.02


@dataclass
class Scene:
    """Two pods with a program each, and how their device's netdev and the device itself go and come."""

    host: Host
    ends: Sequence[End]
    client: Peer
    server: Peer
    netdev: str
    remove: Callable[[], object]
    make: Callable[[], object] | None  # None: what is removed stays away

    def problem(self) -> str | None:
        """Why the client's device cannot be used, by `rdmanet status`; None where it can."""
        rows = self.host.api("GET", "/v1/status")["attachments"]
        (row,) = [row for row in rows if row["pod"] == f"default/{self.ends[0].pod.name}"]
        return None if row["unhealthy"] is None else str(row["unhealthy"])

    def until(self, reached: Callable[[], bool], what: str) -> float:
        """Milliseconds until the agent has seen it by itself."""
        started_s = time.monotonic()
        while not reached():
            need(time.monotonic() - started_s < TIMEOUT_S, f"{what}: not within {TIMEOUT_S:g} s")
            time.sleep(PAUSE_S)
        return (time.monotonic() - started_s) * 1000

    def lease(self, version: int) -> None:
        """RDMA WRITEs over a new lease."""
        self.server.ask("serve", service="known", bytes=SIZE_BYTES, timeout_s=120)
        self.connect(version)
        self.client.ask("write", times=TIMES, timeout_s=120)
        self.client.ask("close", timeout_s=120)
        self.server.ask("close", timeout_s=120)

    def connect(self, version: int = 4) -> None:
        """A held queue pair."""
        target = f"{self.ends[1].pod.name}:known"
        self.client.ask("connect", target=target, address=self.ends[0].addresses[version], timeout_s=120)


@contextlib.contextmanager
def running() -> Iterator[Host]:
    """A host with an agent. In exclusive mode, and before 7.1 with rxe, that is the initial namespace: the throwaway
    machine itself."""
    machine = os.environ.get("RDMANET_IN_VM") == "1"
    with Host.machine("modes") if machine else Host.scratch("modes") as host:
        yield host
        if host.agent is not None:
            host.stop_agent()
        if machine:
            host.uninstall()


@contextlib.contextmanager
def programs(ends: Sequence[End]) -> Iterator[tuple[Peer, Peer]]:
    """One in each pod."""
    with contextlib.ExitStack() as stack:
        peers = []
        for end in ends[:2]:
            peer = Peer.start(f"{end.pod.name}-modes", end.pod.popen, [sys.executable, *PROGRAM], cwd=str(REPOSITORY))
            peers.append(stack.enter_context(peer))
            peer.ask("hello", timeout_s=120)
        yield peers[0], peers[1]


def walk(at: Scene) -> dict[str, object]:
    """Leases, down, up, gone, and back where it can."""
    for version in (4, 6):
        at.lease(version)
    at.server.ask("serve", service="known", bytes=SIZE_BYTES)
    at.connect()
    at.host.ip(f"link set {at.netdev} down")
    down_ms = at.until(lambda: f"{at.netdev} is down" in (at.problem() or ""), "the netdev that is down")
    at.until(lambda: at.netdev in at.client.ask("next", timeout_s=120)["sentence"], "the holder's next call")
    told = at.client.ask("next", timeout_s=120)["sentence"]
    refused = ""
    try:
        at.connect()
    except PeerError as error:
        refused = error.sentence
    need(f"{at.netdev} is down" in refused, f"a lease without a device was not refused for that: {refused!r}")
    metrics = at.host.api("GET", "/metrics")
    unwell = f'rdmanet_device_healthy{{device="{at.ends[0].device}",pod="default/{at.ends[0].pod.name}"}} 0.0'
    need(unwell in metrics, f"/metrics does not have {unwell}")
    at.client.ask("close")
    at.server.ask("close")
    at.host.ip(f"link set {at.netdev} up")
    up_ms = at.until(lambda: at.problem() is None, "the netdev that is up again")
    for version in (4, 6):
        at.lease(version)
    at.remove()
    gone_ms = at.until(lambda: (at.problem() or "").endswith("is missing"), "the device that is gone")
    missing = at.problem()
    found: dict[str, object] = {"leases": "IPv4, IPv6", "told": told, "refused": refused, "missing": missing}
    found |= {"down_seen_ms": down_ms, "up_seen_ms": up_ms, "gone_seen_ms": gone_ms}
    if at.make is not None:
        at.make()
        found["back_seen_ms"] = at.until(lambda: at.problem() is None, "the device that is back")
        at.lease(4)
    return found


def of_its_own(mode: RdmaMode) -> dict[str, object]:
    """rxe of each pod's own."""
    with running() as host:
        host.start_agent({"agent": {"repair": False}})  # what is down or gone stays so, to be seen
        with namespaces.attached(host, ["own-a", "own-b"]) as ends, programs(ends) as (client, server):
            device, netns = ends[0].device, ends[0].pod.netns
            inside = [] if mode is RdmaMode.SHARED else ["nsenter", f"--net={netns}"]
            rows = host.api("GET", "/v1/status")["attachments"]
            (netdev,) = [row["host_ifname"] for row in rows if row["pod"] == f"default/{ends[0].pod.name}"]

            def remove() -> None:
                host.exec([*inside, "rdma", "link", "delete", device])

            return walk(Scene(host, ends, client, server, netdev, remove, None))


def of_the_host() -> dict[str, object]:
    """A device of the host that both pods share."""
    with running() as host, host_device.host_device(host):
        host.start_agent(host_device.CONFIG)
        with namespaces.attached(host, ["shd-a", "shd-b"]) as ends, programs(ends) as (client, server):
            need({end.device for end in ends} == {host_device.DEVICE}, "pods have not the host's device")
            scene = Scene(
                host,
                ends,
                client,
                server,
                host_device.NETDEV,
                lambda: host_device.delete_device(host),
                lambda: host_device.make_device(host),
            )
            return walk(scene)


def impossible() -> str:
    """Why this kernel cannot give pods rxe devices of their own, by the agent."""
    with running() as host:
        host.start_agent()
        return str(host.api("GET", "/v1/status")["agent"]["rdma_missing"])


def measure() -> Figure:
    """What this kernel and this mode have."""
    with RdmaSocket.here() as rdma:
        mode = rdma.mode()
    cases: dict[str, object] = {}
    if kernel_release() >= wanted_release(mode):
        cases["rxe of each pod's own"] = of_its_own(mode)
    else:
        sentence = impossible()
        need("Soft-RoCE works in pods' namespaces from Linux" in sentence, f"the agent says {sentence!r}")
    if mode is RdmaMode.SHARED:
        cases["rxe of the host, shared"] = of_the_host()
    kernel = platform.release()
    return Figure(
        len(cases),
        "ways",
        f"Linux {kernel}, RDMA {mode}: {'; '.join(cases)}: leases over IPv4 and IPv6; a netdev that is down and a"
        " device that is gone are in status, metrics and the holder's next call, and up again all is well",
        {"kernel": kernel, "mode": str(mode), "cases": cases},
    )
