"""Row `fuzz`: hostile input to everything that reads what others write, for so long each, and nothing gives way.

The CNI executable under the address and undefined-behaviour sanitizers (environment, standard input, the agent's
answer), the agent's parsers of calls, lease messages, configuration and manifests, its own socket and a pod's lease
socket while it runs, and packets to the programs of every hook. Inputs are mutations of valid ones; those that reach
new code are changed further (places in the executable by gcc's trace-pc, lines of the parsers, answers, verdicts). An
input that ends in anything but an answer of the format is saved in build/fuzz. Seeds are printed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from testbed.fuzzing import executable, live, packets, parsers
from testbed.fuzzing.search import Search, search
from testbed.host import diff
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.world import World, succeeded

#: Seconds for each; a quarter of an hour together.
BUDGETS_S = {
    "executable": 240.0,
    "CNI calls": 60.0,
    "lease messages": 45.0,
    "configuration": 45.0,
    "manifests": 90.0,
    "HTTP bodies": 150.0,
    "lease socket": 90.0,
    "packets": 150.0,
}


@dataclass(frozen=True, slots=True)
class Running:
    """What came of the searches with a running agent."""

    done: list[Search]
    grown_bytes: int


def measure(share: float = 1.0) -> Figure:
    """How many inputs there were; ``share`` is of each budget."""
    seed = secrets.randbits(32)
    say(f"fuzz: the seed is {seed}")
    done: list[Search] = []

    def budget_s(name: str) -> float:
        return BUDGETS_S[name] * share

    with executable.target() as target:
        done.append(search(target, budget_s(target.name), seed))
    done += [search(target, budget_s(target.name), seed) for target in parsers.targets()]
    running = _running(seed, share)
    done += running.done
    with packets.target() as target:
        done.append(search(target, budget_s(target.name), seed))
    failures = [failure for one in done for failure in one.failures]
    need(not failures, f"{len(failures)} inputs gave something away, seed {seed}: {failures[:3]}")
    inputs = sum(one.inputs for one in done)
    parts = ", ".join(f"{one.name} {one.inputs} ({one.kept} kept)" for one in done)
    detail = (
        f"none crashed, hung or was answered otherwise than it should: {parts}; the agent grew by"
        f" {running.grown_bytes / 2**20:.1f} MiB and gave a pod its network afterwards; seed {seed}"
    )
    more = {
        "crashes": len(failures),
        "seed": seed,
        "targets": {one.name: {"inputs": one.inputs, "places": one.places, "kept": one.kept} for one in done},
        "grown_bytes": running.grown_bytes,
    }
    return Figure(inputs, "inputs", detail, more)


def _running(seed: int, share: float) -> Running:
    """On the agent's own socket, and on a pod's."""
    with World.start("fuzz") as world:
        before = world.snapshot()
        watched = live.Watched(world.host)
        # What allocators need for a start is not counted.
        search(live.http(watched, world.host), 0.05 * BUDGETS_S["HTTP bodies"] * share, seed + 1)
        watched.warm()
        done = [search(live.http(watched, world.host), BUDGETS_S["HTTP bodies"] * share, seed)]
        # Some were valid calls of GC: pods come afterwards.
        attached = world.add()
        with live.leases(watched, world.host, attached.pod) as target:
            done.append(search(target, BUDGETS_S["lease socket"] * share, seed))
        succeeded(world.check(attached))
        world.delete(attached)
        watched.look()
        grown_bytes, opened = watched.grown()
        need(grown_bytes < live.GROWN_BYTES, f"the agent grew by {grown_bytes} bytes, seed {seed}")
        need(opened <= live.SPARE_DESCRIPTORS, f"the agent has {opened} more descriptors, seed {seed}")
        left = diff(before, world.snapshot())
        need(not left, f"left behind, seed {seed}: {left[:3]}")
    return Running(done, grown_bytes)
