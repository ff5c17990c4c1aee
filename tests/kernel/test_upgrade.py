"""Another version's agent takes over from one, and hands back, while pods talk: nothing is lost.

The other version has a datapath with another hash, maps of other sizes, or a database of an older schema.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rdmanet.store import SCHEMA_VERSION
from testbed.container import CommandError
from testbed.host import diff
from testbed.rebuilding import sinks
from testbed.streams import streams
from testbed.upgrades import OTHER_SIZES, SCHEMAS, downgrade_on, other_artifact
from testbed.world import DATABASE, World, succeeded
from tests.kernel.test_restart import lost


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("upgrade") as world:
        yield world


def programs(world: World) -> set[str]:
    """Which artifact runs, by the first digits of its hash."""
    running: dict[str, str] = world.status()["agent"]["programs"]
    return {name.partition("_")[2] for name in running.values()}


def replaced(world: World, how: str, config: dict[str, Any] | None = None) -> None:
    """The agent ends, and one with that configuration comes."""
    if how == "stopped":
        assert world.host.stop_agent() == 0
    else:
        world.host.kill_agent()
    world.host.start_agent(config or world.agent_config)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_there_and_back_under_load(world: World, how: str, tmp_path: Path) -> None:
    other = {**OTHER_SIZES, "datapath": {"artifact_dir": other_artifact(tmp_path)}}
    one, two = world.add(world.pod("one")), world.add(world.pod("two"))
    for attached in (one, two):
        attached.pod.start()
    before, ours = world.snapshot(), programs(world)
    with streams(world.host, one.pod.running, sinks(world, two)) as begun:
        pings = [
            one.pod.popen(["ping", "-q", "-i", "0.02", address], stdout=subprocess.PIPE) for address in two.addresses
        ]
        begun.go_on()
        for _ in range(2):
            replaced(world, how, other)
            begun.go_on()
            assert len(programs(world)) == 1
            assert not programs(world) & ours
            for attached in (one, two):
                succeeded(world.check(attached))
            replaced(world, how)
            begun.go_on()
            assert programs(world) == ours
        for pinging in pings:
            sent, missing = lost(pinging)
            assert sent > 20
            assert missing == 0
    assert diff(before, world.snapshot()) == []


@pytest.mark.parametrize("version", SCHEMAS)
def test_from_each_older_schema(world: World, version: int) -> None:
    """What it had no column for gets its default; pods go on, and what comes next is as ever."""
    one, two = world.add(world.pod("one")), world.add(world.pod("two"))
    for attached in (one, two):
        attached.pod.start()
    before = world.snapshot()
    with streams(world.host, one.pod.running, sinks(world, two)) as begun:
        world.host.kill_agent()
        downgrade_on(world.host, DATABASE, version)
        begun.go_on()
        world.start_agent()
        begun.go_on()
    assert world.sql("PRAGMA user_version") == [[[SCHEMA_VERSION]]]
    assert diff(before, world.snapshot()) == []
    three = world.add()
    assert three.host_ifname == "rn-3"
    for attached in (one, two, three):
        succeeded(world.check(attached))
        world.delete(attached)


def test_an_agent_that_is_older_than_the_database_refuses(world: World) -> None:
    one = world.add()
    world.host.kill_agent()
    world.sql(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    refusal = rf"written by a newer rdmanet \(schema {SCHEMA_VERSION + 1}, this one knows {SCHEMA_VERSION}\)"
    with pytest.raises(CommandError, match=f"ended before it was ready: .*{refusal}; install that version again"):
        world.start_agent()
    for command in (("repair", "--database"), ("uninstall",)):
        with pytest.raises(CommandError) as caught:
            world.command(*command)
        assert "install that version again" in caught.value.completed.stderr
    # That version comes again, and nothing has happened.
    world.sql(f"PRAGMA user_version={SCHEMA_VERSION}")
    world.start_agent()
    succeeded(world.check(one))
