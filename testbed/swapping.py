"""A running datapath that is replaced again and again under traffic, and the artifacts to replace it with."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rdmanet.datapath import artifact as artifacts
from rdmanet.datapath.artifact import Artifact, Program
from testbed import headers
from testbed.host import diff
from testbed.outside import GATEWAY_IPV4, GATEWAY_IPV6
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import need
from testbed.services import FAMILIES, KINDS, TARGET_PORT, Scene

OUTSIDE = {4: GATEWAY_IPV4, 6: GATEWAY_IPV6}
#: Of the source: maps that every packet meets get another size, the table of flows another kind of memory.
CHANGES: Mapping[str, tuple[str, str]] = {
    "flow.h": ("flows, 131072, 0)", "flows, 131072, BPF_F_NO_PREALLOC)"),
    "fragment.h": ("fragments, 16384,", "fragments, 8192,"),
    "drop.h": ("drops, 81920,", "drops, 90000,"),
}
#: Between a load's questions, and between a stream's rounds.
PAUSE_S = 0.02
#: Flows of all these are remembered for minutes, and each that is masqueraded has a port of its own: many, and none of
#: net.ipv4.ip_local_port_range, from which the host's own connections take theirs.
SIZES: dict[str, dict[str, Any]] = {
    "tracking": {"max_flows": 262144, "max_flows_per_pod": 0},
    "masquerade": {"first_port": 1024, "last_port": 32767},
}
SWAP_TIMEOUT_S = 120.0
#: An end without a result, which no verifier lets through.
REFUSED = bytes((0x95, 0, 0, 0, 0, 0, 0, 0))


def changed(scratch: Path) -> Artifact:
    """The datapath compiled from changed source, below a directory."""
    source = scratch / "bpf"
    shutil.copytree(REPOSITORY / "bpf", source)
    for name, (before, after) in CHANGES.items():
        text = (source / name).read_text(encoding="utf-8")
        need(text.count(before) == 1, f"{name} has no {before!r} to change")
        (source / name).write_text(text.replace(before, after), encoding="utf-8")
    built = scratch / "built"
    argv = [sys.executable, "-m", "rdmanet.datapath.compiler", "--output", str(built), "--source", str(source)]
    environment = {**os.environ, "BCC_KERNEL_SOURCE": str(headers.prepare())}
    subprocess.run(argv, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    return Artifact.load(built)


def refused(artifact: Artifact) -> Artifact:
    """One whose program for uplinks is none."""
    programs = {**artifact.programs, "uplink": Program("uplink", REFUSED, ())}
    return replace(artifact, hash=f"bad{artifact.hash[3:]}", programs=programs)


def offer(artifact: Artifact, directory: Path) -> None:
    """What the agent finds in its artifact_dir from now on."""
    artifacts.save(artifact, directory / artifacts.NEWEST)


@dataclass
class Traffic:
    """Streams and question-and-answer loads, from a pod to another pod and, masqueraded, to outside."""

    scene: Scene
    streams: list[Peer] = field(default_factory=list)
    loads: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def start(cls, scene: Scene, sender: str, receiver: str) -> Iterator[Traffic]:
        """Everything runs; ``end`` tells what came of it."""
        traffic = cls(scene)
        outside = scene.host.outside
        assert outside is not None
        scene.ask("outside", "serve", name="outside", port=TARGET_PORT)
        with contextlib.ExitStack() as stack:
            for place, container in ((receiver, scene.pods[receiver].running), ("outside", outside)):
                server = stack.enter_context(Peer.traffic(f"{scene.host.name}-{place}-sink", container.popen))
                for version in FAMILIES:
                    address = OUTSIDE[version] if place == "outside" else scene.addresses[receiver][version]
                    traffic._stream(stack, sender, f"{place}-ipv{version}", server, address)
                    for kind in KINDS:
                        for fresh in (False, True):
                            name = f"{sender} to {place}, IPv{version} {kind}{', fresh' if fresh else ''}"
                            load: dict[str, Any] = {"kind": kind, "address": address, "fresh": fresh}
                            scene.ask(sender, "load", id=name, port=TARGET_PORT, pause_s=PAUSE_S, **load)
                            traffic.loads.append((sender, name))
            traffic.reach(1)
            yield traffic

    def _stream(self, stack: contextlib.ExitStack, sender: str, way: str, server: Peer, address: str) -> None:
        port = server.ask("serve", address=address)["port"]
        popen = self.scene.pods[sender].running.popen
        peer = stack.enter_context(Peer.traffic(f"{self.scene.host.name}-{sender}-{way}", popen))
        peer.ask("stream_begin", address=address, port=port, pause_s=PAUSE_S)
        self.streams.append(peer)

    def reach(self, more: int) -> None:
        """Returns when each stream has done so many rounds more, and each load has been answered so often more."""
        for peer in self.streams:
            rounds = peer.ask("stream_reach", rounds=0, within_s=1.0)["rounds"]
            peer.ask("stream_reach", rounds=rounds + more, within_s=60.0)
        for place, name in self.loads:
            asked = self.scene.ask(place, "loaded", id=name, asked=0)["asked"]
            self._whole(name, self.scene.ask(place, "loaded", id=name, asked=asked + more))

    def end(self) -> dict[str, int]:
        """Ends all of it: bytes and rounds of the streams, which are equal at both ends; answers, of which none is
        lost."""
        found = {"bytes": 0, "rounds": 0, "answers": 0}
        for peer in self.streams:
            ended = peer.ask("stream_end")
            need(ended["equal"], f"the stream of {peer.place} differs after {ended['bytes']} bytes")
            found["bytes"] += ended["bytes"]
            found["rounds"] += ended["rounds"]
        for place, name in self.loads:
            told = self.scene.ask(place, "unload", id=name)
            self._whole(name, told)
            found["answers"] += told["asked"]
        return found

    def _whole(self, name: str, told: dict[str, Any]) -> None:
        need(not told["failures"], f"{name}: of {told['asked']} answers are lost {told['failures']}")


def running(scene: Scene) -> str:
    """The artifact of which the pod program is, by the beginning of its hash."""
    return str(scene.host.api("GET", "/v1/status")["agent"]["programs"]["pod"]).partition("_")[2]


def swap(scene: Scene, *, by_command: bool = False) -> str:
    """To what is offered, which must be another one; what runs then."""
    before = running(scene)
    if by_command:
        scene.command("datapath", "swap")
    else:
        scene.host.api("POST", "/v1/swap", timeout_s=SWAP_TIMEOUT_S)
    after = running(scene)
    need(after != before, f"{before} still runs after a swap")
    return after


def put_back(scene: Scene, expected: str) -> None:
    """`rdmanet datapath swap --previous`."""
    said = scene.command("datapath", "swap", "--previous")
    need(f"pod: pod_{expected}" in said and running(scene) == expected, f"instead of {expected} runs {said}")


def be_refused(scene: Scene) -> str:
    """A swap to what the verifier does not let through: what is said, with the place of the log; what ran goes on."""
    before = running(scene)
    argv = [sys.executable, "-m", "rdmanet", "datapath", "swap", "--config", scene.host._config_file()]
    done = scene.host.exec(argv, cwd=str(REPOSITORY), check=False)
    said = done.stderr.strip()
    need(done.returncode == 1 and "verifier refused program uplink_" in said, f"status {done.returncode}: {said}")
    need(running(scene) == before, f"after a refusal {running(scene)} runs instead of {before}")
    log = said.partition("all that it said is in ")[2].partition(".log")[0] + ".log"
    need("R0 !read_ok" in scene.host.path(log).read_text(), f"the log {log} does not say why")
    return log


def uninstall_under_traffic(scene: Scene) -> int:
    """Everything goes while pods and the host talk; the host's own traffic goes on. How often that was answered.

    While the kernel takes clsact from a link it drops what is sent there (qdisc_graft in net/sched/sch_api.c, which
    deactivates the link's queues): one datagram of each load may have to be sent again, as TCP does by itself.
    """
    names = []
    for version in FAMILIES:
        for kind in KINDS:
            for place in ("host", next(iter(scene.pods))):
                name = f"{place}, IPv{version} {kind}, uninstall"
                ask = {"kind": kind, "address": OUTSIDE[version], "port": TARGET_PORT, "fresh": place != "host"}
                ask["again"] = int(kind == "udp")
                scene.ask(place, "load", id=name, pause_s=PAUSE_S, **ask)
                scene.ask(place, "loaded", id=name, asked=3)
                if place == "host":
                    names.append(name)
    scene.host.stop_agent()
    scene.host.uninstall()
    answers = 0
    for name in names:
        asked = scene.ask("host", "loaded", id=name, asked=0)["asked"]
        scene.ask("host", "loaded", id=name, asked=asked + 10)
        told = scene.ask("host", "unload", id=name)
        need(not told["failures"], f"{name}: of {told['asked']} answers are lost {told['failures']}")
        answers += told["asked"]
    left = diff(scene.before, scene.host.dump())
    need(not left, f"uninstall left {left}")
    return answers
