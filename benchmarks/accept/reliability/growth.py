"""Row `growth`: 10,000 attachments over time on one agent, and it needs no more than it did at first.

Twenty pods are there at any time; after as many to warm up as allocators need, the oldest goes and a new one comes, in
new network namespaces, again and again. Every so often the agent's memory, descriptors and threads, its database and
what it has in the kernel are looked at: what counts objects is the same each time, to the last one, and medians of
what Python has allocated (``testbed.crashes.traced_agent``) of the first and the last third differ by less than if one
attachment in thirty were remembered. Resident memory goes up by allocators' steps, and may by some of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accept.reliability.load import together
from benchmarks.peers.allocated import TRACED, allocated_bytes
from rdmanet.datapath import bpf
from testbed.host import CniOutcome, diff
from testbed.pod import Pod
from testbed.process import descriptors, rss_bytes
from testbed.progress import Ticker
from testbed.rows import Figure, need
from testbed.world import DATABASE, PINS, World, config, succeeded

#: Map types with entries that come and go (include/uapi/linux/bpf.h): hash, per-CPU hash, LRU hash, per-CPU LRU hash,
#: longest prefix match.
COUNTED_MAPS = {1, 5, 9, 10, 11}
#: Flows are taken out when they are idle, not with their pod; a pod's stack may have had packets dropped, or not yet.
BY_TIME = {"flows", "fragments"}
DROPS_PER_POD = 4
#: Per attachment, between the medians: one that is remembered needs a kilobyte at least.
ALLOCATED_BYTES = 10.0
#: What is under way at one look and not at another: so much from look to look was seen, and so many threads of a pool.
SPARE_BYTES = 100_000
SPARE_FEW = 4
#: Of resident memory and the database: arenas of allocators, and pages that are used more or less well.
STEPS_BYTES = 4 << 20
#: The write-ahead log is begun anew at a checkpoint, by SQLite's default at 1,000 pages (wal_autocheckpoint).
WAL_PAGES = 1100


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it."""

    attachments: int = 10_000
    warm_up: int = 1_000
    live: int = 20
    every: int = 200


@dataclass(frozen=True, slots=True)
class State:
    """What there is with so many live pods when nothing is under way."""

    objects: Mapping[str, int]  # the same each time
    few: Mapping[str, int]  # by medians: threads and descriptors of what is under way come and go
    bytes: Mapping[str, int]
    wal_pages: int
    drops: int  # entries of the map with counters of drops


def measure(sizes: Sizes = Sizes()) -> Figure:
    """Bytes by which what the agent has allocated has grown."""
    with World.start("growth", agent=False) as world:
        world.start_agent(*TRACED)
        pristine = world.snapshot()
        churn = Churn(world, sizes)
        churn.warm_up()
        states, begun = [churn.state()], time.monotonic()
        ticker = Ticker("growth")
        for done in range(1, sizes.attachments + 1):
            churn.turn()
            if done % sizes.every == 0:
                states.append(churn.state())
            ticker.tick(f"{done} of {sizes.attachments}")
        elapsed_s = time.monotonic() - begun
        churn.end()
        left = diff(pristine, world.snapshot())
        need(not left, f"left behind: {left[:3]}")
    grown = judge(states, sizes)
    first, last = states[0], states[-1]
    detail = (
        f"allocated between medians of the first and the last third of {sizes.attachments} attachments, one after the"
        f" other in {elapsed_s:.0f} s with {sizes.live} live ones, after {sizes.warm_up} to warm up; resident memory"
        f" {grown['memory']:+d} bytes ({last.bytes['memory'] >> 20} MiB in the end), database {grown['database']:+d}"
        f" bytes, descriptors {first.few['descriptors']} and {last.few['descriptors']}, threads"
        f" {first.few['threads']} and {last.few['threads']}; numbers of namespaces, links and entries of"
        f" {len([key for key in last.objects if key.startswith('map ')])} maps the same at each of {len(states)} looks"
    )
    more = {
        "grown_bytes": grown,
        "allocated_bytes": [state.bytes["allocated"] for state in states],
        "memory_bytes": [state.bytes["memory"] for state in states],
        "first": {**first.objects, **first.few, **first.bytes},
        "last": {**last.objects, **last.few, **last.bytes},
        "wal_pages": max(state.wal_pages for state in states),
    }
    return Figure(grown["allocated"], "bytes", detail, more)


class Churn:
    """Pods that come and go."""

    def __init__(self, world: World, sizes: Sizes):
        self._world = world
        self._sizes = sizes
        self._live: deque[Pod] = deque()
        self._made = 0

    def warm_up(self) -> None:
        """Many at once, so that every thread has been needed; then the live ones."""
        for _ in range(self._sizes.warm_up // self._sizes.live):
            pods = [self._pod() for _ in range(self._sizes.live)]
            for outcome in together([self._call("ADD", pod) for pod in pods]):
                need(outcome.returncode == 0, f"ADD: {outcome.sentence}")
            for outcome in together([self._call("DEL", pod) for pod in pods]):
                succeeded(outcome)
            for pod in pods:
                pod.destroy()
        while len(self._live) < self._sizes.live:
            self._add()

    def turn(self) -> None:
        """The oldest goes, another one comes."""
        self._delete()
        self._add()

    def end(self) -> None:
        """All of them go."""
        while self._live:
            self._delete()

    def _pod(self) -> Pod:
        self._made += 1
        return Pod.create(self._world.host, f"churn-{self._made}")

    def _call(self, command: str, pod: Pod) -> Callable[[], CniOutcome]:
        return lambda: self._world.host.cni(command, pod, config({}))

    def _add(self) -> None:
        pod = self._pod()
        self._live.append(pod)
        outcome = self._call("ADD", pod)()
        need(outcome.returncode == 0, f"ADD of {pod.name}: {outcome.sentence}")

    def _delete(self) -> None:
        pod = self._live.popleft()
        succeeded(self._call("DEL", pod)())
        pod.destroy()

    def state(self) -> State:
        """Of everything that could grow."""
        host = self._world.host
        host.settle()
        assert host.agent is not None
        pid = host.agent.process.pid
        (((rows,),),) = self._world.sql("SELECT count(*) FROM attachments")
        objects = {
            "namespaces": len(host.exec(["ip", "netns", "list-id"]).stdout.splitlines()),
            "links": len(host.exec(["ip", "-o", "link", "show"]).stdout.splitlines()),
            "rows": rows,
            **_entries(host.path(PINS)),
        }
        drops = objects.pop("map drops")
        files = {path.name: path.stat().st_size for path in host.path(Path(DATABASE).parent).iterdir()}
        database = Path(DATABASE).name
        return State(
            objects,
            {"descriptors": descriptors(pid), "threads": len(list(Path(f"/proc/{pid}/task").iterdir()))},
            {"allocated": allocated_bytes(host), "memory": rss_bytes(pid), "database": files[database]},
            files.get(f"{database}-wal", 0) // 4096,
            drops,
        )


def _entries(pins: Path) -> dict[str, int]:
    """``map NAME`` → how many entries a pinned map has; of those whose entries come and go."""
    found = {}
    for path in sorted(pins.iterdir()):
        if path.name.startswith(("dispatch_", "link_", ".")) or path.is_dir() or path.name in BY_TIME:
            continue
        descriptor = bpf.get(path)
        if descriptor is None:
            continue
        with os.fdopen(descriptor):
            info = bpf.map_info(descriptor)
            if info.type in COUNTED_MAPS:
                found[f"map {path.name}"] = sum(1 for _ in bpf.keys(descriptor, info.key_size, info.max_entries))
    return found


def judge(states: Sequence[State], sizes: Sizes) -> dict[str, int]:
    """By how much each size has grown, in bytes; StepError where that is too much."""
    for number, state in enumerate(states):
        changed = {
            key: (states[0].objects.get(key), value)
            for key, value in state.objects.items()
            if value != states[0].objects.get(key)
        }
        drops = state.drops / sizes.live
        need(drops <= DROPS_PER_POD, f"{state.drops} counters of drops after {number * sizes.every} attachments")
        need(not changed, f"not as at first after {number * sizes.every} attachments (before, after): {changed}")
        need(state.wal_pages < WAL_PAGES, f"the write-ahead log has {state.wal_pages} pages")
    third = max(1, len(states) // 3)

    def grown(value: Callable[[State], int]) -> int:
        early, late = [value(state) for state in states[:third]], [value(state) for state in states[-third:]]
        return int(statistics.median(late) - statistics.median(early))

    for key in states[0].few:
        need(grown(lambda state: state.few[key]) <= SPARE_FEW, f"{key} grew: {[state.few[key] for state in states]}")  # noqa: B023
    found = {key: grown(lambda state: state.bytes[key]) for key in states[0].bytes}  # noqa: B023
    for key, value in found.items():
        most = SPARE_BYTES + ALLOCATED_BYTES * sizes.attachments if key == "allocated" else STEPS_BYTES
        need(value < most, f"{key} grew by {value} bytes: {[state.bytes[key] for state in states]}")
    return found
