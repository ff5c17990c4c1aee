"""Masquerading: out through the pod program, back through the uplink program, with checksums verified each time."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import replace

import pytest

from rdmanet.datapath import bpf
from rdmanet.datapath.maps import EndpointEntry, NodeEntry
from rdmanet.model import address_key
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, UNSPEC, Bench, Outcome, pod_frame, uplink_frame
from testbed.bpf.lab import FAR, FIRST_PORT, GATEWAY_MAC, LAST_PORT, UPLINK, Pod
from testbed.bpf.packets import ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP, Ip, Seen
from tests.bpf.flows import entries

VERSIONS = (4, 6)
#: Protocol by IP version, request and answer: ports or identifiers are filled in.
FLOWS = {
    "tcp": {4: TCP, 6: TCP},
    "udp": {4: UDP, 6: UDP},
    "echo": {4: ICMP, 6: ICMPV6},
}
PORT, REMOTE_PORT = 40000, 7000


def request(kind: str, version: int, port: int = PORT, flags: int = ACK, payload: bytes = b"request") -> bytes:
    if kind == "tcp":
        return packets.tcp(port, REMOTE_PORT, flags, payload)
    if kind == "udp":
        return packets.udp(port, REMOTE_PORT, payload)
    return packets.icmp(8 if version == 4 else 128, port, payload)


def answer(kind: str, version: int, port: int, flags: int = ACK) -> bytes:
    if kind == "tcp":
        return packets.tcp(REMOTE_PORT, port, flags, b"answer")
    if kind == "udp":
        return packets.udp(REMOTE_PORT, port, b"answer")
    return packets.icmp(0 if version == 4 else 129, port, b"answer")


def out(bench: Bench, pod: Pod, kind: str, version: int, *, port: int = PORT, flags: int = ACK) -> Outcome:
    payload = request(kind, version, port, flags)
    return bench.from_pod(pod, pod_frame(pod, Ip(pod.addresses[version], FAR[version], FLOWS[kind][version], payload)))


def back(bench: Bench, kind: str, version: int, port: int, *, flags: int = ACK) -> Outcome:
    payload = answer(kind, version, port, flags)
    return bench.from_outside(uplink_frame(Ip(FAR[version], UPLINK[version], FLOWS[kind][version], payload)))


def outside_port(outcome: Outcome) -> int:
    assert outcome.verdict == REDIRECT, outcome.drops
    port = packets.look(outcome.frame).source_port
    assert FIRST_PORT <= port <= LAST_PORT
    return port


def only_port(bench: Bench, first: int, last: int | None = None) -> None:
    last = first if last is None else last
    bench.datapath.configure(NodeEntry(GATEWAY_MAC, bench.lab.host_ifindex, True, first, last))


def lose(bench: Bench, *, alias: bool) -> None:
    """Removes one half of every flow."""
    for entry in entries(bench):
        if entry.alias is alias:
            bpf.delete(bench.map("flows"), entry.key)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_there_and_back(bench: Bench, kind: str, version: int) -> None:
    web = bench.web
    there = out(bench, web, kind, version)
    port = outside_port(there)
    seen = packets.look(there.frame)
    assert (seen.source, seen.destination, seen.hop_limit) == (UPLINK[version], FAR[version], 63)
    expected = request(kind, version, port)
    hide = {"tcp": (16, 18), "udp": (6, 8), "echo": (2, 4)}[kind]  # the checksum, which look() has verified
    assert _without(seen.transport, hide) == _without(expected, hide)
    assert there.counters == {(web.id, "from_pod", "ip"): 1}

    here = back(bench, kind, version, port)
    assert here.verdict == REDIRECT
    seen = packets.look(here.frame)
    assert seen == replace(
        seen,
        destination_mac=web.mac,
        source_mac=GATEWAY_MAC,
        source=FAR[version],
        destination=web.addresses[version],
    )
    assert _without(seen.transport, hide) == _without(answer(kind, version, PORT), hide)
    assert here.counters == {(web.id, "to_pod", "ip"): 1}


def _without(transport: bytes, hide: tuple[int, int]) -> bytes:
    return transport[: hide[0]] + transport[hide[1] :]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_keeps_its_port_and_others_get_their_own(bench: Bench, kind: str, version: int) -> None:
    first = outside_port(out(bench, bench.web, kind, version))
    assert outside_port(out(bench, bench.web, kind, version)) == first
    others = {outside_port(out(bench, bench.web, kind, version, port=PORT + n)) for n in range(1, 20)}
    others.add(outside_port(out(bench, bench.train_0, kind, version)))
    assert len(others) == 20
    assert first not in others


def test_udp_without_checksum_stays_without(bench: Bench) -> None:
    web = bench.web
    ip = Ip(web.addresses[4], FAR[4], UDP, packets.udp(PORT, REMOTE_PORT), udp_checksum=False)
    outcome = bench.from_pod(web, pod_frame(web, ip))
    port = outside_port(outcome)
    assert packets.look(outcome.frame).transport[6:8] == b"\0\0"
    ip = Ip(FAR[4], UPLINK[4], UDP, packets.udp(REMOTE_PORT, port), udp_checksum=False)
    outcome = bench.from_outside(uplink_frame(ip))
    assert outcome.verdict == REDIRECT
    assert packets.look(outcome.frame).transport[6:8] == b"\0\0"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_udp_checksum_that_becomes_zero_is_sent_as_ones(bench: Bench, version: int) -> None:
    """RFC 768: zero would mean that there is none; the payload is chosen so that the sum comes out as zero."""
    web = bench.web
    port = outside_port(out(bench, web, "udp", version))
    translated = Ip(UPLINK[version], FAR[version], UDP, packets.udp(port, REMOTE_PORT, b"\0\0"))
    rest = int.from_bytes(translated.transport()[6:8], "big")
    payload = packets.udp(PORT, REMOTE_PORT, struct.pack("!H", rest))
    outcome = bench.from_pod(web, pod_frame(web, Ip(web.addresses[version], FAR[version], UDP, payload)))
    seen = packets.look(outcome.frame)
    assert seen.source_port == port
    assert seen.transport[6:8] == b"\xff\xff"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_answers_for_others_go_to_the_host(bench: Bench, kind: str, version: int) -> None:
    port = outside_port(out(bench, bench.web, kind, version))
    assert back(bench, kind, version, port + 1 if port < LAST_PORT else port - 1).verdict == UNSPEC
    stranger = {4: "203.0.113.77", 6: "2001:db8:200::77"}[version]
    payload = answer(kind, version, port)
    outcome = bench.from_outside(uplink_frame(Ip(stranger, UPLINK[version], FLOWS[kind][version], payload)))
    assert outcome.verdict == UNSPEC


@pytest.mark.parametrize("version", VERSIONS)
def test_an_answer_for_a_pod_that_is_gone_goes_to_the_host(bench: Bench, version: int) -> None:
    web = bench.web
    port = outside_port(out(bench, web, "udp", version))
    key = address_key(web.addresses[version])
    bench.datapath.delete_endpoint(key)
    assert back(bench, "udp", version, port).verdict == UNSPEC
    assert entries(bench) == []
    # Another pod has the address by now.
    bench.lab.write_entries(web)
    assert outside_port(out(bench, web, "udp", version)) == port
    assert back(bench, "udp", version, port).verdict == REDIRECT
    bench.datapath.set_endpoint(key, EndpointEntry(bench.train_0.ifindex, bench.train_0.mac, 99))
    assert back(bench, "udp", version, port).verdict == UNSPEC
    assert entries(bench) == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_a_pod_does_not_inherit_the_flows_of_its_address(bench: Bench, kind: str, version: int) -> None:
    web = bench.web
    outside_port(out(bench, web, kind, version))
    (entry, _) = entries(bench)
    entry.write(bench, origin=99)
    outside_port(out(bench, web, kind, version))
    (entry, alias) = entries(bench)
    assert entry.fields["origin"] == alias.fields["origin"] == web.id


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_a_full_port_range_is_refused_by_name(bench: Bench, kind: str, version: int) -> None:
    only_port(bench, FIRST_PORT)
    assert outside_port(out(bench, bench.web, kind, version)) == FIRST_PORT
    outcome = out(bench, bench.train_0, kind, version)
    assert (outcome.verdict, outcome.drops) == (SHOT, {(bench.train_0.id, "nat_no_port"): 1})
    # Another destination has its own ports.
    other = {4: "203.0.113.9", 6: "2001:db8:200::9"}[version]
    ip = Ip(bench.train_0.addresses[version], other, FLOWS[kind][version], request(kind, version))
    assert outside_port(bench.from_pod(bench.train_0, pod_frame(bench.train_0, ip))) == FIRST_PORT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_ports_of_the_hosts_own_sockets_are_left_alone(bench: Bench, kind: str, version: int) -> None:
    only_port(bench, FIRST_PORT, FIRST_PORT + 1)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    listener = bench.lab.host.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    with listener:
        listener.bind(("", FIRST_PORT))
        if kind == "tcp":
            listener.listen()
        taken = {outside_port(out(bench, bench.web, kind, version, port=PORT + n)) for n in range(1)}
        assert taken == {FIRST_PORT + 1}
        outcome = out(bench, bench.train_0, kind, version)
        assert outcome.drops == {(bench.train_0.id, "nat_no_port"): 1}
    bench.clear("drops")
    assert outside_port(out(bench, bench.train_0, kind, version)) == FIRST_PORT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_both_halves_live_and_die_together(bench: Bench, kind: str, version: int) -> None:
    """A half that lost the other is removed by who meets it; the flow then begins anew, at the same port."""
    port = outside_port(out(bench, bench.web, kind, version))
    assert [entry.alias for entry in entries(bench)] == [False, True]
    lose(bench, alias=True)
    assert back(bench, kind, version, port).verdict == UNSPEC
    assert outside_port(out(bench, bench.web, kind, version)) == port
    assert [entry.alias for entry in entries(bench)] == [False, True]
    assert back(bench, kind, version, port).verdict == REDIRECT
    lose(bench, alias=False)
    assert back(bench, kind, version, port).verdict == UNSPEC
    assert entries(bench) == []
    assert outside_port(out(bench, bench.web, kind, version)) == port
    lose(bench, alias=False)
    assert outside_port(out(bench, bench.web, kind, version)) == port
    assert [entry.alias for entry in entries(bench)] == [False, True]
    assert back(bench, kind, version, port).verdict == REDIRECT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("taker", [("train_0", PORT), ("web", PORT + 1)], ids=["another-pod", "another-flow"])
def test_a_port_that_went_to_another_is_not_used_any_more(bench: Bench, version: int, taker: tuple[str, int]) -> None:
    only_port(bench, FIRST_PORT)
    assert outside_port(out(bench, bench.web, "udp", version)) == FIRST_PORT
    lose(bench, alias=True)
    assert outside_port(out(bench, getattr(bench, taker[0]), "udp", version, port=taker[1])) == FIRST_PORT
    outcome = out(bench, bench.web, "udp", version)
    assert outcome.drops == {(bench.web.id, "nat_no_port"): 1}
    # What was left of it is gone.
    assert [entry.alias for entry in entries(bench)] == [False, True]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mac", [b"\xff" * 6, bytes.fromhex("02aabbccddee")], ids=["broadcast", "another-host"])
def test_answers_to_other_macs_are_not_ours(bench: Bench, version: int, mac: bytes) -> None:
    """A device in promiscuous mode shows them; the stack would ignore them too."""
    port = outside_port(out(bench, bench.web, "udp", version))
    ip = Ip(FAR[version], UPLINK[version], UDP, answer("udp", version, port))
    assert bench.from_outside(uplink_frame(ip)).verdict == REDIRECT
    assert bench.from_outside(mac + uplink_frame(ip)[6:]).verdict == UNSPEC


@pytest.mark.parametrize("version", VERSIONS)
def test_another_uplink_address_gives_a_new_flow(bench: Bench, version: int) -> None:
    port = outside_port(out(bench, bench.web, "udp", version))
    new = {4: "198.51.100.77", 6: "2001:db8:100::77"}[version]
    uplink = bench.datapath.uplinks()[bench.lab.uplink_ifindex]
    key = address_key(new)
    changed = replace(uplink, ipv4=key) if version == 4 else replace(uplink, ipv6=key)
    bench.datapath.set_uplink(bench.lab.uplink_ifindex, changed)
    outcome = out(bench, bench.web, "udp", version)
    outside_port(outcome)
    assert packets.look(outcome.frame).source == new
    # The old address is not the uplink's any more.
    assert back(bench, "udp", version, port).verdict == UNSPEC


CLOSED, OPEN = 3, 0


@pytest.mark.parametrize(
    ("sent", "closing"),
    [
        ([("out", SYN), ("back", SYN | ACK), ("out", ACK)], OPEN),
        ([("out", SYN), ("out", FIN | ACK)], 1),
        ([("out", SYN), ("back", FIN | ACK)], 2),
        ([("out", SYN), ("out", FIN | ACK), ("back", FIN | ACK), ("out", ACK)], CLOSED),
        ([("out", SYN), ("out", RST)], CLOSED),
        ([("out", SYN), ("back", RST | ACK)], CLOSED),
        ([("out", SYN), ("back", RST | ACK), ("out", SYN)], OPEN),
    ],
)
def test_closing_of_tcp_flows_is_seen(bench: Bench, sent: list[tuple[str, int]], closing: int) -> None:
    port = 0
    for direction, flags in sent:
        if direction == "out":
            port = outside_port(out(bench, bench.web, "tcp", 4, flags=flags))
        else:
            assert back(bench, "tcp", 4, port, flags=flags).verdict == REDIRECT
    inside, alias = entries(bench)
    assert inside.fields["closing"] == closing
    assert alias.fields["closing"] == OPEN  # state is in the inside half alone


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kind", "closing", "replied", "timeout_s"),
    [
        ("echo", OPEN, False, 60),
        ("echo", OPEN, True, 60),
        ("udp", OPEN, False, 120),
        ("udp", OPEN, True, 300),
        ("tcp", OPEN, False, 240),
        ("tcp", OPEN, True, 7440),
        ("tcp", 1, True, 7440),
        ("tcp", CLOSED, True, 60),
    ],
)
def test_a_flow_is_stale_by_its_state(
    bench: Bench, kind: str, closing: int, replied: bool, timeout_s: int, version: int
) -> None:
    """Its port can be had by another, its answers are not its own any more, and both halves are gone."""
    only_port(bench, FIRST_PORT)
    outside_port(out(bench, bench.web, kind, version))
    if replied:
        assert back(bench, kind, version, FIRST_PORT).verdict == REDIRECT
    inside, _ = entries(bench)
    inside.write(bench, last_seen_ns=time.monotonic_ns() - (timeout_s - 10) * 10**9, closing=closing)
    assert out(bench, bench.train_0, kind, version).drops == {(bench.train_0.id, "nat_no_port"): 1}
    stale_ns = time.monotonic_ns() - (timeout_s + 5) * 10**9
    inside.write(bench, last_seen_ns=stale_ns, closing=closing)
    assert outside_port(out(bench, bench.train_0, kind, version)) == FIRST_PORT
    inside, alias = entries(bench)
    seen = packets.look(back(bench, kind, version, FIRST_PORT).frame)
    assert seen.destination == bench.train_0.addresses[version]
    assert inside.fields["origin"] == alias.fields["origin"] == bench.train_0.id
    assert (bench.flow_count(bench.web), bench.flow_count(bench.train_0)) == (0, 1)
    # Nor does an answer bring a stale flow back.
    inside.write(bench, last_seen_ns=stale_ns, closing=closing)
    assert back(bench, kind, version, FIRST_PORT).verdict == UNSPEC
    assert entries(bench) == []
    assert bench.flow_count(bench.train_0) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_port_4791_never_becomes_a_destination_through_nat(bench: Bench, version: int) -> None:
    """Answers to it would come into the pod as RoCE that no guard has judged."""
    pod = bench.train_0
    ip = Ip(pod.addresses[version], FAR[version], UDP, packets.udp(packets.ROCE_PORT, 53))
    assert bench.from_pod(pod, pod_frame(pod, ip)).drops == {(pod.id, "roce_nat"): 1}


def test_options_and_extension_headers_do_not_disturb(bench: Bench) -> None:
    web = bench.web
    payload = packets.udp(PORT, REMOTE_PORT)
    frame = bench.from_pod(web, pod_frame(web, Ip(web.addresses[4], FAR[4], UDP, payload, options=b"\x01" * 8))).frame
    assert packets.checksum(frame[14:42]) == 0
    covered = packets.pseudo_header(UPLINK[4], FAR[4], UDP, len(payload)) + frame[42:]
    assert packets.checksum(covered) == 0
    assert frame[42:44] != struct.pack("!H", PORT)

    ip = Ip(web.addresses[6], FAR[6], UDP, payload, options=packets.extension(UDP), first=packets.DESTINATION)
    frame = bench.from_pod(web, pod_frame(web, ip)).frame
    covered = packets.pseudo_header(UPLINK[6], FAR[6], UDP, len(payload)) + frame[62:]
    assert packets.checksum(covered) == 0


def test_many_flows_share_a_range(bench: Bench) -> None:
    """A thousand ports for one destination: at four fifths full, 16 tries nearly always find one."""
    refused = 0
    seen: set[int] = set()
    for number in range(800):
        outcome = out(bench, bench.web, "udp", 4, port=10000 + number)
        if outcome.verdict == REDIRECT:
            port = outside_port(outcome)
            assert port not in seen
            seen.add(port)
        else:
            assert outcome.reason == "nat_no_port"
            refused += 1
    assert refused <= 8
    assert isinstance(packets.look(outcome.frame), Seen)
