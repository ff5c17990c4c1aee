"""Databases that are damaged or lost under live pods: a start refuses, `rdmanet repair --database` writes the rows from
the kernel's state, and no pod notices."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from testbed.container import CommandError
from testbed.damage import DAMAGES, damage
from testbed.host import diff
from testbed.policies import labelled, policy
from testbed.rebuilding import known, repair, sinks
from testbed.services import CLUSTER_IP, service, slices
from testbed.streams import streams
from testbed.world import DATABASE, World, succeeded

OBJECTS = "/var/lib/rdmanet/objects.db"
LONG_NAME = "a" * 60


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("database") as world:
        yield world


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_under_live_pods(world: World, how: str) -> None:
    pristine = world.snapshot()
    one = world.add(world.pod("one"), ingressRate=10**9, egressRate=10**8, egressBurst=2**22)
    two = world.add(world.pod("two"), args=f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={LONG_NAME};K8S_POD_UID=6f2d-1")
    three = world.add(world.pod("three"))
    for attached in (one, two):
        attached.pod.start()
    # Whoever has a policy keeps it, as pods keep their names: nobody may reach three, before and after.
    forbidding = [labelled("three", app="server"), policy("nobody")]
    world.host.api("PUT", "/v1/objects", {"documents": forbidding})
    before = known(world)
    with streams(world.host, one.pod.running, sinks(world, two)) as begun:
        world.host.kill_agent()
        damage(world.host, DATABASE, how)
        for _ in range(2):
            with pytest.raises(CommandError, match=r"ended before it was ready: .*`rdmanet repair --database`"):
                world.start_agent()
        begun.go_on()
        said = repair(world)
        assert "wrote 3 attachment(s)" in said[-1] or how == "rows lost", said
        assert repair(world) == ["the databases are whole; nothing was done"]
        begun.go_on()
        world.start_agent()
        begun.go_on()
    assert diff(before, known(world)) == []
    for attached in (one, two, three):
        succeeded(world.check(attached))
    three.pod.start()
    assert one.pod.exec(["ping", "-c", "1", "-W", "1", three.address(4)], check=False).returncode == 1
    # Ids are not used again, nor addresses that are in use.
    four = world.add()
    assert four.host_ifname == "rn-4"
    assert four.address(4) not in {address for attached in (one, two, three) for address in attached.addresses}
    for attached in (one, two, three, four):
        world.delete(attached)
    world.host.api("DELETE", "/v1/objects", {"documents": forbidding})
    assert diff(pristine, world.snapshot()) == []


def test_everything_goes_with_an_uninstall(world: World) -> None:
    """Also what was done to the host before any pod came is known again, and files that were moved aside go."""
    world.add()
    world.host.stop_agent()
    world.command("uninstall")
    pristine = world.host.dump()
    world.start_agent()
    world.add(world.pods[0])
    effects = world.sql("SELECT * FROM host_effects ORDER BY 1")
    world.host.kill_agent()
    damage(world.host, OBJECTS, "not a database")
    for how in ("truncated", "empty"):
        damage(world.host, DATABASE, how)
        with pytest.raises(CommandError) as caught:
            world.host.uninstall()
        assert "`rdmanet repair --database`" in caught.value.completed.stderr
    repair(world)
    assert world.sql("SELECT * FROM host_effects ORDER BY 1") == effects
    world.command("uninstall")
    assert diff(pristine, world.host.dump()) == []


def test_no_repair_while_an_agent_runs(world: World) -> None:
    with pytest.raises(CommandError) as caught:
        repair(world)
    assert "An agent is running already with /var/lib/rdmanet; stop it first." in caught.value.completed.stderr


def test_nothing_to_repair() -> None:
    with World.start("database", agent=False) as world:
        world.start_agent()
        world.host.kill_agent()
        assert repair(world) == ["the databases are whole; nothing was done"]
        world.command("uninstall")
        assert repair(world) == ["the databases are whole; nothing was done"]


def test_half_an_attachment_is_taken_back(world: World) -> None:
    """That of a killed ADD: nobody can say that it is whole. A pod that nobody knows any more keeps its network."""
    pristine = world.snapshot()
    half, gone, whole = (world.add() for _ in range(3))
    world.host.kill_agent()
    with world.datapath() as datapath:
        (index,) = [k for k, v in datapath.attachments().items() if v.attachment_id == 1]
        datapath.delete_attachment(index)
    world.host.exec(["ip", "link", "set", gone.host_ifname, "alias", "somebody's note"])
    damage(world.host, DATABASE, "gone")
    said = repair(world)
    assert "rn-1 of default/pod-" in said[1]
    assert said[1].endswith("is not whole: the next start removes it")
    assert any(line.startswith("whose rn-2 is cannot be found: it goes on") for line in said)
    world.start_agent()
    succeeded(world.check(whole))
    rows = {row["container_id"]: row["state"] for row in world.status()["attachments"]}
    assert rows == {"unknown-2": "ready", whole.pod.container_id: "ready"}
    # Its interface is known by the name that it has, not made anew under another one.
    (unknown,) = [row for row in world.status()["attachments"] if row["container_id"] == "unknown-2"]
    assert unknown["ifname"] == "eth0"
    world.delete(half)
    world.delete(gone)
    gone.pod.start()
    for version in (4, 6):
        gone.pod.exec(["ping", "-c", "1", "-W", "5", whole.address(version)])
    gone.pod.destroy()
    world.host.kill_agent()
    world.start_agent()
    world.delete(whole)
    assert diff(pristine, world.snapshot()) == []


def test_a_namespace_is_found_where_its_path_is_not(world: World) -> None:
    """Its path was too long for the alias: it is looked for by its number, here among those that are bound."""
    one = world.add(args=f"K8S_POD_NAMESPACE={'n' * 63};K8S_POD_NAME={'p' * 100}")
    (before,) = world.sql("SELECT netns, netns_dev, netns_ino FROM attachments")
    assert " at=" not in world.host.exec(["ip", "link", "show", one.host_ifname]).stdout
    world.host.kill_agent()
    damage(world.host, DATABASE, "empty")
    repair(world)
    (after,) = world.sql("SELECT netns, netns_dev, netns_ino FROM attachments")
    assert after[0][1:] == before[0][1:]
    world.start_agent()
    succeeded(world.check(one))


def test_links_of_an_older_version_get_their_alias_at_a_start(world: World) -> None:
    one = world.add()
    show = ["ip", "link", "show", one.host_ifname]
    before = world.host.exec(show).stdout
    assert f"id={one.pod.container_id} if=eth0 net=net" in before
    world.host.kill_agent()
    world.host.exec(["ip", "link", "set", one.host_ifname, "alias", "old"])
    world.start_agent()
    assert world.host.exec(show).stdout == before


@pytest.mark.parametrize("how", ["truncated", "not a database", "another program's tables"])
def test_damaged_objects(world: World, how: str) -> None:
    """Policies that nobody can read are never taken for none: a start refuses, and it is told what to apply again."""
    one, two = world.add(), world.add()
    for attached in (one, two):
        attached.pod.start()
    backends = {"two": {version: two.address(version) for version in (4, 6)}}
    documents = [service(), *slices(backends)]
    world.host.api("PUT", "/v1/objects", {"documents": documents})
    world.host.kill_agent()
    damage(world.host, OBJECTS, how)
    with pytest.raises(CommandError, match=r"objects\.db is damaged: .*`rdmanet repair --database`.*apply the objects"):
        world.start_agent()
    said = repair(world)
    assert said[1] == f"moved it to {OBJECTS}.damaged-1"
    assert "`rdmanet apply` them again" in said[2]
    assert len(said) == 3
    world.start_agent()
    assert world.host.api("GET", "/v1/objects")["items"] == []
    for attached in (one, two):
        succeeded(world.check(attached))
    world.host.api("PUT", "/v1/objects", {"documents": documents})
    assert json.dumps(CLUSTER_IP[4]) in json.dumps(world.host.api("GET", "/v1/objects"))
