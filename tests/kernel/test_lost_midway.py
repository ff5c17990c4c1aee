"""The pod's namespace goes away in the middle of an ADD or DEL, at each point once: the call ends, and nothing is left.

The agent holds the namespace by a descriptor while an ADD is under way: what a runtime removes meanwhile is its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from testbed.cni_spec import validate_error
from testbed.crashes.crashing import ORDER, PROGRAM, RECORD
from testbed.host import diff
from testbed.world import World, config, succeeded
from tests.kernel.test_crash import CUT, STEPS

GATE = "/run/lost-gate"
ADD = ["reserved", *STEPS, "commit ready"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("lost", agent=False) as world:
        world.start_agent("-m", PROGRAM, ORDER, RECORD)
        yield world


def lose(world: World, command: str, point: int) -> int:
    """The call's status, in which the namespace went when the agent came to that point."""
    pod = world.pod()
    if command == "DEL":
        world.add(pod)
    world.host.exec(["mkfifo", GATE])
    world.host.container.act(("write", ORDER, f"{point} hold {GATE}"))
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(world.host.cni, command, pod, config({}))
        with world.host.path(GATE).open("wb"):  # returns when the agent has come to the gate
            pod.destroy()
        outcome = call.result()
    world.host.exec(["rm", "-f", ORDER, RECORD, GATE])
    if outcome.returncode:
        validate_error(outcome.output, "1.1.0", command=command)
    succeeded(world.host.cni("DEL", pod, config({}), netns=""))
    return outcome.returncode


@pytest.mark.parametrize("point", range(1, len(ADD) + 1))
def test_during_add(world: World, point: int) -> None:
    with world.unchanged():
        lose(world, "ADD", point)


@pytest.mark.parametrize("point", range(1, len(CUT) + 1))
def test_during_del(world: World, point: int) -> None:
    with world.unchanged():
        assert lose(world, "DEL", point) == 0


def test_an_agent_that_starts_afterwards_finds_nothing_to_do(world: World) -> None:
    before = world.snapshot()
    world.host.kill_agent()
    world.start_agent("-m", PROGRAM, ORDER, RECORD)
    assert diff(before, world.snapshot()) == []
