"""SIGKILL at every fault point of an ADD, of an ADD that fails, of a DEL and of a recovery: nothing is left of it.

The points are those that a first run records; a new step is covered without a change here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from testbed.cni_spec import validate_error
from testbed.container import CommandError
from testbed.crashes.crashing import Crashes, add, delete
from testbed.world import config, refused, succeeded

STEPS = ["link", "filter", "addresses", "device", "slot", "limits", "listener", "endpoint"]
#: Of a DEL: the first five before it answers, the others in the background.
CUT = ["commit releasing", "undo endpoint", "undo listener", "undo limits", "undo slot", "undo device"]
REMOVAL = ["undo link", "forget"]
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def crashes() -> Iterator[Crashes]:
    with Crashes.begin("crash") as crashes:
        yield crashes


def test_add(crashes: Crashes) -> None:
    world, pod = crashes.world, crashes.world.pod()
    points = crashes.points(lambda: add(world, pod))
    assert points == ["reserved", *(f"apply {step}" for step in STEPS), "commit ready"]
    succeeded(delete(world, pod))
    for fatal, point in enumerate(points, 1):
        outcome = crashes.die(fatal, points, lambda: add(world, pod))
        validate_error(outcome.output, "1.1.0", command="ADD")
        crashes.start()
        crashes.nothing_left(f"killed before {point}")
        # The same pod can be added now, and what it gets is whole.
        succeeded(world.check(world.add(pod)))
        succeeded(delete(world, pod))
    crashes.nothing_left("at last")


def test_add_whose_runtime_gives_up(crashes: Crashes) -> None:
    """DEL comes while the agent is away, and is done when it is back."""
    world, pod = crashes.world, crashes.world.pod()
    points = crashes.points(lambda: add(world, pod))
    succeeded(delete(world, pod))
    crashes.die(len(points), points, lambda: add(world, pod))
    succeeded(delete(world, pod))
    pod.destroy()
    crashes.start()
    crashes.nothing_left("after the queued DEL")


def test_an_error_that_nobody_expects_in_the_background_ends_the_agent(crashes: Crashes) -> None:
    """It would look well and remove nothing any more. The next one does what it has left."""
    world, pod = crashes.world, crashes.world.pod()
    world.add(pod)
    points = crashes.points(lambda: delete(world, pod))
    world.add(pod)
    agent = world.host.agent
    assert agent is not None
    crashes.order(points.index(REMOVAL[0]) + 1, "break")
    delete(world, pod)
    assert agent.process.wait(WITHIN_S) == 1
    world.host.kill_agent()
    crashes.forget_order()
    crashes.start()
    world.host.settle()
    crashes.nothing_left("after the next start")


def test_add_that_fails_at_any_point_takes_itself_back(crashes: Crashes) -> None:
    """No kill here: the same agent undoes what it has made, and the row goes last."""
    world, pod = crashes.world, crashes.world.pod()
    points = crashes.points(lambda: add(world, pod))
    succeeded(delete(world, pod))
    for fatal, point in enumerate(points, 1):
        crashes.order(fatal, "raise")
        refused(add(world, pod), 103, "A test wants it so.")
        recorded = crashes.forget_order()
        assert recorded[:fatal] == points[:fatal]
        crashes.nothing_left(f"failed before {point}")
    succeeded(world.check(world.add(pod)))
    succeeded(delete(world, pod))


def test_delete_that_fails_at_any_point_can_be_repeated(crashes: Crashes) -> None:
    world, pod = crashes.world, crashes.world.pod()
    world.add(pod)
    points = crashes.points(lambda: delete(world, pod))
    for fatal, point in enumerate(points, 1):
        world.add(pod)
        crashes.order(fatal, "raise")
        outcome = world.host.cni("DEL", pod, config({}))
        if point in CUT:
            refused(outcome, 103, "A test wants it so.")
        else:
            succeeded(outcome)  # and the background tries again by itself
            crashes.nothing_left(f"failed before {point}")
        crashes.forget_order()
        succeeded(delete(world, pod))
    crashes.nothing_left("at last")


def test_add_that_fails_on_its_own(crashes: Crashes) -> None:
    world, pod = crashes.world, crashes.world.pod()
    enter = ["nsenter", f"--net={pod.netns}", "ip", "link"]
    world.host.exec([*enter, "add", "eth0", "type", "veth", "peer", "name", "other"])
    points = crashes.points(lambda: add(world, pod))
    assert points == ["reserved", "apply link", *CUT, *REMOVAL]
    for fatal, point in enumerate(points, 1):
        crashes.die(fatal, points, lambda: add(world, pod))
        crashes.start()
        crashes.nothing_left(f"killed before {point} of a failing ADD")
        world.host.exec([*enter, "show", "dev", "eth0"])  # the pod's own


def test_delete(crashes: Crashes) -> None:
    world, pod = crashes.world, crashes.world.pod()
    world.add(pod)
    points = crashes.points(lambda: delete(world, pod))
    assert points == [*CUT, *REMOVAL]
    for fatal, point in enumerate(points, 1):
        world.add(pod)
        outcome = crashes.die(fatal, points, lambda: delete(world, pod))
        # The DEL was queued: to the runtime it is done, and the next agent does it.
        succeeded(outcome)
        crashes.start()
        crashes.nothing_left(f"killed before {point}")


def test_recovery(crashes: Crashes) -> None:
    """Killed while it takes back what a killed agent left, and again."""
    world, pod = crashes.world, crashes.world.pod()
    points = crashes.points(lambda: add(world, pod))
    succeeded(delete(world, pod))

    def leave_half_an_add() -> None:
        crashes.die(len(points), points, lambda: add(world, pod))

    leave_half_an_add()
    crashes.order(0)
    crashes.start()
    recovery = crashes.forget_order()
    assert recovery[0] == "commit releasing"
    crashes.nothing_left("after a recovery")
    leave_half_an_add()
    for fatal in range(1, len(recovery) + 1):
        # Each start gets one step further, as every one begins anew.
        crashes.order(fatal)
        with pytest.raises(CommandError, match="ended before it was ready"):
            crashes.start()
        assert crashes.forget_order() == recovery[:fatal]
    crashes.start()
    crashes.nothing_left("after a recovery that was killed at every point")


def test_recovery_that_is_refused_at_any_point_is_finished_later(crashes: Crashes) -> None:
    """What cannot be taken back of one pod is no reason to be away for all others."""
    world, pod, other = crashes.world, crashes.world.pod(), crashes.world.pod()
    points = crashes.points(lambda: add(world, pod))
    succeeded(delete(world, pod))
    crashes.die(len(points), points, lambda: add(world, pod))
    crashes.order(0)
    crashes.start()
    recovery = crashes.forget_order()
    for fatal, point in enumerate(recovery, 1):
        crashes.die(len(points), points, lambda: add(world, pod))
        crashes.order(fatal, "raise")
        crashes.start()
        deadline_s = time.monotonic() + WITHIN_S
        while world.status()["attachments"]:
            assert time.monotonic() < deadline_s, f"not finished after a failure before {point}"
            time.sleep(0.05)
        assert crashes.forget_order()[:fatal] == recovery[:fatal]
        assert "A test wants it so." in world.host.agent.log  # type: ignore[union-attr]
        world.delete(world.add(other))
        crashes.nothing_left(f"failed before {point} of a recovery")
