"""What somebody breaks is shown and put right, live: every kind, both families, and traffic goes as before.

How often is enough, and what is named how, is tests/unit/test_reconcile.py's.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rdmanet.model import address_key
from testbed import breaking
from testbed.breaking import BREAKS, Target
from testbed.container import CommandError
from testbed.outside import FAR_IPV4, FAR_IPV6, GATEWAY_IPV4, GATEWAY_IPV6, UPLINK
from testbed.world import Attached, World, config, succeeded

FAMILIES = (4, 6)
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
#: What the kernel tells of at once; emulated and busy it takes longer.
PATIENCE_S = 60.0
OTHER_UPLINK = "uplink1"
OTHER = {4: "192.0.2.2", 6: "2001:db8:300::2"}
OTHER_GATEWAY = {4: "192.0.2.1", 6: "2001:db8:300::1"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("reconcile", {"network": {"mtu_bytes": 9000}}) as world:
        yield world


@pytest.fixture
def pair(world: World) -> Iterator[tuple[Attached, Attached]]:
    """The pod that is broken, and another one."""
    attached = (world.add(), world.add())
    for one in attached:
        one.pod.start()
    yield attached
    for one in attached:
        one.pod.stop()
        world.delete(one)


def target(world: World, attached: Attached) -> Target:
    return breaking.target_of(world.host, attached.pod)


def until(done: Callable[[], Any], sentence: str) -> Any:
    """What ``done`` returns when it is true; fails after a minute without."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := done()):
        assert time.monotonic() < deadline_s, sentence
        time.sleep(breaking.LOOK_EVERY_S)
    return found


def reaches_all(world: World, one: Attached, two: Attached) -> None:
    """One packet there and back: pod to pod, to the host, to the world outside, and from the host."""
    for version in FAMILIES:
        for place in (two.address(version), breaking.GATEWAYS[version], FAR[version]):
            one.pod.exec(["ping", "-c", "1", "-W", "10", place])
        two.pod.exec(["ping", "-c", "1", "-W", "10", one.address(version)])
        world.host.exec(["ping", "-c", "1", "-W", "10", one.address(version)])


def settled_snapshot(world: World) -> dict[str, Any]:
    """The host without what a repair numbers anew."""
    dump = world.snapshot()
    return {key: dump[key] for key in dump if key.startswith("table ") or key == "guards"}


@pytest.mark.parametrize("name", list(BREAKS))
def test_it_is_repaired_and_traffic_goes_on(world: World, pair: tuple[Attached, Attached], name: str) -> None:
    one, two = pair
    breaking.forgive(world.host)
    before = settled_snapshot(world)
    reaches_all(world, one, two)
    breaking.break_and_wait(target(world, one), name)
    reaches_all(world, one, two)
    for attached in pair:
        succeeded(world.check(attached))
    assert settled_snapshot(world) == before
    assert world.host.agent is not None
    assert ": repaired after " in world.host.agent.log


def test_its_own_changes_are_not_repaired(world: World) -> None:
    """ADD, CHECK, DEL and a start change much, and nothing is wrong with it."""
    breaking.forgive(world.host)
    before = breaking.repairs(world.host)["done"]
    for _ in range(5):
        one, two = world.add(), world.add()
        succeeded(world.check(one))
        world.delete(one)
        two.pod.destroy()
        world.delete(two)
    after = [one for one in breaking.repairs(world.host)["done"] if one["kind"] != "namespace"]
    assert len(after) == len([one for one in before if one["kind"] != "namespace"])
    with World.start("own") as other:
        kept = [other.add() for _ in range(5)]
        other.host.kill_agent()
        other.start_agent()
        other.add()
        other.delete(kept[0])
        # All have been looked at when what comes last has.
        until(lambda: other.host.api("POST", "/v1/repair?pod=node") == {"left": []}, "the node is not looked at")
        assert breaking.repairs(other.host) == {"broken": [], "given_up": [], "done": []}


def test_a_deleted_pod_is_never_made_again(world: World) -> None:
    """A DEL right behind the break: whoever comes first, nothing is left."""
    with world.unchanged():
        for _ in range(10):
            attached = world.add()
            world.host.ip(f"link delete {attached.host_ifname}")
            world.delete(attached)
            succeeded(world.host.cni("DEL", attached.pod, attached.conf))
            links = world.host.exec(["ip", "-o", "link"]).stdout
            world.host.settle()
            assert attached.host_ifname not in world.host.exec(["ip", "-o", "link"]).stdout, links
        kept = {row["host_ifname"] for row in world.status()["attachments"]}
        assert attached.host_ifname not in kept


def test_a_namespace_that_vanishes_is_collected(world: World) -> None:
    with world.unchanged():
        attached = world.add()
        index = world.host.exec(["cat", f"/sys/class/net/{attached.host_ifname}/ifindex"]).stdout
        assert index.strip().isdigit()
        attached.pod.destroy()
        until(
            lambda: attached.host_ifname not in {row["host_ifname"] for row in world.status()["attachments"]},
            "the attachment of a pod that is gone is still there",
        )
        # The namespace dies, which it does not while a socket of the agent's is in it: the host's end goes with it.
        until(
            lambda: attached.host_ifname not in world.host.exec(["ip", "-o", "link"]).stdout, "the host's end is left"
        )
        (done,) = [one for one in breaking.repairs(world.host)["done"] if attached.pod.name in one["what"]]
        assert (done["kind"], done["outcome"]) == ("namespace", "collected")
        succeeded(world.host.cni("DEL", attached.pod, attached.conf))


def test_a_namespace_that_goes_with_its_process(world: World) -> None:
    """Docker's paths are /proc/PID/ns/net."""
    with world.unchanged():
        pod = world.pod()
        process = world.host.popen(["unshare", "--net", "sleep", "infinity"], stdout=subprocess.PIPE)
        path = f"/proc/{process.pid}/ns/net"
        hosts = world.host.exec(["readlink", "/proc/self/ns/net"]).stdout
        until(lambda: world.host.exec(["readlink", path]).stdout != hosts, "the process has no namespace")
        outcome = world.host.cni("ADD", pod, config({}), netns=path)
        assert outcome.returncode == 0, outcome.sentence
        assert pod.container_id in {row["container_id"] for row in world.status()["attachments"]}
        process.signal(9)
        process.wait()
        process.close()
        until(
            lambda: pod.container_id not in {row["container_id"] for row in world.status()["attachments"]},
            "the attachment of a process that has ended is still there",
        )
        pod.destroy()


# Again and again


def test_a_pod_that_breaks_itself_is_left_alone(world: World, pair: tuple[Attached, Attached]) -> None:
    """It takes its own interface down over and over: it harms itself, and nobody is kept from anything."""
    one, two = pair
    broken = target(world, one)
    # Some hundred times a second, and addresses besides.
    loop = (
        "while :; do ip link set eth0 down; ip address add 192.0.2.9/32 dev eth0; ip address del 192.0.2.9/32 dev eth0;"
        " done"
    )
    flapping = world.host.popen(["nsenter", f"--net={broken.netns}", "sh", "-c", loop])
    try:

        def given_up() -> list[dict[str, Any]]:
            return [one for one in breaking.repairs(world.host)["given_up"] if one["what"] == broken.name]

        (state,) = until(given_up, "it is repaired for ever")
        assert state["kind"] == "interface"
        assert state["sentence"] == "the interface eth0 is down; it has broken 5 times within 10 minutes"
        # Others notice nothing.
        third = world.add()
        succeeded(world.check(third))
        for version in FAMILIES:
            two.pod.exec(["ping", "-c", "3", "-i", "0.2", "-W", "10", breaking.GATEWAYS[version]])
        world.delete(third)
    finally:
        flapping.signal(9)
        flapping.wait()
        flapping.close()
    assert world.host.agent is not None
    told = [line for line in world.host.agent.log.splitlines() if f"{broken.name}: the interface eth0 is down" in line]
    assert len(told) == 5, "four repairs, and that it is left alone"
    text = world.command("status").stdout
    assert "LEFT ALONE" in text
    assert broken.name in text
    counted = {
        (sample.labels["kind"], sample.labels["outcome"]): sample.value
        for family in text_string_to_metric_families(world.host.api("GET", "/metrics"))
        for sample in family.samples
        if sample.name == "rdmanet_repairs_total"
    }
    assert counted["interface", "given_up"] >= 1
    # It stays down until somebody asks.
    link = world.host.exec(["nsenter", f"--net={broken.netns}", "ip", "-o", "link", "show", "eth0"]).stdout
    assert "state DOWN" in link
    assert world.command("repair", broken.pod).stdout == "nothing is broken\n"
    assert breaking.repairs(world.host)["given_up"] == []
    reaches_all(world, one, two)


def test_repair_of_what_is_not_there(world: World) -> None:
    with pytest.raises(CommandError, match="There is no pod default/nobody here"):
        world.command("repair", "default/nobody")
    assert world.command("repair").stdout == "nothing is broken\n"


def test_what_cannot_be_repaired_is_tried_and_left_alone(world: World) -> None:
    """Another interface has the name: ADD would be refused, too."""
    attached = world.add()
    broken = target(world, attached)
    broken.inside(
        "sh", "-c", "ip link delete eth0; ip link add eth0 type dummy 2>/dev/null || ip link add eth0 type veth"
    )

    def given_up() -> bool:
        return any(one["what"] == broken.name for one in breaking.repairs(world.host)["given_up"])

    until(given_up, "it is tried for ever")
    assert world.host.agent is not None
    assert "could not be put right: The interface eth0 exists already in" in world.host.agent.log
    broken.inside("ip", "link", "delete", "eth0")
    assert world.command("repair", broken.pod).stdout == "nothing is broken\n"
    succeeded(world.check(attached))
    world.delete(attached)


def test_where_repairing_is_switched_off_it_is_shown_alone() -> None:
    with World.start("shown", {"agent": {"repair": False}}) as world:
        attached = world.add()
        broken = target(world, attached)
        broken.inside("ip", "link", "set", "eth0", "down")
        shown = until(lambda: breaking.repairs(world.host)["broken"], "nothing is shown")
        assert shown == [{"what": broken.name, "kind": "interface", "sentence": "the interface eth0 is down"}]
        assert breaking.repairs(world.host)["done"] == []
        assert "the interface eth0 is down" in world.command("status").stdout
        broken.inside("ip", "link", "set", "eth0", "up")
        broken.inside("ip", "link", "set", "eth0", "down")
        assert (
            "state DOWN"
            in world.host.exec(["nsenter", f"--net={broken.netns}", "ip", "-o", "link", "show", "eth0"]).stdout
        )
        world.delete(attached)
        until(lambda: breaking.repairs(world.host)["broken"] == [], "what is deleted is still shown")


# Uplinks


def seen_as(world: World, attached: Attached, version: int) -> str:
    """Whose address somebody outside sees."""
    assert world.host.outside is not None
    sink = world.traffic(f"outside-{time.monotonic_ns()}", world.host.outside)
    port = sink.ask("serve", address=FAR[version])["port"]
    source = world.traffic(f"pod-{time.monotonic_ns()}", attached.pod.running)
    return str(source.ask("send", address=FAR[version], port=port, bytes=1000, verify=False)["peer"])


def test_a_new_address_of_the_uplink_is_masqueraded_behind() -> None:
    with World.start("renumbered") as world:
        attached = world.add()
        attached.pod.start()
        old = {version: seen_as(world, attached, version) for version in FAMILIES}
        new = {4: "198.51.100.77", 6: "2001:db8:100::77"}
        host = world.host
        host.ip(
            f"address delete {old[4]}/24 dev {UPLINK}",
            f"address delete {old[6]}/64 dev {UPLINK}",
            f"address add {new[4]}/24 dev {UPLINK}",
            f"address add {new[6]}/64 dev {UPLINK} nodad",
            f"route replace default via {GATEWAY_IPV4} dev {UPLINK}",
            f"route replace ::/0 via {GATEWAY_IPV6} dev {UPLINK}",
        )

        def followed() -> bool:
            with world.datapath() as datapath:
                (entry,) = datapath.uplinks().values()
            return (entry.ipv4, entry.ipv6) == (address_key(new[4]), address_key(new[6]))

        until(followed, "the new addresses are not followed")
        assert {version: seen_as(world, attached, version) for version in FAMILIES} == new
        done = breaking.repairs(host)["done"]
        assert {(one["kind"], one["outcome"]) for one in done} == {("uplink", "followed")}


def test_another_uplink_is_followed_and_the_old_one_is_left() -> None:
    with World.start("rerouted") as world:
        attached = world.add()
        attached.pod.start()
        host, outside = world.host, world.host.outside
        assert outside is not None
        old = host.exec(["tc", "filter", "show", "dev", UPLINK, "ingress"]).stdout
        assert "rdmanet/uplink" in old
        host.ip(f"link add {OTHER_UPLINK} type veth peer name eth1 netns {outside.container.pid}")
        for version, length in ((4, 24), (6, 64)):
            nodad = " nodad" if version == 6 else ""
            host.ip(f"address add {OTHER[version]}/{length} dev {OTHER_UPLINK}{nodad}")
            outside.ip(f"address add {OTHER_GATEWAY[version]}/{length} dev eth1{nodad}")
        host.ip(f"link set {OTHER_UPLINK} up")
        outside.ip("link set eth1 up")
        host.ip(
            f"route replace default via {OTHER_GATEWAY[4]} dev {OTHER_UPLINK}",
            f"route delete ::/0 dev {UPLINK}",
            f"route add ::/0 via {OTHER_GATEWAY[6]} dev {OTHER_UPLINK}",
        )
        index = int(host.exec(["cat", f"/sys/class/net/{OTHER_UPLINK}/ifindex"]).stdout)

        def followed() -> bool:
            with world.datapath() as datapath:
                return set(datapath.uplinks()) == {index}

        until(followed, "the new default routes are not followed")
        assert {version: seen_as(world, attached, version) for version in FAMILIES} == OTHER
        until(
            lambda: "rdmanet/uplink" not in host.exec(["tc", "filter", "show", "dev", UPLINK, "ingress"]).stdout,
            "the filter is still on the old uplink",
        )
        world.delete(attached)
        host.stop_agent()
        world.command("uninstall")
        assert "clsact" not in host.exec(["tc", "qdisc", "show"]).stdout
