"""The state directory is full, or somebody holds the database: ADD is refused before anything is done, what takes
something back works, and later everything is as if it had never been."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rdmanet.reserve import SIZE_BYTES
from testbed.container import CommandError
from testbed.filling import STATE, fill, free, free_bytes, full, mount_small
from testbed.host import diff
from testbed.world import World, config, refused, succeeded

#: More DELs than the reserve has room for without the log being folded.
MANY = 60


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("full", agent=False) as world:
        mount_small(world.host)
        world.start_agent()
        yield world


def reserved(world: World) -> bool:
    """Whether the space for DELs is there."""
    path = world.host.path(f"{STATE}/reserve")
    return path.exists() and path.stat().st_blocks * 512 == SIZE_BYTES


def test_adds_are_refused_and_dels_work(world: World) -> None:
    pristine = world.snapshot()
    assert reserved(world)
    attached = [world.add() for _ in range(3)]
    new = world.pod()
    before = world.snapshot()
    with full(world.host):
        for _ in range(2):
            refused(world.host.cni("ADD", new, config({})), 104, "is full, and nothing was begun")
        refused(world.host.cni("STATUS", None, config({})), 50, "is full, and nothing was begun")
        assert diff(before, world.snapshot()) == []
        for one in attached:
            succeeded(world.check(one))
        world.delete(attached[0])
        world.delete(attached[1])
        # GC, and a pod whose namespace is gone.
        attached[2].pod.destroy()
        gone = config({"cni.dev/valid-attachments": []})
        succeeded(world.host.cni("GC", None, gone))
        assert diff(pristine, world.snapshot()) == []
    succeeded(world.host.cni("STATUS", None, config({})))
    assert reserved(world), "the space for DELs is made again when there is room"
    world.delete(world.add(new))
    assert diff(pristine, world.snapshot()) == []


def test_more_dels_than_the_reserve_is_large(world: World) -> None:
    pristine = world.snapshot()
    attached = [world.add() for _ in range(MANY)]
    with full(world.host):
        for one in attached:
            world.delete(one)
            world.host.settle()
            fill(world.host)  # whatever was given back is taken by somebody else
        assert diff(pristine, world.snapshot()) == []


def test_an_agent_starts_and_stops(world: World) -> None:
    one = world.add()
    before = world.snapshot()
    with full(world.host):
        world.host.stop_agent()
        fill(world.host)
        world.start_agent()
        succeeded(world.check(one))
        assert diff(before, world.snapshot()) == []
        refused(world.host.cni("ADD", world.pod(), config({})), 104, "is full, and nothing was begun")
        world.host.kill_agent()
        fill(world.host)
        # A DEL that nobody hears now is queued all the same.
        world.delete(one)
    world.start_agent()
    assert world.status()["attachments"] == []


def test_a_start_without_any_space_says_so(world: World) -> None:
    world.host.stop_agent()
    world.host.exec(["rm", f"{STATE}/reserve"])
    fill(world.host)
    with pytest.raises(CommandError, match=r"ended before it was ready: .*[Ff]ree space"):
        world.start_agent()
    free(world.host)
    world.start_agent()
    assert reserved(world)
    world.delete(world.add())


def test_an_uninstall_works(world: World) -> None:
    world.add()
    world.host.stop_agent()
    fill(world.host)
    assert free_bytes(world.host) == 0
    world.command("uninstall")
    assert [path.name for path in world.host.path(STATE).iterdir()] == ["filling"]


def test_a_database_that_another_process_holds(world: World) -> None:
    pristine = world.snapshot()
    one, new = world.add(), world.pod()
    holder = world.hold_database()
    refused(world.host.cni("ADD", new, config({})), 104, "Another process has held it for more than 5 s")
    refused(world.host.cni("DEL", one.pod, config({})), 104, "Another process has held it for more than 5 s")
    succeeded(world.check(one))
    holder.kill()
    holder.close()
    world.delete(world.add(new))
    world.delete(one)
    assert diff(pristine, world.snapshot()) == []
