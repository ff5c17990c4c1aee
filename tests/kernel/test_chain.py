"""Our plugin at the head of a chain, and Debian's reference plugins behind it: every spec version, both families.

The reference plugins (1.1.1) know versions up to 1.0.0, firewall none before 0.4.0. Not used, as they fail with any
plugin in front of them: CHECK of portmap with a mapping to a pod with both families (it looks for IPv6's rule among
IPv4's), CHECK of bandwidth without a rate (it panics).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testbed.chain import Chain, ChainError
from testbed.cni_spec import validate_result
from testbed.host import Dump, diff
from testbed.outside import FAR_IPV4, FAR_IPV6, HOST_IPV4, HOST_IPV6
from testbed.pod import Pod
from testbed.world import World

OURS: dict[str, Any] = {"type": "rdmanet", "capabilities": {"mac": True, "ips": True}}
PORTMAP: dict[str, Any] = {"type": "portmap", "capabilities": {"portMappings": True}}
TUNING: dict[str, Any] = {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}
FIREWALL: dict[str, Any] = {"type": "firewall", "backend": "iptables"}
SBR: dict[str, Any] = {"type": "sbr"}
#: By version: what Debian's plugins can do at all.
BEHIND = {"0.3.1": [PORTMAP, TUNING], "0.4.0": [PORTMAP, TUNING, FIREWALL], "1.0.0": [PORTMAP, TUNING, FIREWALL]}
WITH_CHECK = ("0.4.0", "1.0.0")
MAPPINGS = {
    "portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 8053, "containerPort": 53, "protocol": "udp"},
    ]
}
NODE = {4: HOST_IPV4, 6: HOST_IPV6}
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
#: Answers every request with where it comes from.
SERVER = """
import socket, threading
tcp = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(("::", 53))
def datagrams():
    while True:
        data, sender = udp.recvfrom(64)
        udp.sendto(data + sender[0].encode(), sender)
threading.Thread(target=datagrams, daemon=True).start()
print("ready", flush=True)
while True:
    peer, sender = tcp.accept()
    with peer:
        peer.sendall(peer.recv(64) + sender[0].encode())
"""
CLIENT = """
import socket, sys
kind, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as s:
    s.settimeout(10)
    s.connect((address, port))
    s.sendall(b"from ")
    print(s.recv(200).decode())
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """With an agent, and forwarding as a host with port mappings has it."""
    with World.start("chain") as world:
        world.host.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
        yield world


@pytest.fixture
def started(world: World) -> Iterator[Callable[[Chain, str], Pod]]:
    """Pods in a chain, with a container in each; DEL at the end."""
    added: list[tuple[Chain, Pod]] = []

    def start(chain: Chain, name: str, capabilities: Any = None) -> Pod:
        pod = world.pod(name)
        added.append((chain, pod))
        chain.add(pod, capabilities)
        return pod.start()

    yield start
    for chain, pod in added:
        pod.stop()
        chain.delete(pod)
        pod.destroy()


def ask(place: Any, kind: str, address: str, port: int) -> str:
    """Whom the server saw."""
    done = place.exec(["python3", "-c", CLIENT, kind, address, str(port)], timeout_s=20)
    text: str = done.stdout.strip()
    assert text.startswith("from ")
    return text.removeprefix("from ").removeprefix("::ffff:")


def without_bases(dump: Dump) -> Dump:
    """portmap's and firewall's base chains survive every DEL, and portmap sets route_localnet."""
    sysctls = {name: value for name, value in dump["sysctls"].items() if "route_localnet" not in name}
    return {**dump, "nftables": [], "sysctls": sysctls}


@pytest.mark.parametrize("version", list(BEHIND))
def test_every_version_through_a_chain(world: World, version: str) -> None:
    """Results stay valid behind each plugin, what ADD made is there, CHECK agrees, and DELs leave nothing of ours."""
    chain = Chain(world.host, [OURS, *BEHIND[version]], version=version)
    pod = world.pod()
    before = without_bases(world.snapshot())
    for _ in range(2):
        result = chain.add(pod, MAPPINGS)
        validate_result(result, version, ifname="eth0", netns=pod.netns)
        assert len(result["ips"]) == 2
        if version in WITH_CHECK:
            Chain.check(_without(chain, "portmap"), pod)
        pod.start()
        assert pod.exec(["cat", "/proc/sys/net/core/somaxconn"]).stdout.strip() == "500"
        for address in FAR.values():
            pod.exec(["ping", "-c1", "-W5", address])
        pod.stop()
        chain.delete(pod)
        chain.delete(pod, netns="")  # once more, without a result and a namespace
    assert diff(before, without_bases(world.snapshot())) == []


def _without(chain: Chain, kind: str) -> Chain:
    plugins = [plugin for plugin in chain.plugins if plugin["type"] != kind]
    return Chain(chain.host, plugins, chain.version, chain.name, chain.results, chain.given)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_port_mappings_from_everywhere(world: World, started: Any, kind: str, version: int) -> None:
    """portmap translates in the host's stack: what comes by it is answered by it, so that clients see the answer of
    whom they asked. From outside, the host, another pod, and the pod itself."""
    chain = Chain(world.host, [OURS, PORTMAP])
    server, other = started(chain, "server", MAPPINGS), started(chain, "other")
    own = _address(chain, server, version), _address(chain, other, version)
    assert world.host.outside is not None
    listening = server.popen(["python3", "-c", SERVER], stdout=-1)
    assert listening.stdout is not None
    assert listening.stdout.readline() == b"ready\n"
    port = 8080 if kind == "tcp" else 8053
    seen = {
        "outside": ask(world.host.outside.container, kind, NODE[version], port),
        "host": ask(world.host, kind, NODE[version], port),
        "other": ask(other, kind, NODE[version], port),
        "itself": ask(server, kind, NODE[version], port),
        "directly": ask(other, kind, own[0], 80 if kind == "tcp" else 53),
    }
    listening.close()
    assert seen["outside"] not in (own[0], NODE[version])  # the client's own address, not masqueraded
    assert seen["other"] == seen["directly"] == own[1]
    assert seen["host"] == NODE[version]
    assert seen["itself"] != own[0]  # portmap masquerades these


def _address(chain: Chain, pod: Pod, version: int) -> str:
    for ip in chain.results[pod.container_id, "eth0"]["ips"]:
        address = ipaddress.ip_interface(ip["address"])
        if address.version == version:
            return str(address.ip)
    raise AssertionError(f"no IPv{version} address")


def test_policy_holds_for_what_comes_through_a_port_mapping(world: World, started: Any) -> None:
    """To the pod its client is an address; and a pod's own egress policy is not left behind by a detour."""
    chain = Chain(world.host, [OURS, PORTMAP])
    server, other = started(chain, "server", MAPPINGS), started(chain, "other")
    listening = server.popen(["python3", "-c", SERVER], stdout=-1)
    assert listening.stdout is not None
    assert listening.stdout.readline() == b"ready\n"
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "closed"},
        "spec": {"podSelector": {"matchLabels": {"app": "other"}}, "policyTypes": ["Egress"], "egress": []},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "other", "labels": {"app": "other"}},
        "spec": {"containers": [{"name": "main", "image": "main"}]},
    }
    for version in (4, 6):
        ask(other, "udp", NODE[version], 8053)
    world.host.api("PUT", "/v1/objects", {"documents": [pod, policy]})
    for version in (4, 6):
        with pytest.raises(Exception, match="status 1"):
            ask(other, "udp", NODE[version], 8053)
        assert world.host.outside is not None
        ask(world.host.outside.container, "udp", NODE[version], 8053)
    world.host.api("DELETE", "/v1/objects", {"documents": [pod, policy]})
    listening.close()


def test_several_interfaces_with_routes_by_source(world: World) -> None:
    """sbr moves each interface's routes to a table of its own; CHECK of ours, behind that, still finds them."""
    chain = Chain(world.host, [OURS, SBR, TUNING])
    pod = world.pod("several")
    names = ("eth0", "eth1", "net2")
    before = world.snapshot()
    for name in names:
        validate_result(chain.add(pod, ifname=name), "1.0.0", ifname=name, netns=pod.netns)
    for name in names:
        chain.check(pod, ifname=name)
    pod.start()
    for name in names:
        for ip in chain.results[pod.container_id, name]["ips"]:
            address = ipaddress.ip_interface(ip["address"])
            pod.exec(["ping", "-c1", "-W5", "-I", str(address.ip), FAR[address.version]])
    for family in ("-4", "-6"):  # the agent does not put back what sbr has moved
        assert pod.exec(["ip", family, "route", "show", "default"]).stdout == ""
    repairs = world.status()["repairs"]
    assert [row for row in (*repairs["broken"], *repairs["done"]) if "several" in str(row)] == []
    pod.stop()
    chain.delete(pod, ifname="eth1")
    for name in ("eth0", "net2"):
        chain.check(pod, ifname=name)
        chain.delete(pod, ifname=name)
    assert diff(before, world.snapshot()) == []


def test_check_says_what_a_later_plugin_broke(world: World) -> None:
    """tuning may set a MAC, which it writes into the result; but only the one that rdmanet gave passes."""
    chain = Chain(world.host, [OURS, {**TUNING, "mac": "02:00:00:00:00:77"}])
    pod = world.pod("renamed")
    chain.add(pod)
    with pytest.raises(ChainError, match="has the MAC 02:00:00:00:00:77, and only what comes from"):
        chain.check(pod)
    chain.delete(pod)
    ours = Chain(world.host, [OURS, TUNING])
    ours.add(pod, {"mac": "02:00:00:00:00:77"})
    ours.check(pod)
    ours.delete(pod)


def test_a_later_plugin_that_refuses_leaves_nothing(world: World) -> None:
    """The runtime then DELs the whole chain, without a result."""
    chain = Chain(world.host, [OURS, {"type": "tuning", "sysctl": {"net.core.nonsense": "1"}}])
    pod = world.pod("refused")
    before = world.snapshot()
    with pytest.raises(ChainError, match="tuning refused"):
        chain.add(pod)
    chain.delete(pod)
    assert diff(before, world.snapshot()) == []


def test_bandwidth_has_no_place_beside_our_filter(world: World) -> None:
    """Its ingress qdisc needs the one of our filter: it refuses egress rates, and nothing is left. Without a rate it
    does nothing, and may be in the chain (its CHECK then panics). Ours has its capability: test_bandwidth.py."""
    rates = {"egressRate": 1_000_000, "egressBurst": 1_000_000}
    pod = world.pod()
    with world.unchanged():
        limited = Chain(world.host, [OURS, {"type": "bandwidth", **rates}])
        with pytest.raises(ChainError, match=r"bandwidth refused: .* file exists"):
            limited.add(pod)
        limited.delete(pod)
        unlimited = Chain(world.host, [OURS, {"type": "bandwidth", "capabilities": {"bandwidth": True}}])
        validate_result(unlimited.add(pod), "1.0.0", ifname="eth0", netns=pod.netns)
        unlimited.delete(pod)
