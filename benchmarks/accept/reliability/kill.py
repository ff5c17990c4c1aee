"""Row `kill`: the agent killed at every fault point, then 1,000 times as chance has it, and nothing is ever left.

The points are those that a first run of each kind of work records: ADD, an ADD that fails, DEL, GC, a start that takes
back half an ADD, repairs of a pod, of pins, of programs and of the node. Then random calls of several containers at
once, and in the middle of them a kill: at a fault point or at a moment (the seed is printed), of the agent, of an agent
that starts, of the CNI executable; while a pod's namespace or cgroup goes, something is broken, or another process
holds the database. After each the next agent starts, the same call again (or GC) succeeds, and links, addresses, rxe
devices, map entries, rows, queued DELs and network namespaces are compared with what there was before.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accept.reliability.chaos import Chaos
from rdmanet.model import RdmaMode
from testbed import breaking, kernel
from testbed.crashes.crashing import DYING, Crashes
from testbed.host import CniOutcome
from testbed.pod import Pod
from testbed.progress import Ticker, say
from testbed.rows import Figure, need
from testbed.world import config, succeeded

KILLS = 1_000
#: In the virtual machine a start takes half a minute. What matters there are the points of work on RDMA devices.
KILLS_EMULATED = 20
OF_DEVICES = ("ADD", "DEL", "start", "repair of host-end")
#: From a break to the agent's death at a point of the repair.
DEATH_TIMEOUT_S = 60.0
#: What is repaired by each way to repair, in a pod and on the node.
REPAIRS = ("pod-down", "host-end", "pinned-map", "program", "host-route-4")


def measure(kills: int | None = None) -> Figure:
    """How many things were left behind: none."""
    rdma = not kernel.why_not_here(RdmaMode.SHARED)
    if kills is None:
        kills = KILLS_EMULATED if rdma else KILLS
    seed = secrets.randbits(32)
    say(f"kill: the seed is {seed}")
    conf = config({"rdma": True} if rdma else {})
    with Crashes.begin("kill") as crashes:
        points = Points(crashes, conf)
        points.all(OF_DEVICES if rdma else ())
        chaos = Chaos(crashes, random.Random(seed), conf)
        ticker = Ticker("kill")
        while chaos.agents < kills:
            chaos.round()
            ticker.tick(f"{chaos.agents} of {kills} kills of the agent, seed {seed}")
        chaos.end()
        crashes.nothing_left("at last")
    need(not chaos.left, f"{len(chaos.left)} things left behind, seed {seed}: {chaos.left[:5]}")
    kinds = ", ".join(f"{kind}: {count}" for kind, count in points.killed.items())
    ways = ", ".join(f"{way} {count}" for way, count in sorted(chaos.ways.items()))
    detail = (
        f"left behind after kills at {sum(points.killed.values())} fault points ({kinds}), each once, and"
        f" {chaos.agents} random kills of the agent and {chaos.executables} of the executable in {chaos.rounds} rounds"
        f" of {chaos.calls} calls ({ways}); each time the same call, or GC, succeeded afterwards; seed {seed}"
    )
    more = {
        "points": dict(points.killed),
        "agents": chaos.agents,
        "executables": chaos.executables,
        "rounds": chaos.rounds,
        "calls": chaos.calls,
        "ways": dict(chaos.ways),
        "codes": {f"{command} {code}": count for (command, code), count in sorted(chaos.codes.items())},
        "seed": seed,
    }
    return Figure(len(chaos.left), "leaks", detail, more)


@dataclass(frozen=True, slots=True)
class Work:
    """Something the agent does, at whose points it is killed."""

    prepare: Callable[[], object]
    act: Callable[[], object]
    #: That it can be done again, and undone.
    again: Callable[[], object]


class Points:
    """Every fault point once, by kind of work."""

    def __init__(self, crashes: Crashes, conf: dict[str, Any]):
        self._crashes = crashes
        self._world = crashes.world
        self._conf = conf
        self._pod = self._world.pod("victim")
        self._result: dict[str, Any] | None = None
        self.killed: dict[str, int] = {}

    def all(self, only: Sequence[str] = ()) -> None:
        """Each kind of work, or those that are named."""
        works = {
            "ADD": Work(self._nothing, self._add, self._add_again),
            "a failing ADD": Work(self._occupy, self._add, self._free_again),
            "DEL": Work(self._added, self._delete, self._delete_again),
            "GC": Work(self._added, self._collect, self._collect_again),
            "start": Work(self._half_an_add, self._restart, self._add_again),
        }
        for name in REPAIRS:
            works[f"repair of {name}"] = Work(self._added, self._broken(name), self._whole)
        for name, work in works.items():
            if not only or name in only:
                self._each(name, work)

    def _each(self, name: str, work: Work) -> None:
        work.prepare()
        points = self._crashes.points(work.act)
        need(bool(points), f"{name} has no fault points")
        work.again()
        self._crashes.nothing_left(f"after {name}")
        for fatal, point in enumerate(points, 1):
            work.prepare()
            self._crashes.order(fatal)
            with contextlib.suppress(*DYING):
                work.act()
                self._world.host.settle()
            agent = self._world.host.agent
            if agent is not None:  # a start that died has been reaped
                status = agent.process.wait(DEATH_TIMEOUT_S)
                need(status == -9, f"{name}: the agent ended with {status} at {point}")
                self._world.host.kill_agent()
            self._crashes.forget_order()
            self._crashes.start()
            work.again()
            self._crashes.nothing_left(f"killed before {point} of {name}")
        self.killed[name] = len(points)
        say(f"kill: {name}: {len(points)} points")

    def _call(self, command: str, pod: Pod | None, **more: Any) -> CniOutcome:
        return self._world.host.cni(command, pod, {**self._conf, **more})

    def _nothing(self) -> None: ...

    def _add(self) -> None:
        self._call("ADD", self._pod)

    def _delete(self) -> None:
        self._call("DEL", self._pod)
        self._world.host.settle()

    def _collect(self) -> None:
        self._call("GC", None, **{"cni.dev/valid-attachments": []})
        self._world.host.settle()

    def _restart(self) -> None:
        self._world.host.kill_agent()
        self._crashes.start()

    def _added(self) -> None:
        outcome = self._call("ADD", self._pod)
        need(outcome.returncode == 0, f"ADD: {outcome.sentence}")
        self._result = outcome.output

    def _add_again(self) -> None:
        """Where the first one was not finished; otherwise it exists, and goes first."""
        outcome = self._call("ADD", self._pod)
        if outcome.returncode:
            need(outcome.sentence.startswith("code 100"), f"ADD again: {outcome.sentence}")
            succeeded(self._call("DEL", self._pod))
            outcome = self._call("ADD", self._pod)
        need(outcome.returncode == 0, f"ADD again: {outcome.sentence}")
        succeeded(self._call("CHECK", self._pod, prevResult=outcome.output))
        succeeded(self._call("DEL", self._pod))

    def _delete_again(self) -> None:
        succeeded(self._call("DEL", self._pod))

    def _collect_again(self) -> None:
        succeeded(self._call("GC", None, **{"cni.dev/valid-attachments": []}))

    def _enter(self, *words: str) -> None:
        self._world.host.exec(["nsenter", f"--net={self._pod.netns}", "ip", "link", *words])

    def _occupy(self) -> None:
        self._enter("add", self._pod.ifname, "type", "veth", "peer", "name", "other")

    def _free_again(self) -> None:
        """The pod's own interface is nobody's business, and without it ADD succeeds."""
        self._enter("delete", self._pod.ifname)
        self._add_again()

    def _half_an_add(self) -> None:
        """All but the last commit."""
        self._crashes.order(self.killed["ADD"])
        self._add()
        agent = self._world.host.agent
        assert agent is not None
        need(agent.process.wait(DEATH_TIMEOUT_S) == -9, "the agent survived its ADD")
        self._world.host.kill_agent()
        self._crashes.forget_order()

    def _broken(self, name: str) -> Callable[[], object]:
        """Breaks it, and waits until it is whole."""

        def act() -> None:
            breaking.break_and_wait(breaking.target_of(self._world.host, self._pod), name)

        return act

    def _whole(self) -> None:
        """What was broken is not any more, and the pod goes."""
        breaking.forgive(self._world.host, f"{self._pod.namespace}/{self._pod.name}")
        deadline_s = time.monotonic() + breaking.PATIENCE_S
        while broken := breaking.repairs(self._world.host)["broken"]:  # a device comes back after its link
            need(time.monotonic() < deadline_s, f"not repaired by the next agent: {broken}")
            time.sleep(breaking.LOOK_EVERY_S)
        succeeded(self._call("CHECK", self._pod, prevResult=self._result))
        self._delete_again()
