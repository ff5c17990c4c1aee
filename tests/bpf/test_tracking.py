"""Flows that keep their addresses: from pod to pod and from the host to a pod, their fragments and ICMP errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from rdmanet.datapath import bpf, tables
from rdmanet.model import GuardEntry, GuardState, address_key
from testbed.bpf import lab, packets
from testbed.bpf.bench import REDIRECT, SHOT, Bench, Outcome, between, host_frame, pod_frame, rewritten
from testbed.bpf.lab import FAR, GATEWAYS, Pod
from testbed.bpf.packets import ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP, Ip
from tests.bpf.flows import ORIGIN_IS_HIGH, REPLIED, Entry, entries

VERSIONS = (4, 6)
SCTP, GRE = 132, 47
A_PORT, B_PORT = 40000, 80
OPEN, ORIGIN, TARGET, BOTH = 0, 1, 2, 3  # struct flow_entry.closing


@dataclass(frozen=True)
class Kind:
    """A protocol's packets from A's port to B's, and back."""

    there: dict[int, tuple[int, bytes]]
    back: dict[int, tuple[int, bytes]]
    ports: tuple[int, int] = (A_PORT, B_PORT)


def _alike(protocol: int, there: bytes, back: bytes, ports: tuple[int, int] = (A_PORT, B_PORT)) -> Kind:
    return Kind(dict.fromkeys(VERSIONS, (protocol, there)), dict.fromkeys(VERSIONS, (protocol, back)), ports)


def _ports(first: int, second: int) -> bytes:
    return first.to_bytes(2, "big") + second.to_bytes(2, "big")


KINDS = {
    "tcp": _alike(TCP, packets.tcp(A_PORT, B_PORT), packets.tcp(B_PORT, A_PORT)),
    "udp": _alike(UDP, packets.udp(A_PORT, B_PORT), packets.udp(B_PORT, A_PORT)),
    "sctp": _alike(SCTP, _ports(A_PORT, B_PORT) + bytes(12), _ports(B_PORT, A_PORT) + bytes(12)),
    "gre": _alike(GRE, bytes(8), bytes(8), (0, 0)),
    "echo": Kind(
        {4: (ICMP, packets.icmp(8, 7)), 6: (ICMPV6, packets.icmp(128, 7))},
        {4: (ICMP, packets.icmp(0, 7)), 6: (ICMPV6, packets.icmp(129, 7))},
        (7, 0),
    ),
}


def send(bench: Bench, source: Pod, target: Pod, version: int, protocol: int, payload: bytes) -> Outcome:
    return bench.from_pod(source, pod_frame(source, between(source, target, version, protocol, payload)))


def passed(outcome: Outcome) -> bool:
    assert (outcome.verdict == REDIRECT) == (not outcome.drops)
    return outcome.verdict == REDIRECT


def only(bench: Bench) -> Entry:
    (entry,) = entries(bench)
    return entry


def end(address: str, port: int) -> tuple[bytes, bytes]:
    return address_key(address), port.to_bytes(2, "big")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [("train_0", "web"), ("web", "train_0")])
def test_both_directions_meet_one_entry(bench: Bench, ends: tuple[str, str], kind: str, version: int) -> None:
    """Whichever end is the higher one."""
    a, b = (getattr(bench, name) for name in ends)
    about = KINDS[kind]
    assert passed(send(bench, a, b, version, *about.there[version]))
    entry = only(bench)
    low, high = sorted([end(a.addresses[version], about.ports[0]), end(b.addresses[version], about.ports[1])])
    assert tables.FLOW_KEY.unpack(entry.key) == (low[0], high[0], low[1], high[1], about.there[version][0])
    began_high = high[0] == address_key(a.addresses[version])
    assert entry.fields == {
        **entry.fields,
        "origin": a.id,
        "target": b.id,
        "slot": bench.slot_of(a),
        "flags": ORIGIN_IS_HIGH if began_high else 0,
        "closing": OPEN,
        "translated": bytes(16),
    }
    assert passed(send(bench, b, a, version, *about.back[version]))
    assert passed(send(bench, a, b, version, *about.there[version]))
    assert only(bench).fields["flags"] == int(entry.fields["flags"]) | REPLIED
    assert (bench.flow_count(a), bench.flow_count(b)) == (1, 0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ends", [("train_0", "web"), ("web", "train_0")])
@pytest.mark.parametrize("asked", [0, 1, 2, 3, 0xFFFF])
def test_an_echo_request_is_nobodys_answer(bench: Bench, asked: int, ends: tuple[str, str], version: int) -> None:
    """Whatever its identifier is, also that of a request the other way."""
    a, b = (getattr(bench, name) for name in ends)
    (protocol, _), (request, reply) = KINDS["echo"].there[version], (8, 0) if version == 4 else (128, 129)
    assert passed(send(bench, a, b, version, protocol, packets.icmp(request, asked)))
    before = only(bench)
    for number, identifier in enumerate((0, 1, 2, 3, 0xFFFF), 2):
        assert passed(send(bench, b, a, version, protocol, packets.icmp(request, identifier)))
        assert len(entries(bench)) == number, "a flow of its own"
    (first,) = (entry for entry in entries(bench) if entry.key == before.key)
    assert first.fields["flags"] == before.fields["flags"], "the other requests were answers"
    assert passed(send(bench, b, a, version, protocol, packets.icmp(reply, asked)))
    assert len(entries(bench)) == 6


@pytest.mark.parametrize("version", VERSIONS)
def test_other_ports_and_protocols_are_other_flows(bench: Bench, version: int) -> None:
    for number, payload in enumerate((packets.udp(1, 2), packets.udp(1, 3), packets.udp(2, 1), packets.udp(3, 2)), 1):
        assert passed(send(bench, bench.train_0, bench.web, version, UDP, payload))
        assert len(entries(bench)) == number
    assert passed(send(bench, bench.train_0, bench.web, version, TCP, packets.tcp(1, 2)))
    assert passed(send(bench, bench.train_1, bench.web, version, UDP, packets.udp(1, 2)))
    assert len(entries(bench)) == 6


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_host_begins_takes_of_the_pods_share(bench: Bench, kind: str, version: int) -> None:
    protocol, payload = KINDS[kind].there[version]
    frame = host_frame(Ip(GATEWAYS[version], bench.web.addresses[version], protocol, payload))
    for _ in range(2):
        outcome = bench.from_host(frame)
        assert (outcome.verdict, outcome.frame) == (REDIRECT, rewritten(frame, bench.web.mac))
        assert outcome.counters == {(bench.web.id, "to_pod", "ip"): 1}
    fields = only(bench).fields
    assert (fields["origin"], fields["target"]) == (0, bench.web.id)
    assert bench.flow_count(bench.web) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pods_share_of_the_table(bench: Bench, version: int) -> None:
    """Known flows go on, others are refused by name, and nobody else notices."""
    a, b = bench.train_0, bench.web
    bench.datapath.change_node(lambda node: replace(node, max_flows_per_pod=2))
    assert passed(send(bench, a, b, version, UDP, packets.udp(1, 2)))
    assert passed(send(bench, a, b, version, UDP, packets.udp(2, 2)))
    refused = send(bench, a, b, version, UDP, packets.udp(3, 2))
    assert (refused.verdict, refused.drops, refused.counters) == (SHOT, {(a.id, "flow_limit"): 1}, {})
    assert passed(send(bench, a, b, version, UDP, packets.udp(1, 2)))
    assert passed(send(bench, b, a, version, UDP, packets.udp(2, 3)))
    assert bench.flow_count(a) == 2
    # What the host begins is of the share of the pod that it goes to.
    frame = host_frame(Ip(GATEWAYS[version], a.addresses[version], UDP, packets.udp(1, 2)))
    assert bench.from_host(frame).drops == {(a.id, "flow_limit"): 1}
    assert passed(send(bench, b, a, version, UDP, packets.udp(3, 2)))
    bench.datapath.change_node(lambda node: replace(node, max_flows_per_pod=0))
    assert passed(send(bench, a, b, version, UDP, packets.udp(3, 2)))


TABLE = 64


@pytest.fixture(scope="module")
def little() -> Iterator[Bench]:
    """A bench with a small table of flows."""
    lab.require_root()
    artifact = lab.artifact()
    flows = replace(artifact.maps["flows"], max_entries=TABLE)
    with Bench.build(replace(artifact, maps={**artifact.maps, "flows": flows})) as bench:
        yield bench


@pytest.mark.parametrize("version", VERSIONS)
def test_a_full_table_refuses_new_flows_and_keeps_old_ones(little: Bench, version: int) -> None:
    little.reset()
    a, b = little.train_0, little.web
    outcomes = [send(little, a, b, version, UDP, packets.udp(port, 7)) for port in range(1, TABLE + 20)]
    known = [port for port, outcome in enumerate(outcomes, 1) if outcome.verdict == REDIRECT]
    assert len(known) == len(entries(little)) == little.flow_count(a)
    assert TABLE <= len(known) < len(outcomes)
    assert all(outcome.drops == {(a.id, "flow_table_full"): 1} for outcome in outcomes if outcome.verdict == SHOT)
    for port in known:
        assert passed(send(little, b, a, version, UDP, packets.udp(7, port)))
        assert passed(send(little, a, b, version, UDP, packets.udp(port, 7)))
    frame = host_frame(Ip(GATEWAYS[version], b.addresses[version], UDP, packets.udp(1, 7)))
    assert little.from_host(frame).drops == {(b.id, "flow_table_full"): 1}
    # Pods to outside need two entries: neither half stays where there is room for one.
    first = entries(little)[0]
    bpf.delete(little.map("flows"), first.key)
    ip = Ip(a.addresses[version], FAR[version], UDP, packets.udp(1, 7))
    assert little.from_pod(a, pod_frame(a, ip)).drops == {(a.id, "flow_table_full"): 1}
    assert len(entries(little)) == len(known) - 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("sent", "closing"),
    [
        ("> S, < SA, > A", OPEN),
        ("> S, < SA, > FA", ORIGIN),
        ("> S, < SA, < FA", TARGET),
        ("> S, < SA, > FA, < FA, > A", BOTH),
        ("> S, < SA, > RA", BOTH),
        ("> S, < RA", BOTH),
        ("> S, < RA, > S", OPEN),
        ("> S, > S, > S", OPEN),
        ("> S, < SA, > FA, > S", OPEN),
        ("> S, < SA, > FA, < FA, < A", BOTH),
    ],
)
def test_closing(bench: Bench, sent: str, closing: int, version: int) -> None:
    tcp_exchange(bench, sent, version)
    fields = only(bench).fields
    assert (fields["closing"], fields["origin"]) == (closing, bench.train_0.id)
    assert bench.flow_count(bench.train_0) == 1


FLAGS = {"S": SYN, "A": ACK, "F": FIN, "R": RST}


def tcp_exchange(bench: Bench, sent: str, version: int) -> None:
    """``>`` from train_0 to web, ``<`` back; all must pass."""
    for one in sent.split(", "):
        direction, letters = one.split()
        flags = sum(FLAGS[letter] for letter in letters)
        if direction == ">":
            outcome = send(bench, bench.train_0, bench.web, version, TCP, packets.tcp(A_PORT, B_PORT, flags))
        else:
            outcome = send(bench, bench.web, bench.train_0, version, TCP, packets.tcp(B_PORT, A_PORT, flags))
        assert passed(outcome), one


@pytest.mark.parametrize("version", VERSIONS)
def test_a_syn_against_a_flow_begins_another(bench: Bench, version: int) -> None:
    """The same two ends, the other way round: the share is the other pod's then."""
    tcp_exchange(bench, "> S, < SA, > A, < S", version)
    fields = only(bench).fields
    assert (fields["origin"], fields["target"], fields["closing"]) == (bench.web.id, bench.train_0.id, OPEN)
    assert int(fields["flags"]) & REPLIED == 0
    assert (bench.flow_count(bench.train_0), bench.flow_count(bench.web)) == (0, 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kind", "closing", "replied", "timeout_s"),
    [
        ("echo", OPEN, True, 60),
        ("udp", OPEN, False, 120),
        ("udp", OPEN, True, 300),
        ("gre", OPEN, True, 300),
        ("tcp", OPEN, False, 240),
        ("tcp", ORIGIN, True, 7440),
        ("tcp", BOTH, True, 60),
    ],
)
def test_a_stale_flow_begins_anew(
    bench: Bench, kind: str, closing: int, replied: bool, timeout_s: int, version: int
) -> None:
    """By whoever sends next."""
    a, b, about = bench.train_0, bench.web, KINDS[kind]
    assert passed(send(bench, a, b, version, *about.there[version]))
    if replied:
        assert passed(send(bench, b, a, version, *about.back[version]))
    entry = only(bench)
    for idle_s, origin in ((timeout_s - 10, a), (timeout_s + 5, b)):
        entry.write(bench, last_seen_ns=time.monotonic_ns() - idle_s * 10**9, closing=closing)
        assert passed(send(bench, b, a, version, *about.back[version]))
        assert only(bench).fields["origin"] == origin.id
    assert (bench.flow_count(a), bench.flow_count(b)) == (0, 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("whose", ["origin", "target"])
def test_a_flow_of_an_earlier_pod_is_nobodys(bench: Bench, whose: str, version: int) -> None:
    a, b = bench.train_0, bench.web
    assert passed(send(bench, a, b, version, *KINDS["udp"].there[version]))
    epoch = only(bench).fields["epoch"]
    only(bench).write(bench, **{whose: 4_000_000}, epoch=0xFFFFFFFF)
    assert passed(send(bench, a, b, version, *KINDS["udp"].there[version]))
    fields = only(bench).fields
    assert (fields["origin"], fields["target"], fields["epoch"]) == (a.id, b.id, epoch)
    assert bench.flow_count(a) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_roce_is_not_tracked(bench: Bench, version: int) -> None:
    assert passed(send(bench, bench.train_0, bench.train_1, version, UDP, packets.roce(17)))
    frame = host_frame(Ip(GATEWAYS[version], bench.train_0.addresses[version], UDP, packets.roce(17)))
    assert passed(bench.from_host(frame))
    assert entries(bench) == []


# ICMP errors


def error(version: int, source: str, destination: str, quoted: bytes) -> Ip:
    """Port unreachable, about a packet."""
    kind = 3 if version == 4 else 1
    body = packets.icmp(kind, 0, b"")[:8] + quoted
    return Ip(source, destination, ICMP if version == 4 else ICMPV6, body)


def quote(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    return bytes(Ip(source, destination, protocol, payload))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_icmp_error_about_a_flow_passes_against_the_quoted_packet(bench: Bench, kind: str, version: int) -> None:
    a, b, about = bench.train_0, bench.web, KINDS[kind]
    assert passed(send(bench, a, b, version, *about.there[version]))
    before = only(bench)
    there = quote(a.addresses[version], b.addresses[version], *about.there[version])
    frame = pod_frame(b, error(version, b.addresses[version], a.addresses[version], there))
    outcome = bench.from_pod(b, frame)
    assert (outcome.verdict, outcome.frame) == (REDIRECT, rewritten(frame, a.mac))
    # About what the other end sent as well, and neither is a packet of the flow.
    back = quote(b.addresses[version], a.addresses[version], *about.back[version])
    assert passed(bench.from_pod(a, pod_frame(a, error(version, a.addresses[version], b.addresses[version], back))))
    assert only(bench) == before


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", ["no flow", "other ports", "of others", "not to its sender", "about an error"])
def test_an_icmp_error_about_nothing_is_unrelated(bench: Bench, case: str, version: int) -> None:
    a, b, other = (pod.addresses[version] for pod in (bench.train_0, bench.web, bench.train_1))
    if case != "no flow":
        assert passed(send(bench, bench.train_0, bench.web, version, *KINDS["udp"].there[version]))
    quoted = quote(a, b, *KINDS["udp"].there[version])
    if case == "other ports":
        quoted = quote(a, b, UDP, packets.udp(A_PORT, B_PORT + 1))
    if case == "about an error":
        quoted = bytes(error(version, a, b, quote(b, a, *KINDS["udp"].back[version])))
    sender, target = (bench.train_1, a) if case == "of others" else (bench.web, a)
    if case == "not to its sender":
        target = other
    outcome = bench.from_pod(sender, pod_frame(sender, error(version, sender.addresses[version], target, quoted)))
    assert (outcome.verdict, outcome.drops) == (SHOT, {(sender.id, "icmp_unrelated"): 1})
    assert outcome.counters == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("source", ["node", "router"])
def test_icmp_errors_through_the_host(bench: Bench, source: str, version: int) -> None:
    """The node's own pass: its stack answers to what was not let through. Others' must be about a flow."""
    web = bench.web
    sender = GATEWAYS[version] if source == "node" else FAR[version]
    quoted = quote(web.addresses[version], sender, *KINDS["udp"].back[version])
    frame = host_frame(error(version, sender, web.addresses[version], quoted))
    outcome = bench.from_host(frame)
    if source == "node":
        assert passed(outcome)
        return
    assert outcome.drops == {(web.id, "icmp_unrelated"): 1}
    assert passed(bench.from_host(host_frame(Ip(sender, web.addresses[version], *KINDS["udp"].there[version]))))
    assert passed(bench.from_host(frame))


# Fragments


def parts(source: str, destination: str, first: bytes, protocol: int = UDP) -> tuple[Ip, Ip]:
    """A packet's first part, and a later one."""
    head = packets.fragment(source, destination, first, more=True, protocol=protocol)
    return head, packets.fragment(source, destination, bytes(64), offset=1480, protocol=protocol)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["pod", "host"])
def test_later_parts_follow_the_first(bench: Bench, way: str, version: int) -> None:
    a, b = bench.train_0, bench.web
    source = a.addresses[version] if way == "pod" else GATEWAYS[version]
    first, later = parts(source, b.addresses[version], packets.udp(A_PORT, B_PORT, bytes(64)))

    def pass_on(ip: Ip) -> Outcome:
        return bench.from_pod(a, pod_frame(a, ip)) if way == "pod" else bench.from_host(host_frame(ip))

    unknown = pass_on(later)
    assert (unknown.verdict, unknown.reason) == (SHOT, "fragment_early")
    bench.clear("waiting")  # tests/kernel has what waits come in again
    assert passed(pass_on(first))
    outcome = pass_on(later)
    assert (outcome.verdict, outcome.frame[:6]) == (REDIRECT, b.mac)
    assert outcome.counters[b.id, "to_pod", "ip"] == 1
    entry = only(bench)
    assert tables.FLOW_KEY.unpack(entry.key)[4] == UDP
    # Not those of another packet between the same two.
    other = replace(later, protocol=TCP) if version == 4 else replace(later, destination=bench.train_1.addresses[6])
    assert pass_on(other).reason == "fragment_early"


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_follows_a_first_part_that_was_dropped(bench: Bench, version: int) -> None:
    a, b = bench.web, bench.train_0
    first, later = parts(a.addresses[version], b.addresses[version], packets.roce(17, payload=bytes(64)))
    assert bench.from_pod(a, pod_frame(a, first)).reason == "roce_no_device"
    assert bench.from_pod(a, pod_frame(a, later)).reason == "fragment_unknown"


@pytest.mark.parametrize("version", VERSIONS)
def test_parts_of_roce_follow_their_first(bench: Bench, version: int) -> None:
    a, b = bench.train_0, bench.train_1
    first, later = parts(a.addresses[version], b.addresses[version], packets.roce(17, payload=bytes(64)))
    for ip in (first, later):
        outcome = bench.from_pod(a, pod_frame(a, ip))
        assert outcome.counters == {(a.id, "from_pod", "roce"): 1, (b.id, "to_pod", "roce"): 1}
    # The guard is asked for each.
    entry = GuardEntry(1, address_key(bench.strict.addresses[version]), 18, GuardState.GRANTED)
    bench.datapath.set_guard(address_key(b.addresses[version]), 17, entry)
    assert bench.from_pod(a, pod_frame(a, later)).drops == {(a.id, "roce_not_peer"): 1}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("protocol", "first", "offset", "reason"),
    [
        (UDP, packets.udp(A_PORT, B_PORT, bytes(64)), 8, None),
        (TCP, packets.tcp(A_PORT, B_PORT, ACK, bytes(64)), 8, "malformed"),
        (TCP, packets.tcp(A_PORT, B_PORT, ACK, bytes(64)), 16, "malformed"),
        (TCP, packets.tcp(A_PORT, B_PORT, ACK, bytes(64)), 24, None),
        (UDP, packets.roce(17, payload=bytes(64)), 16, "malformed"),
        (UDP, packets.roce(17, payload=bytes(64)), 24, None),
        (UDP, packets.datagram(17, 20), 24, "malformed"),
        (UDP, packets.datagram(17, 20), 32, None),
    ],
)
def test_no_part_writes_over_what_the_first_was_judged_by(
    bench: Bench, protocol: int, first: bytes, offset: int, reason: str | None, version: int
) -> None:
    """RFC 1858, RFC 3128."""
    a, b = bench.train_0, bench.train_1
    head, later = parts(a.addresses[version], b.addresses[version], first, protocol)
    assert passed(bench.from_pod(a, pod_frame(a, head)))
    later = packets.fragment(later.source, later.destination, bytes(64), offset=offset, protocol=protocol)
    assert bench.from_pod(a, pod_frame(a, later)).reason == reason
