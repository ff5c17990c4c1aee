"""Row `reconcile`: everything of the agent's that can be broken is, one after another; each is shown and whole again.

A pod's links, addresses, routes and filters, the node's, pins, entries of the datapath, and where there is RDMA the
pod's device. After each the pod reaches another one and the world outside, in both families. Then one thing breaks
again and again: it is left alone, and `rdmanet repair` asks for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rdmanet.model import RdmaMode
from testbed import breaking, kernel
from testbed.breaking import BREAKS, RDMA_BREAKS, Target
from testbed.host import Host
from testbed.outside import FAR_IPV4, FAR_IPV6
from testbed.pod import Pod, rdma_nodes
from testbed.rows import Figure, StepError, need

#: What the issue promises.
SHOWN_WITHIN_S = 5.0
MOST_BREAKS = 5
PATIENCE_S = 60.0
NETWORK = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet", "mtu": 9000}
FAR = (FAR_IPV4, FAR_IPV6)


def measure() -> Figure:
    """All of it on one host."""
    rdma = not kernel.why_not_here(RdmaMode.SHARED)
    with Scene.start(rdma=rdma) as scene:
        names = [*BREAKS, *(RDMA_BREAKS if rdma else ())]
        took = {name: scene.broken(name) for name in names}
        times = scene.left_alone()
    kinds = {(BREAKS | RDMA_BREAKS)[name].kind for name in names}
    slowest = max(took, key=lambda name: took[name].repaired_s)
    shown_s = max(one.shown_s for one in took.values())
    need(shown_s <= SHOWN_WITHIN_S, f"something was shown after {shown_s:.1f} s only")
    detail = (
        f"{len(took)} things of {len(kinds)} kinds were broken, shown within {shown_s:.1f} s and repaired within"
        f" {took[slowest].repaired_s:.1f} s ({slowest}); afterwards the pod reached everybody in both families; what"
        f" broke {times} times was left alone, and repaired when that was asked for"
    )
    more = {"seconds": {name: round(one.repaired_s, 2) for name, one in took.items()}, "shown_s": round(shown_s, 2)}
    return Figure(len(took), "broken", detail, more)


@dataclass
class Scene:
    """A host with an agent and a world outside; a pod that is broken, and another one."""

    host: Host
    one: Pod
    two: Pod
    target: Target
    other: Target
    rdma: bool

    @classmethod
    @contextlib.contextmanager
    def start(cls, *, rdma: bool) -> Iterator[Scene]:
        """All of it, gone afterwards."""
        with Host.scratch("reconcile") as host, contextlib.ExitStack() as stack:
            host.connect_outside()
            host.start_agent()
            pods = [stack.enter_context(Pod.create(host, name)) for name in ("one", "two")]
            configuration = {**NETWORK, "rdma": rdma}
            for pod in pods:
                outcome = host.cni("ADD", pod, configuration)
                need(outcome.returncode == 0, f"ADD of {pod.name}: {outcome.sentence}")
                stack.callback(host.cni, "DEL", pod, configuration)
            targets = [breaking.target_of(host, pod) for pod in pods]
            scene = cls(host, pods[0], pods[1], targets[0], targets[1], rdma)
            for pod in pods:
                device = scene.row(pod)["device"]
                nodes = rdma_nodes(device["uverbs"], device["major"], device["minor"]) if device else ()
                pod.start(nodes)
                stack.callback(pod.stop)
            yield scene

    def row(self, pod: Pod) -> dict[str, Any]:
        """The pod's attachment."""
        rows = self.host.api("GET", "/v1/status")["attachments"]
        return next(row for row in rows if row["container_id"] == pod.container_id)

    def broken(self, name: str) -> breaking.Repaired:
        """One thing, until it is whole and the pod reaches everybody."""
        breaking.forgive(self.host, self.target.pod)
        repaired = breaking.break_and_wait(self.target, name)
        self._reaches_all(name)
        # The link takes its device with it, which comes back behind it.
        self._until(lambda: self.row(self.one)["unhealthy"] is None, f"{name}: the pod's device is not well again")
        return repaired

    def _reaches_all(self, name: str) -> None:
        for address in (*self.other.addresses.values(), *breaking.GATEWAYS.values(), *FAR):
            done = self.one.exec(["ping", "-c", "1", "-W", "10", address], check=False)
            need(done.returncode == 0, f"{name} was repaired, and the pod does not reach {address}")

    def left_alone(self) -> int:
        """How often the same thing broke until it was left alone."""
        breaking.forgive(self.host, self.target.pod)
        for _ in range(MOST_BREAKS - 1):
            breaking.break_and_wait(self.target, "pod-down")
        self.target.inside("ip", "link", "set", self.target.ifname, "down")

        def given_up() -> bool:
            found = breaking.repairs(self.host)["given_up"]
            return [one["what"] for one in found] == [self.target.name]

        self._until(given_up, "what breaks again and again is not left alone")
        breaking.forgive(self.host, self.target.pod)
        self._until(lambda: not breaking.repairs(self.host)["broken"], "what was asked for is not repaired")
        self._reaches_all("pod-down")
        return MOST_BREAKS

    def _until(self, done: Callable[[], bool], sentence: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline_s:
                raise StepError(f"{sentence}: {breaking.repairs(self.host)}")
            time.sleep(breaking.LOOK_EVERY_S)
