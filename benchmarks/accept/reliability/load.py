"""Row `load`: 200 ADDs at once and 200 DELs at once, then calls that meet each other, by the real executable.

Every ADD succeeds, no address is given twice, pods reach each other in both families, and after the DELs nothing is
left. Then calls of the same containers at once, as chance has it (the seed is printed): several ADDs of one, ADD and
DEL, a DEL while its ADD is under way, GC during ADDs, and everything together. ADD may answer 100 (it exists) or 11
(what a DEL has left is still there), CHECK 3 (there is none), and nothing else is an error; pods that take no part
pass CHECK, and nothing is left after any round.
"""

from __future__ import annotations

import math
import random
import secrets
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rdmanet.api import CODE_CONFLICT
from rdmanet.cni import CniCode
from testbed.host import CniOutcome, Dump, diff
from testbed.pod import Pod
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.world import Attached, World, config, succeeded

#: What a call may answer beside success.
ALLOWED = {
    "ADD": {CODE_CONFLICT, int(CniCode.TRY_AGAIN)},
    "CHECK": {int(CniCode.UNKNOWN_CONTAINER)},
    "DEL": set[int](),
    "GC": set[int](),
}
#: How much later than the first one the second call of a pair begins, at most: an ADD takes about so long.
LATER_S = 0.06
#: Containers that several calls are about, and those that none is about.
PLAYERS = 4
BYSTANDERS = 2
CALL_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    pods: int = 200
    speaking: int = 4
    rounds: int = 300


def measure(sizes: Sizes = Sizes()) -> Figure:
    """The 99th percentile of ADD, of so many at once."""
    seed = secrets.randbits(32)
    say(f"load: the seed is {seed}")
    with World.start("load") as world:
        pristine = world.snapshot()
        adds, dels = _at_once(world, sizes, pristine)
        meetings = Meetings(world, random.Random(seed))
        for number in range(sizes.rounds):
            meetings.round(f"round {number} of seed {seed}")
        meetings.end()
        left = diff(pristine, world.snapshot())
        need(not left, f"left behind by calls that met each other: {left[:3]}")
        assert world.host.agent is not None
        need("Traceback" not in world.host.agent.log, "the agent's log has a traceback")
    refused = ", ".join(f"{command} {code}: {n}" for (command, code), n in sorted(meetings.refused.items()))
    detail = (
        f"the 99th percentile of {sizes.pods} ADDs at once, half of them within {_percentile(adds, 50):.0f} ms, all in"
        f" {max(adds) / 1000:.1f} s; as many DELs at once within {_percentile(dels, 99):.0f} ms; no address twice, pods"
        f" reached each other in both families; then {meetings.calls} calls in {sizes.rounds} rounds in which they met"
        f" each other, errors as documented ({refused or 'none'}); nothing was left; seed {seed}"
    )
    more = {
        "adds_ms": {"p50": round(_percentile(adds, 50)), "p99": round(_percentile(adds, 99))},
        "dels_ms": {"p50": round(_percentile(dels, 50)), "p99": round(_percentile(dels, 99))},
        "rounds": dict(meetings.kinds),
        "calls": meetings.calls,
        "refused": {f"{command} {code}": n for (command, code), n in meetings.refused.items()},
        "seed": seed,
    }
    return Figure(_percentile(adds, 99), "ms", detail, more)


def _percentile(values: Sequence[float], percent: int) -> float:
    if percent == 50:
        return statistics.median(values)
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def together(calls: Sequence[Callable[[], CniOutcome]]) -> list[CniOutcome]:
    """All of them, from the same moment on."""
    gate = threading.Barrier(len(calls))

    def call(one: Callable[[], CniOutcome]) -> CniOutcome:
        gate.wait()
        return one()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, calls))


def _at_once(world: World, sizes: Sizes, pristine: Dump) -> tuple[list[float], list[float]]:
    """Milliseconds of each ADD and of each DEL."""
    pods = [world.pod() for _ in range(sizes.pods)]
    say(f"load: {len(pods)} ADDs at once")
    added = together([lambda pod=pod: _call(world, "ADD", pod) for pod in pods])  # type: ignore[misc]
    attached = []
    for pod, outcome in zip(pods, added, strict=True):
        need(outcome.returncode == 0 and outcome.output is not None, f"ADD of {pod.name}: {outcome.sentence}")
        attached.append(Attached(pod, outcome.output or {}, config({})))
    addresses = Counter(address for one in attached for address in one.addresses)
    need(len(addresses) == 2 * len(pods), f"addresses given twice: {addresses.most_common(3)}")
    _speak(attached[:: max(1, len(attached) // sizes.speaking)])
    for one in attached:
        succeeded(world.check(one))
    say(f"load: {len(pods)} DELs at once")
    deleted = together([lambda pod=pod: _call(world, "DEL", pod) for pod in pods])  # type: ignore[misc]
    for outcome in deleted:
        succeeded(outcome)
    for pod in pods:
        pod.destroy()
    left = diff(pristine, world.snapshot())
    need(not left, f"left behind by {len(pods)} DELs at once: {left[:3]}")
    return [outcome.elapsed_s * 1000 for outcome in added], [outcome.elapsed_s * 1000 for outcome in deleted]


def _call(world: World, command: str, pod: Pod) -> CniOutcome:
    return world.host.cni(command, pod, config({}), timeout_s=CALL_TIMEOUT_S)


def _speak(some: Sequence[Attached]) -> None:
    """Each of them to the next one."""
    for one in some:
        one.pod.start()
    for one, other in zip(some, [*some[1:], some[0]], strict=True):
        for version in (4, 6):
            done = one.pod.exec(["ping", "-c", "1", "-W", "10", other.address(version)], check=False)
            need(done.returncode == 0, f"{one.pod.name} does not reach {other.address(version)}")
    for one in some:
        one.pod.stop()


class Meetings:
    """Rounds of calls of the same few containers, beside others that must not notice."""

    def __init__(self, world: World, chance: random.Random):
        self._world = world
        self._chance = chance
        self._players = [world.pod() for _ in range(PLAYERS)]
        self._bystanders = [world.add() for _ in range(BYSTANDERS)]
        self._before = world.snapshot()
        self._results: dict[str, list[dict[str, Any]]] = {}  # of the ADDs of this round, by container
        self.calls = 0
        self.kinds: Counter[str] = Counter()
        self.refused: Counter[tuple[str, int]] = Counter()

    def round(self, where: str) -> None:
        """One of them."""
        plans = {
            "ADDs of one": self._adds_of_one,
            "ADD and DEL": self._add_and_delete,
            "DEL during ADD": self._delete_during_add,
            "GC during ADDs": self._collect_during_adds,
            "everything": self._everything,
        }
        kind = self._chance.choice(sorted(plans))
        self.kinds[kind] += 1
        self._results.clear()
        plans[kind](f"{where}, {kind}")
        for outcome in together([self._of("DEL", pod) for pod in self._players]):
            succeeded(outcome)
        for bystander in self._bystanders:
            succeeded(self._world.check(bystander))
        left = diff(self._before, self._world.snapshot())
        need(not left, f"{where}, {kind}: left behind: {left[:3]}")

    def end(self) -> None:
        """Everybody goes."""
        for bystander in self._bystanders:
            self._world.delete(bystander)
        for pod in (*self._players, *(one.pod for one in self._bystanders)):
            pod.destroy()

    def _adds_of_one(self, where: str) -> None:
        pod = self._chance.choice(self._players)
        outcomes = self._all(where, [self._of("ADD", pod) for _ in range(4)])
        winners = [outcome for outcome in outcomes if outcome.returncode == 0]
        need(len(winners) == 1, f"{where}: {len(winners)} of {len(outcomes)} ADDs of one succeeded")

    def _add_and_delete(self, where: str) -> None:
        pod = self._chance.choice(self._players)
        self._all(where, [self._of("ADD", pod), self._of("DEL", pod)])
        self._whole(where, pod)

    def _delete_during_add(self, where: str) -> None:
        pod = self._chance.choice(self._players)
        self._all(where, [self._of("ADD", pod), self._of("DEL", pod, self._chance.uniform(0, LATER_S))])
        self._whole(where, pod)

    def _collect_during_adds(self, where: str) -> None:
        calls = [self._of("ADD", pod, self._chance.uniform(0, LATER_S)) for pod in self._players]
        self._all(where, [*calls, *(self._collect(self._chance.uniform(0, LATER_S)) for _ in range(2))])
        for pod in self._players:
            self._whole(where, pod)

    def _everything(self, where: str) -> None:
        calls = []
        for _ in range(12):
            command = self._chance.choice(["ADD", "ADD", "ADD", "DEL", "DEL", "CHECK", "GC"])
            later_s = self._chance.uniform(0, LATER_S)
            pod = self._chance.choice(self._players)
            calls.append(self._collect(later_s) if command == "GC" else self._of(command, pod, later_s))
        self._all(where, calls)
        for pod in self._players:
            self._whole(where, pod)

    def _of(self, command: str, pod: Pod, later_s: float = 0.0) -> Callable[[], CniOutcome]:
        def call() -> CniOutcome:
            time.sleep(later_s)
            if command == "CHECK":
                return self._check(pod, _bare(pod))
            outcome = _call(self._world, command, pod)
            if command == "ADD" and outcome.returncode == 0 and outcome.output is not None:
                self._results.setdefault(pod.container_id, []).append(outcome.output)
            return outcome

        return call

    def _check(self, pod: Pod, result: Mapping[str, Any]) -> CniOutcome:
        return self._world.host.cni("CHECK", pod, config({"prevResult": result}), timeout_s=CALL_TIMEOUT_S)

    def _collect(self, later_s: float) -> Callable[[], CniOutcome]:
        valid = [{"containerID": one.pod.container_id, "ifname": one.pod.ifname} for one in self._bystanders]

        def call() -> CniOutcome:
            time.sleep(later_s)
            return self._world.host.cni("GC", None, config({"cni.dev/valid-attachments": valid}))

        return call

    def _all(self, where: str, calls: Sequence[Callable[[], CniOutcome]]) -> list[CniOutcome]:
        outcomes = together(calls)
        self.calls += len(outcomes)
        for outcome in outcomes:
            if outcome.returncode:
                assert outcome.output is not None
                code = outcome.output["code"]
                need(code in ALLOWED[outcome.command], f"{where}: {outcome.command}: {outcome.sentence}")
                self.refused[outcome.command, code] += 1
        return outcomes

    def _whole(self, where: str, pod: Pod) -> None:
        """The container has nothing, or all that one of its ADDs has said."""
        known = [row["container_id"] for row in self._world.status()["attachments"]]
        results = self._results.get(pod.container_id, [])
        if pod.container_id in known:
            outcomes = [self._check(pod, result) for result in results]
            whole = any(outcome.returncode == 0 for outcome in outcomes)
            need(whole, f"{where}: half a pod: {[outcome.sentence for outcome in outcomes]}")
        else:
            outcome = self._check(pod, _bare(pod))
            need(outcome.returncode != 0, f"{where}: CHECK does not miss a pod that is not there")


def _bare(pod: Pod) -> dict[str, Any]:
    """What ADD says at least."""
    return {"cniVersion": "1.1.0", "interfaces": [{"name": pod.ifname, "sandbox": pod.netns}], "ips": []}
