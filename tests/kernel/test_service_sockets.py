"""Services by the socket programs, live: what connects, sends, receives and asks for its peer's name.

Programs on cgroup hooks have no test run. The map entries are written here; who writes them on real hosts is
tests/unit/test_services_*'s and the rows'.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from rdmanet.datapath import sockets
from testbed.outside import HOST_IPV4, HOST_IPV6
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.service_entries import NODE, READY, TERMINATING, End, ServiceEntries
from testbed.world import PINS, Attached, World

CALLER = REPOSITORY / "testbed/caller.py"
CLUSTER_IP = {4: "10.96.0.10", 6: "fd96::10"}
UPLINK = {4: HOST_IPV4, 6: HOST_IPV6}
PORT, TARGET_PORT, NODE_PORT = 80, 8080, 30080
FAMILIES = (4, 6)
KINDS = ("tcp", "udp")
CALLS = 24  # of which two backends get none with a chance of 2^-23


def caller(world: World, place: str, container: Any) -> Peer:
    """The program of testbed/caller.py there."""
    argv = [sys.executable, "-I", "-S", "-E", str(CALLER)]
    world.peers.append(Peer.start(f"{world.host.name}-{place}-caller", container.popen, argv))
    return world.peers[-1]


@dataclass
class Stage:
    """Three pods that serve under their names, the host, and the maps."""

    world: World
    pods: dict[str, Attached]
    callers: dict[str, Peer]
    entries: ServiceEntries

    def ends(self, version: int, *names: str) -> list[End]:
        """Where pods serve."""
        return [(self.pods[name].address(version), TARGET_PORT) for name in names]

    def ask(self, place: str, do: str, **request: Any) -> dict[str, Any]:
        """One request to a place's program."""
        return self.callers[place].ask(do, **request)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with World.start("services") as world, ServiceEntries(world.host.path(PINS)) as entries:
        pods = {name: world.add(world.pod(name)) for name in ("one", "two", "three")}
        callers = {}
        for name, attached in pods.items():
            attached.pod.start()
            callers[name] = caller(world, name, attached.pod.running)
            callers[name].ask("serve", name=name, port=TARGET_PORT)
        callers["host"] = caller(world, "host", world.host)
        for address in UPLINK.values():
            entries.node_address(address)
        yield Stage(world, pods, callers, entries)
        for attached in pods.values():
            world.delete(attached)


def same(a: Any, b: tuple[str, int]) -> bool:
    """Whether an address as a socket tells it is this one; mapped addresses are what they map."""
    return a is not None and (str(a[0]).removeprefix("::ffff:"), a[1]) == b


@pytest.mark.parametrize("place", ["one", "host"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", FAMILIES)
def test_a_cluster_ip_is_its_backends(stage: Stage, version: int, kind: str, place: str) -> None:
    stage.entries.put(1, CLUSTER_IP[version], PORT, kind, stage.ends(version, "two", "three"))
    answer = stage.ask(place, "many", kind=kind, address=CLUSTER_IP[version], port=PORT, count=CALLS)
    assert answer["refused"] == {}
    assert set(answer["names"]) == {"two", "three"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("version", "family"), [(4, 4), (6, 6), (4, 6)])
def test_what_a_process_sees_is_the_service(stage: Stage, version: int, family: int, kind: str) -> None:
    service = (CLUSTER_IP[version], PORT)
    stage.entries.put(1, *service, kind, stage.ends(version, "two"))
    for connected in {True, kind == "tcp"}:
        opened = stage.ask(
            "one", "open", id="x", kind=kind, address=service[0], port=PORT, family=family, connected=connected
        )
        said = stage.ask("one", "say", id="x")
        stage.ask("one", "close", id="x")
        assert (opened["refused"], said["refused"], said["name"]) == (None, None, "two")
        assert said["seen"][0] == stage.pods["one"].address(version), "the backend sees the client itself"
        if connected:
            assert same(opened["peername"], service)
            assert same(said["peername"], service)
        if kind == "udp":
            assert same(said["source"], service)


@pytest.mark.parametrize("version", FAMILIES)
def test_a_pod_reaches_itself_through_its_service(stage: Stage, version: int) -> None:
    for kind in KINDS:
        stage.entries.put(1, CLUSTER_IP[version], PORT, kind, stage.ends(version, "one"))
        answer = stage.ask("one", "many", kind=kind, address=CLUSTER_IP[version], port=PORT, count=2)
        assert (answer["names"], answer["refused"], answer["ok"]) == ({"one": 2}, {}, True)


@pytest.mark.parametrize("place", ["one", "host"])
@pytest.mark.parametrize("version", FAMILIES)
def test_a_node_port_is_at_the_nodes_addresses_alone(stage: Stage, version: int, place: str) -> None:
    for kind in KINDS:
        stage.entries.put(2, version, NODE_PORT, kind, stage.ends(version, "two"), scope=NODE)
        answer = stage.ask(place, "many", kind=kind, address=UPLINK[version], port=NODE_PORT, count=2)
        assert answer["names"] == {"two": 2}
    elsewhere = stage.pods["three"].address(version)
    answer = stage.ask(place, "many", kind="tcp", address=elsewhere, port=NODE_PORT, count=1)
    assert answer["refused"] == {"ECONNREFUSED": 1}, "by the pod's own stack"


@pytest.mark.parametrize("version", FAMILIES)
def test_no_backend_is_refused_at_once_and_counted(stage: Stage, version: int) -> None:
    before = {pod: stage.world.drops(pod).get("no_backend", 0) for pod in ("default/one", None)}
    for kind in KINDS:
        stage.entries.put(3, CLUSTER_IP[version], 81, kind, [])
        for place in ("one", "host"):
            opened = stage.ask(place, "open", id="x", kind=kind, address=CLUSTER_IP[version], port=81)
            stage.ask(place, "close", id="x")
            assert opened["refused"] == "ECONNREFUSED"
    stage.ask("one", "open", id="x", kind="udp", address=CLUSTER_IP[version], port=81, connected=False)
    assert stage.ask("one", "say", id="x")["refused"] == "ECONNREFUSED"
    stage.ask("one", "close", id="x")
    after = {pod: stage.world.drops(pod).get("no_backend", 0) for pod in ("default/one", None)}
    assert (after["default/one"] - before["default/one"], after[None] - before[None]) == (3, 2)


def test_a_client_keeps_its_backend_by_affinity(stage: Stage) -> None:
    service, ends = (CLUSTER_IP[4], PORT), stage.ends(4, "one", "two", "three")
    stage.entries.put(4, *service, "tcp", ends, affinity_s=3600)
    had = {}
    for place in ("one", "two", "host"):
        names = stage.ask(place, "many", kind="tcp", address=service[0], port=PORT, count=CALLS)["names"]
        assert len(names) == 1
        (had[place],) = names
    # What it had takes no new flows: another one, and that one from then on.
    left = [end for end in ends if end != stage.ends(4, had["one"])[0]]
    members = {end: READY if end in left else TERMINATING for end in ends}
    stage.entries.put(4, *service, "tcp", left, affinity_s=3600, members=members)
    names = stage.ask("one", "many", kind="tcp", address=service[0], port=PORT, count=CALLS)["names"]
    assert len(names) == 1
    assert had["one"] not in names


def test_affinity_ends_with_its_time(stage: Stage) -> None:
    service = (CLUSTER_IP[4], 82)
    stage.entries.put(5, *service, "tcp", stage.ends(4, "two"), affinity_s=1)
    first = stage.ask("one", "many", kind="tcp", address=service[0], port=82, count=1)["names"]
    assert first == {"two": 1}
    # Both take new flows, and only the time decides: written back instead of waited for.
    stage.entries.put(5, *service, "tcp", stage.ends(4, "two", "three"), affinity_s=1)
    stage.entries.age_affinity(5, 2)
    names: dict[str, int] = {}
    for _ in range(CALLS):
        names |= stage.ask("one", "many", kind="tcp", address=service[0], port=82, count=1)["names"]
        stage.entries.age_affinity(5, 2)
    assert set(names) == {"two", "three"}


def test_a_datagram_socket_keeps_its_backend_while_that_lives(stage: Stage) -> None:
    service, (two, three) = (CLUSTER_IP[4], 53), stage.ends(4, "two", "three")
    stage.entries.put(6, *service, "udp", [two])
    stage.ask("one", "open", id="dns", kind="udp", address=service[0], port=53, connected=False)
    assert stage.ask("one", "say", id="dns")["name"] == "two"
    stage.entries.put(6, *service, "udp", [three], members={two: TERMINATING, three: READY})
    assert stage.ask("one", "say", id="dns")["name"] == "two", "it is terminating, and keeps its flows"
    assert stage.ask("one", "many", kind="udp", address=service[0], port=53, count=4)["names"] == {"three": 4}
    stage.entries.put(6, *service, "udp", [three])
    said = stage.ask("one", "say", id="dns")
    assert (said["name"], said["source"]) == ("three", list(service)), "it has gone"
    stage.ask("one", "close", id="dns")


def test_a_backend_called_by_its_own_name_answers_under_it(stage: Stage) -> None:
    """The same socket talks to a service and then to its backend: a headless service's client does."""
    service, (two,) = (CLUSTER_IP[4], 53), stage.ends(4, "two")
    stage.entries.put(6, *service, "udp", [two])
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)\n"
        f"for end in ({service!r}, {two!r}, {service!r}):\n"
        "    s.sendto(b'who', end); source = s.recvfrom(999)[1]; assert source == end, (source, end)\n"
    )
    stage.pods["one"].pod.running.exec([sys.executable, "-I", "-S", "-E", "-c", script])


def test_nobody_else_on_the_machine_meets_services(stage: Stage) -> None:
    """This very process is in another namespace than the host's agent and its pods: the machine's."""
    stage.entries.put(3, CLUSTER_IP[4], 81, "udp", [])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        stage.entries.put(7, "127.0.0.1", 1, "udp", stage.ends(4, "two"))
        sock.connect(("127.0.0.1", 1))
        assert sock.getpeername() == ("127.0.0.1", 1)


def test_links_are_adopted_replaced_and_gone_with_the_pods_flows_untouched() -> None:
    with World.start("sockets") as world:
        one, two = (world.add(world.pod(name)) for name in ("one", "two"))
        for attached in (one, two):
            attached.pod.start()
        callers = {a.pod.name: caller(world, a.pod.name, a.pod.running) for a in (one, two)}
        host = caller(world, "host", world.host)
        callers["two"].ask("serve", name="two", port=TARGET_PORT)
        service = (CLUSTER_IP[4], PORT)
        with ServiceEntries(world.host.path(PINS)) as entries:
            entries.put(1, *service, "tcp", [(two.address(4), TARGET_PORT)])
        assert host.ask("many", kind="tcp", address=service[0], port=PORT, count=1)["names"] == {"two": 1}
        callers["one"].ask("open", id="long", kind="tcp", address=service[0], port=PORT)

        before = attached_programs(world)
        assert len(before) == 8
        world.host.kill_agent()
        assert attached_programs(world) == before
        assert host.ask("many", kind="tcp", address=service[0], port=PORT, count=1)["names"] == {"two": 1}
        with world.datapath() as datapath:
            datapath.enter_namespace(1 << 60, 4711)  # of a pod of whose end nobody was told
        world.start_agent()
        assert attached_programs(world) == before
        known = sorted([0, *(row["id"] for row in world.status()["attachments"])])
        with world.datapath() as datapath:
            assert sorted(datapath.namespaces().values()) == known
        world.delete(two)
        with world.datapath() as datapath:
            assert sorted(datapath.namespaces().values()) == known[:-1]
        world.host.stop_agent()
        world.host.uninstall()
        assert attached_programs(world) == {}
        # Nothing looks at the host's sockets any more: there is no route to that address but the default one.
        assert "rdmanet" not in world.host.exec(["ip", "link"]).stdout


def attached_programs(world: World) -> dict[str, str]:
    """What the pinned links hold."""
    pins = world.host.path(PINS)
    return sockets.attached(pins) if pins.exists() else {}
