"""`rdmanet uninstall` takes back everything of ours and nothing of anybody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.container import CommandError
from testbed.host import Dump, diff
from testbed.world import World

#: A filter that somebody else has on the uplink: one instruction that lets everything pass.
THEIRS = ["filter", "add", "dev", "uplink0", "ingress", "pref", "7", "protocol", "ip"]
THEIRS += ["bpf", "bytecode", "1,6 0 0 0", "flowid", "1:1"]


@pytest.fixture(scope="module")
def host_of_all() -> Iterator[World]:
    """One host for all: each test leaves it as it found it, which is what it tests."""
    with World.start("uninstall", agent=False) as world:
        yield world


@pytest.fixture
def world(host_of_all: World) -> Iterator[World]:
    yield host_of_all
    host_of_all.host.kill_agent()


def tc(world: World, *words: str) -> str:
    return world.host.exec(["tc", *words]).stdout


def uninstalled(world: World, before: Dump) -> str:
    """What the command said; afterwards the host is byte for byte as before."""
    said = world.command("uninstall").stdout
    assert diff(before, world.host.dump()) == []
    return said


def test_after_an_ordinary_life_and_again(world: World) -> None:
    before = world.host.dump()
    world.start_agent()
    world.delete(world.add())
    during = diff(before, world.host.dump())
    assert any("rdmanet0" in line for line in during), "the comparison sees nothing"
    world.host.stop_agent()
    assert uninstalled(world, before) == "uninstalled; the host is as it was\n"
    assert uninstalled(world, before) == "uninstalled; the host is as it was\n"
    world.start_agent()
    world.delete(world.add())
    world.host.stop_agent()
    uninstalled(world, before)


def test_with_pods_still_attached(world: World) -> None:
    before = world.host.dump()
    world.start_agent()
    first, second, gone, file = (world.add() for _ in range(4))
    first.pod.start()
    gone.pod.destroy()
    # As `ip netns` leaves it: unmounted, and the file below it still there.
    world.host.container.act(("umount", file.pod.netns))
    world.host.kill_agent()
    said = uninstalled(world, before)
    assert said.splitlines()[:-1] == [
        f"removed {attached.host_ifname} of default/{attached.pod.name}" for attached in (first, second, gone, file)
    ]
    assert first.pod.exec(["ip", "-o", "link"]).stdout.count("\n") == 1, "more than lo is left in the pod"


def test_with_a_half_made_attachment(world: World) -> None:
    before = world.host.dump()
    world.start_agent()
    world.add()
    world.host.kill_agent()
    world.sql("UPDATE attachments SET state = 'adding', result = '{}'")
    uninstalled(world, before)


def test_refused_while_an_agent_runs(world: World) -> None:
    world.start_agent()
    attached = world.add()
    during = world.snapshot()
    with pytest.raises(CommandError, match="ended with status 1") as caught:
        world.command("uninstall")
    assert caught.value.completed.stderr == (
        "rdmanet: An agent is running already with /var/lib/rdmanet; stop it first. (flock: errno 11 Resource"
        " temporarily unavailable)\n"
    )
    assert diff(during, world.snapshot()) == []
    world.delete(attached)
    world.host.stop_agent()
    world.command("uninstall")


def test_somebody_elses_clsact_and_filter_stay(world: World) -> None:
    tc(world, "qdisc", "add", "dev", "uplink0", "clsact")
    tc(world, *THEIRS)
    before = world.host.dump()
    world.start_agent()
    attached = world.add()
    attached.pod.start()
    attached.pod.exec(["ping", "-c", "1", "-W", "5", "203.0.113.1"])
    world.host.stop_agent()
    uninstalled(world, before)
    assert "1,6 0 0 0" in tc(world, "filter", "show", "dev", "uplink0", "ingress")
    tc(world, "qdisc", "del", "dev", "uplink0", "clsact")


def test_a_filter_that_came_after_ours_keeps_its_clsact(world: World) -> None:
    """The qdisc was ours; a filter of somebody else hangs on it by now."""
    before = world.host.dump()
    world.start_agent()
    tc(world, *THEIRS)
    world.host.stop_agent()
    world.command("uninstall")
    left = diff(before, world.host.dump())
    assert [line.split(":")[0] for line in left] == ["filters", "qdiscs"], left
    tc(world, "filter", "del", "dev", "uplink0", "ingress", "pref", "7")
    tc(world, "qdisc", "del", "dev", "uplink0", "clsact")
    assert diff(before, world.host.dump()) == []


def test_an_uplink_that_is_gone() -> None:
    with World.start("unplugged") as world:
        world.host.stop_agent()
        world.host.ip("link delete uplink0")
        assert world.command("uninstall").stdout == "uninstalled; the host is as it was\n"
        assert [link["ifname"] for link in world.host.exec(["ip", "-json", "link"]).json()] == ["lo"]


def test_a_foreign_file_in_our_directories_stays(world: World) -> None:
    world.start_agent()
    world.host.stop_agent()
    world.host.container.act(("write", "/run/rdmanet/theirs", "x"), ("write", "/var/lib/rdmanet/theirs", "x"))
    world.command("uninstall")
    assert world.host.exec(["ls", "/run/rdmanet", "/var/lib/rdmanet"]).stdout.split() == [
        "/run/rdmanet:",
        "theirs",
        "/var/lib/rdmanet:",
        "theirs",
    ]
    world.host.exec(["rm", "-r", "/run/rdmanet", "/var/lib/rdmanet/theirs"])


def test_the_bpffs_goes_only_if_it_is_ours_and_free() -> None:
    with World.start("bpffs", outside=False, agent=False, bpffs=False) as world:
        before = world.host.dump()
        assert before["bpffs_mounts"] == []
        world.start_agent()
        world.delete(world.add())
        assert world.host.dump()["bpffs_mounts"] == ["/sys/fs/bpf"]
        world.host.stop_agent()
        uninstalled(world, before)
        # A second time, and now somebody else has pinned there: the mount is theirs as much as ours.
        world.start_agent()
        world.host.stop_agent()
        world.host.exec(["mkdir", "/sys/fs/bpf/theirs"])
        world.command("uninstall")
        assert "/sys/fs/bpf/theirs" in world.host.dump()["bpffs"]
