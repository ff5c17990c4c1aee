"""The agent's CNI calls against the running kernel: ADD, CHECK, DEL, GC, STATUS, VERSION, and what status says."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rdmanet.model import address_key
from testbed.cni_spec import validate_version
from testbed.host import diff
from testbed.world import Attached, World, config, refused, succeeded

GATEWAYS = {4: "10.213.0.1", 6: "fd72:646d:616e::1"}
NEXT_HOPS = {4: "10.213.0.1", 6: "fe80::1"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("agent", {"network": {"mtu_bytes": 9000}}) as world:
        yield world


@pytest.fixture(scope="module")
def unrepaired() -> Iterator[World]:
    """What is broken stays so, for CHECK to find (rdmanet.watch would be quicker)."""
    with World.start("unrepaired", {"network": {"mtu_bytes": 9000}, "agent": {"repair": False}}) as world:
        yield world


def shown(world: World, attached: Attached) -> dict[str, Any]:
    """The attachment's row of `rdmanet status`."""
    rows = [row for row in world.status()["attachments"] if row["container_id"] == attached.pod.container_id]
    (row,) = [row for row in rows if row["ifname"] == attached.pod.ifname]
    return dict(row)


def links(attached: Attached) -> dict[str, dict[str, Any]]:
    """The pod's links by name, as iproute2 shows them."""
    answer = attached.pod.exec(["ip", "-json", "-details", "address", "show"]).json()
    return {link["ifname"]: link for link in answer}


# ADD


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_add_in_every_version(world: World, version: str) -> None:
    with world.unchanged():
        attached = world.add(cniVersion=version)  # validated there
        assert len(attached.addresses) == 2
        assert {ip["gateway"] for ip in attached.result["ips"]} == set(GATEWAYS.values())
        interface = attached.result["interfaces"][1]
        assert interface.get("mtu") == (9000 if version == "1.1.0" else None)
        row = shown(world, attached)
        assert (row["state"], row["pod"]) == ("ready", f"default/{attached.pod.name}")
        assert [row["ipv4"], row["ipv6"]] == attached.addresses
        assert (row["mac"], row["host_ifname"]) == (attached.mac, attached.host_ifname)
        world.delete(attached)


def test_what_is_in_the_pod(world: World) -> None:
    attached = world.add()
    attached.pod.start()
    eth0 = links(attached)["eth0"]
    assert (eth0["mtu"], eth0["address"]) == (9000, attached.mac)
    # The carrier, which decides; the operational state follows when the kernel's link watch gets round to it.
    assert {"UP", "LOWER_UP"} <= set(eth0["flags"])
    held = {(a["local"], a["prefixlen"]) for a in eth0["addr_info"] if a["scope"] == "global"}
    assert held == {(attached.address(4), 32), (attached.address(6), 128)}
    assert not [a for a in eth0["addr_info"] if a["scope"] == "global" and a.get("tentative")]
    assert "UP" in links(attached)["lo"]["flags"]
    for version, everything, subnet in ((4, "default", "10.213.0.0/20"), (6, "default", "fd72:646d:616e::/64")):
        routes = attached.pod.exec(["ip", "-json", f"-{version}", "route"]).json()
        by_destination = {route["dst"]: route for route in routes}
        assert by_destination[everything]["gateway"] == NEXT_HOPS[version]
        assert by_destination[everything]["metrics"] == [{"mtu": 1500}], "no more than fits through the uplink"
        assert by_destination[subnet]["gateway"] == NEXT_HOPS[version]
        assert "metrics" not in by_destination[subnet]
    neighbours = attached.pod.exec(["ip", "-json", "neighbour", "show", "nud", "permanent"]).json()
    assert {n["dst"] for n in neighbours} == {*NEXT_HOPS.values(), *GATEWAYS.values()}
    assert {n["lladdr"] for n in neighbours} == {"02:72:00:00:00:00"}
    world.delete(attached)


def test_no_socket_of_ours_keeps_a_dead_pod(world: World) -> None:
    """Namespaces live as long as sockets in them: after DEL the kernel must let go of the pod's."""
    attached = world.add()
    inode = world.host.path(attached.pod.netns).stat().st_ino
    world.delete(attached)
    agent = world.host.agent
    assert agent is not None
    sockets = world.host.exec(["ls", "-l", f"/proc/{agent.process.pid}/fd"]).stdout
    assert f"net:[{inode}]" not in sockets
    with world.datapath() as datapath:
        assert address_key(attached.address(4)) not in datapath.endpoints()


@pytest.mark.parametrize("way", ["CNI_ARGS", "runtimeConfig", "args.cni"])
def test_requested_addresses_and_mac(world: World, way: str) -> None:
    number = {"CNI_ARGS": 1, "runtimeConfig": 2, "args.cni": 3}[way]
    v4, v6, mac = f"10.213.15.{number}", f"fd72:646d:616e::f{number}", f"0a:58:0a:00:00:0{number}"
    if way == "CNI_ARGS":
        attached = world.add(args=f"IgnoreUnknown=1;IP={v4},{v6};MAC={mac.upper()}")
    elif way == "runtimeConfig":
        asked = {"ips": [f"{v4}/20", v6], "Mac": mac}  # both letter cases are out there
        attached = world.add(capabilities={"ips": True, "mac": True}, runtimeConfig=asked)
    else:
        attached = world.add(conf={"args": {"cni": {"ips": [v4, v6], "mac": mac}}})
    assert (attached.addresses, attached.mac) == ([v4, v6], mac)
    attached.pod.start()
    assert links(attached)["eth0"]["address"] == mac
    assert attached.pod.exec(["ping", "-c", "1", "-W", "5", GATEWAYS[4]]).returncode == 0
    world.delete(attached)


def test_mtu_of_the_network_configuration(world: World) -> None:
    attached = world.add(mtu=1400)
    attached.pod.start()
    assert links(attached)["eth0"]["mtu"] == 1400
    assert attached.result["interfaces"][1]["mtu"] == 1400
    world.delete(attached)


def test_two_interfaces_in_one_pod(world: World) -> None:
    with world.unchanged():
        first = world.add()
        pod = first.pod
        pod.ifname = "net1"
        second = world.add(pod)
        assert {first.host_ifname, second.host_ifname} == {row["host_ifname"] for row in world.status()["attachments"]}
        pod.start()
        found = links(first)
        assert {name: found[name]["address"] for name in ("eth0", "net1")} == {
            "eth0": first.mac,
            "net1": second.mac,
        }
        for gateway in GATEWAYS.values():
            for ifname in ("eth0", "net1"):
                pod.exec(["ping", "-c", "1", "-W", "5", "-I", ifname, gateway])
            pod.exec(["ping", "-c", "1", "-W", "5", gateway])
        before = (first.address(4), second.address(4))
        counters = {row["ipv4"]: row["counters"]["from_pod_ip"]["packets"] for row in world.status()["attachments"]}
        assert [counters[address] for address in before] == [4, 2], "unbound traffic leaves by the first interface"
        for attached in (first, second):
            pod.ifname = attached.result["interfaces"][1]["name"]
            succeeded(world.check(attached))
        world.delete(second)
        pod.ifname = "eth0"
        world.host.settle()
        assert list(links(first)) == ["lo", "eth0"]
        succeeded(world.check(first))
        world.delete(first)


def test_many_at_once(world: World) -> None:
    with world.unchanged():
        pods = [world.pod() for _ in range(12)]
        with ThreadPoolExecutor(len(pods)) as threads:
            added = list(threads.map(world.add, pods))
            assert len({address for attached in added for address in attached.addresses}) == 2 * len(pods)
            for outcome in threads.map(world.check, added):
                succeeded(outcome)
            list(threads.map(world.delete, added))


# CHECK


def in_pod(*words: str) -> Callable[[World, Attached], None]:
    def change(world: World, attached: Attached) -> None:
        attached.pod.exec(["ip", *words], check=True)

    return change


def without_endpoint(world: World, attached: Attached) -> None:
    with world.datapath() as datapath:
        datapath.delete_endpoint(address_key(attached.address(6)))


def without_attachment_entry(world: World, attached: Attached) -> None:
    with world.datapath() as datapath:
        (ifindex,) = [k for k, v in datapath.attachments().items() if v.ipv4 == address_key(attached.address(4))]
        datapath.delete_attachment(ifindex)


def without_filter(world: World, attached: Attached) -> None:
    world.host.exec(["tc", "qdisc", "del", "dev", attached.host_ifname, "clsact"])


def without_host_end(world: World, attached: Attached) -> None:
    world.host.ip(f"link delete {attached.host_ifname}")


def without_address(version: int) -> Callable[[World, Attached], None]:
    def change(world: World, attached: Attached) -> None:
        enter = ["nsenter", f"--net={attached.pod.netns}", "ip", "address", "del"]
        width = 32 if version == 4 else 128
        world.host.exec([*enter, f"{attached.address(version)}/{width}", "dev", "eth0"])

    return change


def in_netns(*words: str) -> Callable[[World, Attached], None]:
    def change(world: World, attached: Attached) -> None:
        world.host.exec(["nsenter", f"--net={attached.pod.netns}", "ip", *words])

    return change


def without_namespace(world: World, attached: Attached) -> None:
    attached.pod.destroy()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_address(4), "the address 10.213."),
        (without_address(6), "the address fd72:646d:616e::"),
        (in_netns("route", "del", "default"), "the default route for IPv4 is missing"),
        (in_netns("-6", "route", "del", "default"), "the default route for IPv6 is missing"),
        (in_netns("neigh", "del", GATEWAYS[4], "dev", "eth0"), "the neighbour 10.213.0.1 is missing from eth0"),
        (in_netns("route", "del", "10.213.0.0/20"), "the route to 10.213.0.0/20 for IPv4 is missing"),
        (in_netns("link", "set", "eth0", "down"), "the interface eth0 is down"),
        (in_netns("link", "set", "lo", "down"), None),
        (without_host_end, "the interface eth0 is missing from the pod"),
        (without_filter, "the filter on rn-"),
        (without_endpoint, "the endpoint fd72:646d:616e::"),
        (without_attachment_entry, "its entry in the datapath is missing or wrong"),
        (without_namespace, "its network namespace"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_check_notices(unrepaired: World, change: Callable[[World, Attached], None], words: str | None) -> None:
    world = unrepaired
    attached = world.add()
    succeeded(world.check(attached))
    change(world, attached)
    if words is None:
        succeeded(world.check(attached))
    else:
        outcome = world.check(attached)
        refused(outcome, 3, words)
        assert outcome.output is not None
        assert outcome.output["msg"].endswith("; DEL and ADD the pod again.")
    world.delete(attached)


def test_check_tolerates_what_later_plugins_changed(world: World) -> None:
    """Specification, "CHECK": later plugins of the chain may have altered what ADD made."""
    attached = world.add()
    in_netns("link", "set", "eth0", "mtu", "1300")(world, attached)
    in_netns("route", "add", "192.0.2.0/24", "dev", "eth0")(world, attached)
    in_netns("address", "add", "192.0.2.1/24", "dev", "eth0")(world, attached)
    succeeded(world.check(attached))
    world.delete(attached)


def test_check_of_what_was_never_added(world: World) -> None:
    pod = world.pod()
    attached = Attached(pod, {"cniVersion": "1.1.0", "interfaces": [], "ips": []}, config({}))
    refused(world.check(attached), 3, f"There is no attachment {pod.container_id}/eth0; ADD it again.")


# DEL


def test_del_twice(world: World) -> None:
    with world.unchanged():
        attached = world.add()
        for _ in range(3):
            world.delete(attached)
        succeeded(world.host.cni("DEL", attached.pod, attached.conf))  # without prevResult


def test_del_of_what_was_never_added(world: World) -> None:
    with world.unchanged():
        succeeded(world.host.cni("DEL", world.pod(), config({})))


def test_del_with_empty_netns(world: World) -> None:
    with world.unchanged():
        attached = world.add()
        world.delete(attached, netns="")


@pytest.mark.parametrize("netns", [None, ""])
def test_del_with_the_namespace_gone(world: World, netns: str | None) -> None:
    with world.unchanged():
        attached = world.add()
        attached.pod.destroy()
        world.delete(attached, netns=netns)


def test_del_with_another_namespace_at_the_path(world: World) -> None:
    """A runtime re-uses names: what is at the path now belongs to another pod and stays as it is."""
    attached = world.add()
    attached.pod.destroy()
    again = world.pod(attached.pod.name)
    assert again.netns == attached.pod.netns
    other = world.add(again)
    world.delete(attached)
    succeeded(world.check(other))
    world.delete(other)


def test_an_address_is_free_again_only_after_del(world: World) -> None:
    asked = "IgnoreUnknown=1;IP=10.213.14.1"
    first = world.add(args=asked)
    outcome = world.host.cni("ADD", world.pod(), config({}), args=asked)
    refused(outcome, 100, "The address 10.213.14.1 is in use by another pod.")
    world.delete(first)
    world.delete(world.add(args=asked))


# GC, STATUS, VERSION


def garbage(world: World, valid: list[Attached], name: str = "net") -> None:
    kept = [{"containerID": a.pod.container_id, "ifname": a.pod.ifname} for a in valid]
    conf = {"cniVersion": "1.1.0", "name": name, "type": "rdmanet", "cni.dev/valid-attachments": kept}
    succeeded(world.host.cni("GC", None, conf))


def test_gc_removes_the_invalid_and_keeps_the_rest(world: World) -> None:
    kept, dropped, gone, foreign = world.add(), world.add(), world.add(), world.add(name="other")
    gone.pod.destroy()
    garbage(world, [kept])
    assert {row["container_id"] for row in world.status()["attachments"]} == {
        kept.pod.container_id,
        foreign.pod.container_id,
    }
    succeeded(world.check(kept))
    succeeded(world.check(foreign))
    world.host.settle()
    names = {link["ifname"] for link in world.host.exec(["ip", "-json", "link"]).json()}
    assert names == {"lo", "uplink0", "rdmanet0", "rdmanet1", kept.host_ifname, foreign.host_ifname}
    with world.datapath() as datapath:
        assert address_key(dropped.address(4)) not in datapath.endpoints()
        assert len(datapath.attachments()) == 2
    garbage(world, [])
    garbage(world, [], "other")
    assert world.status()["attachments"] == []


def test_gc_looks_at_the_interface_too(world: World) -> None:
    attached = world.add()
    kept = [{"containerID": attached.pod.container_id, "ifname": "net7"}]
    succeeded(world.host.cni("GC", None, config({"cni.dev/valid-attachments": kept})))
    assert world.status()["attachments"] == []


def test_status_and_version(world: World) -> None:
    succeeded(world.host.cni("STATUS", None, config({})))
    outcome = world.host.cni("VERSION", None, {"cniVersion": "1.0.0"})
    validate_version(outcome.output, "1.0.0")
    assert outcome.output is not None
    assert outcome.output["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]


def test_a_chain_keeps_the_earlier_result(world: World) -> None:
    earlier = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "dummy0"}],
        "ips": [{"address": "192.0.2.7/24", "interface": 0}],
    }
    attached = world.add(prevResult=earlier)
    names = [interface["name"] for interface in attached.result["interfaces"]]
    assert names == ["dummy0", attached.host_ifname, "eth0"]
    assert [ip["interface"] for ip in attached.result["ips"]] == [0, 2, 2]
    world.delete(attached)


# Status


def test_status_document_and_table(world: World) -> None:
    attached = world.add(args="K8S_POD_NAMESPACE=jobs;K8S_POD_NAME=web-9;K8S_POD_INFRA_CONTAINER_ID=x")
    document = world.status()
    assert document["agent"]["mtu_bytes"] == 9000
    row = shown(world, attached)
    assert (row["pod"], row["guard"], row["device"], row["degraded"]) == ("jobs/web-9", "observe", None, None)
    assert row["netns"] == attached.pod.netns
    assert ipaddress.ip_address(row["ipv6"]) in ipaddress.ip_network("fd72:646d:616e::/64")
    as_json = json.loads(world.command("status", "-o", "json").stdout)
    assert as_json["attachments"] == document["attachments"]
    table = world.command("status").stdout
    assert ["jobs/web-9", "eth0", attached.address(4), attached.address(6), "-", "ready"] in [
        line.split() for line in table.splitlines()
    ]
    world.delete(attached)


def test_the_host_is_as_after_the_start(world: World) -> None:
    """Last: whatever the tests above did, nothing of it is left."""
    before = world.snapshot()
    assert world.status()["attachments"] == []
    world.delete(world.add())
    assert diff(before, world.snapshot()) == []
    for table in ("attachments", "addresses"):
        assert before[f"table {table}"] == []
    assert before["endpoints"] == {}
