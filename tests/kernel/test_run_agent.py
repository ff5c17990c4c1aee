"""`rdmanet run` where the agent is away, dies or has no addresses left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.host import diff
from testbed.jobs import Job, left, python, run
from testbed.world import World
from tests.kernel.test_run import WAIT, there

#: Room for five pods.
SMALL = {"network": {"ipv4_range": "10.213.0.0/29"}}
OBEDIENT = "trap 'exit 0' TERM; echo there $RANK; sleep 1000 & wait"


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("run-agent", SMALL) as world:
        yield world


def test_no_agent(world: World) -> None:
    world.host.stop_agent()
    before = world.host.dump()
    ended = run(world.host, "--", "true")
    assert ended.code == 125
    assert "The agent does not answer" in ended.stderr
    assert "Start it with `rdmanet agent`" in ended.stderr
    assert diff(before, world.host.dump()) == []


def test_more_pods_than_addresses(world: World) -> None:
    with world.unchanged():
        ended = run(world.host, "--pods", "7", "--", "true")
        assert ended.code == 125
        assert "Pod job-" in ended.stderr
        assert "address" in ended.stderr
        assert ended.stdout == ""
        assert left(world.host) == []
        assert run(world.host, "--pods", "5", "--", "true").code == 0


def test_the_agent_dies_while_a_job_runs(world: World) -> None:
    """Ranks go on; what is taken back without an agent is done when it is there again."""
    with world.unchanged():
        with Job(
            world.host, "--pods", "2", "--", "sh", "-c", "echo there $RANK; trap 'exit 0' TERM; sleep 1000 & wait"
        ) as job:
            there(job, 2)
            world.host.kill_agent()
            job.signal(15)
            ended = job.end()
        assert ended.code == 0, ended.stderr
        assert left(world.host) == []
        world.start_agent()
        assert left(world.host) == []


def test_launcher_and_agent_die(world: World) -> None:
    with world.unchanged():
        with Job(world.host, "--pods", "2", *python(WAIT)) as job:
            there(job, 2)
            world.host.kill_agent()
            job.signal(9)
            job.end()
        assert run(world.host, "--cleanup").code == 0
        assert left(world.host) == []
        world.start_agent()
        assert left(world.host) == []


def test_uninstall_takes_what_a_killed_launcher_left(world: World) -> None:
    with Job(world.host, "--pods", "2", *python(WAIT)) as job:
        there(job, 2)
        job.signal(9)
        job.end()
    world.host.stop_agent()
    world.host.uninstall()
    assert left(world.host) == []
    assert not world.host.path("/run/rdmanet").exists()
