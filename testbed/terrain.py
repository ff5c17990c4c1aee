"""A scene (testbed.services) in which single packets count: programs for datagrams, echoes and frames in every place, a
world behind a narrow link, and the table of flows."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdmanet.datapath import bpf
from rdmanet.datapath.flows import TRANSLATED, Flow, entries
from rdmanet.errors import UnavailableError
from rdmanet.model import address_key
from testbed.outside import BEHIND_IPV4, BEHIND_IPV6, FAR_IPV4, FAR_IPV6, GATEWAY_IPV4, GATEWAY_IPV6, UPLINK
from testbed.peer import Peer
from testbed.services import FAMILIES, Scene, start_caller

DATAGRAMS = Path(__file__).with_name("datagrams.py")
PROGRAM = [sys.executable, "-I", "-S", "-E", str(DATAGRAMS)]
PINS = "/sys/fs/bpf/rdmanet"
GATEWAY = {4: "10.213.0.1", 6: "fd72:646d:616e::1"}  # the pods'
ON_LINK = {4: GATEWAY_IPV4, 6: GATEWAY_IPV6}
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
BEHIND = {4: BEHIND_IPV4, 6: BEHIND_IPV6}
#: The least that IPv6 allows (RFC 8200 5).
NARROW_BYTES = 1280


@dataclass
class Terrain:
    """``datagrams`` and ``tcp`` are the programs of datagrams.py and traffic.py by place: pods, ``host``, ``outside``,
    ``behind``."""

    scene: Scene
    datagrams: dict[str, Peer] = field(default_factory=dict)
    tcp: dict[str, Peer] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, name: str, pods: Sequence[str], config: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Iterator[Terrain]:
        """All of it, gone afterwards."""
        with Scene.start(name, pods, config) as scene, contextlib.ExitStack() as stack:
            outside = scene.host.outside
            if outside is None:
                raise UnavailableError("the host has no outside", subject=name)
            places: dict[str, Any] = {"host": scene.host, "outside": outside}
            places["behind"] = outside.extend(mtu_bytes=NARROW_BYTES)
            scene.callers["behind"] = stack.enter_context(start_caller(scene.host, "behind", places["behind"]))
            places |= {pod: scene.pods[pod].running for pod in pods}
            terrain = cls(scene)
            for place, container in places.items():
                program = Peer.start(f"{name}-{place}-datagrams", container.popen, PROGRAM)
                terrain.datagrams[place] = stack.enter_context(program)
                terrain.tcp[place] = stack.enter_context(Peer.traffic(f"{name}-{place}-tcp", container.popen))
            yield terrain

    def ask(self, place: str, do: str, **request: Any) -> dict[str, Any]:
        """One request to a place's program for datagrams."""
        return self.datagrams[place].ask(do, **request)

    def checksums(self, pod: str | None, *, on: bool) -> None:
        """Whether the device of a pod, or those of host and outside, fill in checksums; else stacks do, and who
        receives verifies them."""
        if pod is None:
            self.ask("host", "checksums", ifname=UPLINK, on=on)
            self.ask("outside", "checksums", ifname="eth0", on=on)
            return
        # A pod may not do it itself.
        argv = ["nsenter", f"--net={self.scene.pods[pod].netns}", *PROGRAM]
        with Peer.start(f"{self.scene.host.name}-{pod}-checksums", self.scene.host.popen, argv) as program:
            program.ask("checksums", ifname="eth0", on=on)

    def flows(self) -> list[Flow]:
        """The whole table, as it is now."""
        return flows_of(self.scene)

    def halves(self, pod: str, protocol: int | None = None) -> tuple[list[Flow], list[Flow]]:
        """A pod's translated flows: its own halves, and those that outside sees."""
        own = {address_key(self.scene.addresses[pod][version]) for version in FAMILIES}
        there = [f for f in self.flows() if f.flags & TRANSLATED and protocol in (None, f.protocol)]
        inside = [flow for flow in there if not flow.is_alias and flow.begun_by[0] in own]
        return inside, [flow for flow in there if flow.is_alias and flow.translated in own]


def flows_of(scene: Scene) -> list[Flow]:
    """The table of tracked flows of the scene's host."""
    descriptor = bpf.get(scene.host.path(PINS) / "flows")
    if descriptor is None:
        raise UnavailableError("the table of flows is not pinned", subject=PINS)
    try:
        return list(entries(descriptor))
    finally:
        os.close(descriptor)
