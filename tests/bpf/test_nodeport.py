"""NodePorts and external IPs at the uplink, packet by packet: which backend, whose address is seen, what is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from rdmanet.datapath import bpf
from rdmanet.datapath.maps import Datapath
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, UNSPEC, Bench, Outcome, pod_frame, uplink_frame
from testbed.bpf.lab import FAR, UPLINK, Pod
from testbed.bpf.packets import ACK, RST, SYN, TCP, UDP, Ip
from testbed.service_entries import MAGLEV_PLACES, OUTSIDE, ServiceEntries
from tests.bpf.flows import entries

VERSIONS = (4, 6)
KINDS = {"tcp": TCP, "udp": UDP}
EXTERNAL = {4: "192.0.2.77", 6: "2001:db8:77::77"}
NODE_PORT, PORT, TARGET_PORT = 30080, 80, 8080
CLIENT_PORT = 40000


@pytest.fixture
def entered(bench: Bench) -> Iterator[ServiceEntries]:
    """The bench as a node that has services, without any yet."""
    for name in ("services", "backends", "members", "affinity"):
        bench.clear(name)
    bench.datapath.change_node(lambda node: replace(node, maglev_size=MAGLEV_PLACES))
    with ServiceEntries(bench.lab.pins) as found:
        yield found


def ends(version: int, *pods: Pod) -> list[tuple[str, int]]:
    return [(pod.addresses[version], TARGET_PORT) for pod in pods]


def segment(kind: str, source: int, destination: int, flags: int = SYN) -> bytes:
    if kind == "tcp":
        return packets.tcp(source, destination, flags)
    return packets.udp(source, destination, b"question")


def call(
    bench: Bench, kind: str, address: str, port: int, *, client_port: int = CLIENT_PORT, flags: int = SYN
) -> Outcome:
    version = 6 if ":" in address else 4
    payload = segment(kind, client_port, port, flags)
    return bench.from_outside(uplink_frame(Ip(FAR[version], address, KINDS[kind], payload)))


def answer(bench: Bench, pod: Pod, kind: str, version: int, *, client_port: int = CLIENT_PORT) -> Outcome:
    payload = segment(kind, TARGET_PORT, client_port, SYN | ACK)
    return bench.from_pod(pod, pod_frame(pod, Ip(pod.addresses[version], FAR[version], KINDS[kind], payload)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["node port", "external IP"])
def test_there_and_back(bench: Bench, entered: ServiceEntries, kind: str, version: int, way: str) -> None:
    web = bench.web
    where: str | int = version if way == "node port" else EXTERNAL[version]
    address, port = (UPLINK[version], NODE_PORT) if way == "node port" else (EXTERNAL[version], PORT)
    entered.put(7, where, port, kind, ends(version, web), scope=OUTSIDE)
    there = call(bench, kind, address, port)
    assert there.verdict == REDIRECT, there.drops
    seen = packets.look(there.frame)
    assert (seen.source, seen.destination) == (FAR[version], web.addresses[version])
    assert (seen.source_port, seen.destination_port) == (CLIENT_PORT, TARGET_PORT)
    assert there.counters == {(web.id, "to_pod", "ip"): 1}
    inside, alias = entries(bench)
    assert (inside.alias, alias.alias, alias.fields["origin"]) == (False, True, 7)

    back = answer(bench, web, kind, version)
    assert back.verdict == REDIRECT, back.drops
    seen = packets.look(back.frame)
    assert (seen.source, seen.destination) == (address, FAR[version])
    assert (seen.source_port, seen.destination_port) == (port, CLIENT_PORT)
    assert call(bench, kind, address, port, flags=ACK).verdict == REDIRECT
    assert len(entries(bench)) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_each_place_of_the_table_is_its_backend(bench: Bench, entered: ServiceEntries, version: int) -> None:
    """Clients spread, and one that calls again from the same port, after a start, has the same backend."""
    pods = (bench.train_0, bench.train_1, bench.web)
    entered.put(7, version, NODE_PORT, "tcp", ends(version, *pods), scope=OUTSIDE)

    def chosen(port: int) -> str:
        outcome = call(bench, "tcp", UPLINK[version], NODE_PORT, client_port=port)
        assert outcome.verdict == REDIRECT, outcome.drops
        return packets.look(outcome.frame).destination

    first = {port: chosen(port) for port in range(CLIENT_PORT, CLIENT_PORT + 60)}
    assert set(first.values()) == {pod.addresses[version] for pod in pods}
    bench.clear("flows")
    assert {port: chosen(port) for port in first} == first


def test_what_is_no_service_is_the_hosts(bench: Bench, entered: ServiceEntries) -> None:
    entered.put(7, 4, NODE_PORT, "tcp", ends(4, bench.web), scope=OUTSIDE)
    for kind, address, port in (
        ("tcp", UPLINK[4], NODE_PORT + 1),
        ("udp", UPLINK[4], NODE_PORT),
        ("tcp", EXTERNAL[4], NODE_PORT),
        ("tcp", UPLINK[6], NODE_PORT),
    ):
        outcome = call(bench, kind, address, port)
        assert (outcome.verdict, outcome.drops) == (UNSPEC, {})
    assert call(bench, "tcp", UPLINK[4], NODE_PORT, flags=RST).verdict == UNSPEC
    assert not entries(bench)


@pytest.mark.parametrize("version", VERSIONS)
def test_no_backend_is_dropped_by_name(bench: Bench, entered: ServiceEntries, version: int) -> None:
    entered.put(7, version, NODE_PORT, "tcp", [], scope=OUTSIDE)
    assert call(bench, "tcp", UPLINK[version], NODE_PORT).reason == "no_backend"
    nobody = ("10.90.0.99" if version == 4 else "fd90::99", TARGET_PORT)
    entered.put(7, version, NODE_PORT, "tcp", [nobody], scope=OUTSIDE)
    assert call(bench, "tcp", UPLINK[version], NODE_PORT).reason == "no_backend"
    assert not entries(bench)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_backend_where_ones_end_is_taken(bench: Bench, entered: ServiceEntries, version: int) -> None:
    """From one port a client calls two services with the same backends: answers of one and the same backend to both
    could not be told apart."""
    pods = (bench.web, bench.train_0)
    entered.put(7, version, NODE_PORT, "udp", ends(version, *pods), scope=OUTSIDE)
    entered.put(8, EXTERNAL[version], PORT, "udp", ends(version, *pods), scope=OUTSIDE)
    for port in range(CLIENT_PORT, CLIENT_PORT + 20):
        chosen = []
        for address, service_port in ((UPLINK[version], NODE_PORT), (EXTERNAL[version], PORT)):
            outcome = call(bench, "udp", address, service_port, client_port=port)
            if outcome.verdict == REDIRECT:
                chosen.append(packets.look(outcome.frame).destination)
        assert len(chosen) == len(set(chosen))
        assert chosen
    dropped = {reason for (_, reason), count in bench.datapath.drops().items() if count}
    assert dropped <= {"service_conflict"}


def test_the_only_backends_taken_end_is_a_conflict(bench: Bench, entered: ServiceEntries) -> None:
    entered.put(7, 4, NODE_PORT, "udp", ends(4, bench.web), scope=OUTSIDE)
    entered.put(8, EXTERNAL[4], PORT, "udp", ends(4, bench.web), scope=OUTSIDE)
    assert call(bench, "udp", UPLINK[4], NODE_PORT).verdict == REDIRECT
    before = [entry.key for entry in entries(bench)]
    outcome = call(bench, "udp", EXTERNAL[4], PORT)
    assert (outcome.verdict, outcome.reason) == (SHOT, "service_conflict")
    assert [entry.key for entry in entries(bench)] == before
    assert call(bench, "udp", UPLINK[4], NODE_PORT).verdict == REDIRECT, "the first one goes on"


def test_datagrams_leave_a_dead_backend_and_streams_stay(bench: Bench, entered: ServiceEntries) -> None:
    both = ends(4, bench.web, bench.train_0)
    for number, kind in ((7, "udp"), (8, "tcp")):
        entered.put(number, 4, NODE_PORT, kind, both[:1], scope=OUTSIDE)
        assert packets.look(call(bench, kind, UPLINK[4], NODE_PORT).frame).destination == bench.web.addresses[4]
        entered.put(number, 4, NODE_PORT, kind, both[1:], scope=OUTSIDE)
    after = {kind: packets.look(call(bench, kind, UPLINK[4], NODE_PORT, flags=ACK).frame).destination for kind in KINDS}
    assert after == {"udp": bench.train_0.addresses[4], "tcp": bench.web.addresses[4]}


def test_no_roce_past_the_guard(bench: Bench, entered: ServiceEntries) -> None:
    entered.put(7, 4, NODE_PORT, "udp", [(bench.train_0.addresses[4], 4791)], scope=OUTSIDE)
    assert call(bench, "udp", UPLINK[4], NODE_PORT).reason == "roce_nat"


def test_a_node_without_such_services_does_not_look(bench: Bench, entered: ServiceEntries) -> None:
    entered.put(7, 4, NODE_PORT, "tcp", ends(4, bench.web), scope=OUTSIDE)
    bench.datapath.change_node(lambda node: replace(node, maglev_size=0))
    assert call(bench, "tcp", UPLINK[4], NODE_PORT).verdict == UNSPEC


def test_a_swap_carries_it_on(bench: Bench, entered: ServiceEntries) -> None:
    """Entries are the maps', not the program's."""
    entered.put(7, 4, NODE_PORT, "tcp", ends(4, bench.web), scope=OUTSIDE)
    assert call(bench, "tcp", UPLINK[4], NODE_PORT).verdict == REDIRECT
    assert isinstance(bench.datapath, Datapath)
    with bench.empty_slot("nodeport"):
        assert call(bench, "tcp", UPLINK[4], NODE_PORT, flags=ACK).verdict == REDIRECT, "known flows need no backend"
        assert call(bench, "tcp", UPLINK[4], NODE_PORT, client_port=CLIENT_PORT + 1).verdict == UNSPEC
    assert bpf.lookup(bench.map("programs"), bytes([4, 0, 0, 0]), 4)
