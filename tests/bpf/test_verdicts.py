"""Every verdict and drop reason of the three programs, as data: what comes in, what the program says and changes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rdmanet.datapath.maps import NodeEntry, UplinkEntry
from rdmanet.model import address_key
from testbed.bpf import bench as benches
from testbed.bpf import lab, packets
from testbed.bpf.bench import (
    REDIRECT,
    SHOT,
    UNSPEC,
    Bench,
    between,
    host_frame,
    pod_frame,
    rewritten,
    to,
    uplink_frame,
)
from testbed.bpf.lab import FAR, GATEWAY_MAC, GATEWAYS, OUTSIDE, UPLINK, Pod
from testbed.bpf.packets import ICMP, ICMPV6, TCP, UDP, Ip
from tests.bpf.test_roce import ROCE

VERSIONS = (4, 6)
ECHO = {4: (ICMP, 8, 0), 6: (ICMPV6, 128, 129)}
#: Nobody has it, but it lies in the pods' range.
NOBODY = {4: "10.90.0.200", 6: "fd90::200"}


# What pods send


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("protocol", "payload"),
    [
        (TCP, packets.tcp(40000, 80)),
        (UDP, packets.udp(40000, 53)),
        (132, b"an SCTP packet, say"),
        (UDP, packets.udp(40000, 53, b"")),
    ],
    ids=["tcp", "udp", "other", "empty-udp"],
)
def test_pod_to_pod(bench: Bench, version: int, protocol: int, payload: bytes) -> None:
    frame = pod_frame(bench.train_0, between(bench.train_0, bench.web, version, protocol, payload))
    outcome = bench.from_pod(bench.train_0, frame)
    assert outcome.verdict == REDIRECT
    assert outcome.frame == rewritten(frame, bench.web.mac)
    assert outcome.drops == {}
    assert outcome.counters == {
        (bench.train_0.id, "from_pod", "ip"): 1,
        (bench.web.id, "to_pod", "ip"): 1,
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("destinations", [GATEWAYS, UPLINK], ids=["gateway", "uplink-address"])
def test_pod_to_host(bench: Bench, version: int, destinations: dict[int, str]) -> None:
    frame = pod_frame(bench.web, to(bench.web, destinations[version], version))
    outcome = bench.from_pod(bench.web, frame)
    assert outcome.verdict == REDIRECT
    assert outcome.frame == rewritten(frame, GATEWAY_MAC, bench.web.mac)
    assert outcome.counters == {(bench.web.id, "from_pod", "ip"): 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_destination_mac_does_not_matter(bench: Bench, version: int) -> None:
    frame = bytes.fromhex("02aabbccddee") + pod_frame(bench.web, between(bench.web, bench.train_0, version))[6:]
    outcome = bench.from_pod(bench.web, frame)
    assert outcome.verdict == REDIRECT
    assert outcome.frame == rewritten(frame, bench.train_0.mac)


@pytest.mark.parametrize("version", VERSIONS)
def test_without_masquerading_packets_leave_as_they_are(bench: Bench, version: int) -> None:
    bench.datapath.configure(NodeEntry(GATEWAY_MAC, bench.lab.host_ifindex, masquerade=False))
    frame = pod_frame(bench.train_0, to(bench.train_0, FAR[version], version, UDP, packets.roce(17)))
    outcome = bench.from_pod(bench.train_0, frame)
    assert outcome.verdict == REDIRECT
    seen = packets.look(outcome.frame)
    assert (seen.source, seen.hop_limit) == (bench.train_0.addresses[version], 63)
    assert outcome.counters == {(bench.train_0.id, "from_pod", "roce"): 1}


@dataclass(frozen=True)
class Dropped:
    """A frame from a pod that is dropped for a reason."""

    reason: str
    name: str
    frame: Callable[[Bench], bytes]
    pod: str = "web"
    attachment_known: bool = True
    prepare: Callable[[Bench], None] | None = None


def _web(build: Callable[[Pod, Bench], Ip]) -> Callable[[Bench], bytes]:
    return lambda bench: pod_frame(bench.web, build(bench.web, bench))


def _toward(destinations: dict[int, str], version: int) -> Callable[[Bench], bytes]:
    return _web(lambda web, bench: to(web, destinations[version], version))


def _arp(
    mac: bytes | None = None, address: str | None = None, operation: int = 1, target: str = GATEWAYS[4]
) -> Callable[[Bench], bytes]:
    def build(bench: Bench) -> bytes:
        web = bench.web
        body = packets.arp(operation, mac or web.mac, address or web.addresses[4], target)
        return packets.ethernet(b"\xff" * 6, web.mac, packets.ETHERTYPE_ARP, body)

    return build


def _raw(ethertype: int, body: bytes, destination: bytes = GATEWAY_MAC) -> Callable[[Bench], bytes]:
    return lambda bench: packets.ethernet(destination, bench.web.mac, ethertype, body)


def _patched(version: int, place: int, value: bytes) -> Callable[[Bench], bytes]:
    """A good packet with some bytes of its IP header changed."""

    def build(bench: Bench) -> bytes:
        frame = bytearray(pod_frame(bench.web, between(bench.web, bench.train_0, version)))
        frame[14 + place : 14 + place + len(value)] = value
        return bytes(frame)

    return build


def _only_ipv4(bench: Bench) -> None:
    bench.datapath.set_uplink(bench.lab.uplink_ifindex, UplinkEntry(ipv4=address_key(UPLINK[4])))


def _only_ipv6(bench: Bench) -> None:
    bench.datapath.set_uplink(bench.lab.uplink_ifindex, UplinkEntry(ipv6=address_key(UPLINK[6])))


def _both(reason: str, name: str, build: Callable[[int], Callable[[Bench], bytes]], **rest: object) -> list[Dropped]:
    return [Dropped(reason, f"{name}-ipv{v}", build(v), **rest) for v in VERSIONS]  # type: ignore[arg-type]


def _any_mac(frame: Callable[[Bench], bytes], mac: bytes) -> Callable[[Bench], bytes]:
    return lambda bench: mac + frame(bench)[6:]


def _later(destinations: Callable[[Bench], dict[int, str]], version: int, size: int = 64) -> Callable[[Bench], bytes]:
    def build(web: Pod, bench: Bench) -> Ip:
        return packets.fragment(web.addresses[version], destinations(bench)[version], bytes(size), offset=1480)

    return _web(build)


def _first_to_far(bench: Bench) -> None:
    for version in VERSIONS:
        first = packets.fragment(bench.web.addresses[version], FAR[version], packets.udp(1, 2), more=True)
        assert bench.from_pod(bench.web, pod_frame(bench.web, first)).verdict == REDIRECT


_EXTENSIONS = b"".join(packets.extension(60) for _ in range(4)) + packets.extension(TCP)

DROPPED = [
    *_both(
        "spoofed_mac",
        "another's MAC",
        lambda v: lambda b: pod_frame(b.train_0, between(b.web, b.train_0, v)),
    ),
    *_both(
        "spoofed_address",
        "another's address",
        lambda v: _web(lambda web, b: between(b.train_0, b.train_1, v)),
    ),
    *_both("spoofed_address", "an outside address", lambda v: _web(lambda w, b: Ip(FAR[v], w.addresses[v], TCP, b""))),
    Dropped("spoofed_address", "unspecified IPv4", _web(lambda w, b: Ip("0.0.0.0", FAR[4], TCP, b""))),
    Dropped("spoofed_address", "unspecified IPv6", _web(lambda w, b: Ip("::", FAR[6], TCP, b""))),
    Dropped(
        "spoofed_address",
        "its own IPv4 address in IPv6",
        _web(lambda w, b: Ip(f"::ffff:{w.addresses[4]}", w.addresses[6], TCP, b"")),
    ),
    Dropped("spoofed_address", "link-local", _web(lambda w, b: Ip("fe80::7", w.addresses[6], ICMPV6, b""))),
    Dropped("spoofed_mac", "ARP for another MAC", _arp(mac=b"\x02\0\0\0\0\x09")),
    Dropped("spoofed_address", "ARP for another address", _arp(address="10.90.0.1")),
    Dropped("spoofed_address", "ARP probe", _arp(address="0.0.0.0")),
    Dropped("neighbour", "an ARP reply", _arp(operation=2)),
    Dropped("neighbour", "ARP for a pod", _arp(target="10.90.0.7")),
    Dropped("malformed", "RARP's operation", _arp(operation=3)),
    Dropped("malformed", "ARP cut short", lambda b: _arp()(b)[:41]),
    Dropped("not_ip", "LLDP", _raw(0x88CC, bytes(46))),
    Dropped("not_ip", "VLAN tag", _raw(packets.ETHERTYPE_VLAN, struct.pack("!HH", 5, 0x0800) + bytes(46))),
    Dropped("not_ip", "802.3 length", _raw(0x0026, bytes(46))),
    *_both("multicast", "a group MAC", lambda v: _any_mac(_toward(FAR, v), bytes.fromhex("01005e0000fb"))),
    *_both("multicast", "the broadcast MAC", lambda v: _any_mac(_toward(FAR, v), b"\xff" * 6)),
    *_both("multicast", "a group address", lambda v: _toward({4: "224.0.0.251", 6: "ff02::fb"}, v)),
    Dropped("multicast", "the broadcast address", _toward({4: "255.255.255.255"}, 4)),
    *_both("no_endpoint", "an address that nobody has", lambda v: _toward(NOBODY, v)),
    *_both("no_route", "loopback", lambda v: _toward({4: "127.0.0.1", 6: "::1"}, v)),
    *_both("no_route", "unspecified", lambda v: _toward({4: "0.0.0.0", 6: "::"}, v)),
    *_both("no_route", "link-local", lambda v: _toward({4: "169.254.1.1", 6: "fe80::1"}, v)),
    Dropped("no_route", "a pod's IPv4 address in IPv6", _toward({6: "::ffff:10.90.0.7"}, 6)),
    *_both("no_route", "itself", lambda v: _web(lambda w, b: between(w, w, v))),
    *_both("no_route", "blackhole", lambda v: _toward(benches.BLACKHOLE, v)),
    *_both("no_route", "unreachable", lambda v: _toward(benches.UNREACHABLE, v)),
    *_both("no_route", "prohibit", lambda v: _toward(benches.PROHIBIT, v)),
    *_both("not_uplink", "a device of others", lambda v: _toward(benches.NOT_UPLINK, v)),
    Dropped("no_masquerade_address", "IPv6", _toward(FAR, 6), prepare=_only_ipv4),
    Dropped("no_masquerade_address", "IPv4", _toward(FAR, 4), prepare=_only_ipv6),
    *_both("fragment_early", "a later fragment to outside", lambda v: _later(lambda b: FAR, v)),
    *_both("fragment_early", "a later fragment to a pod", lambda v: _later(lambda b: b.train_0.addresses, v)),
    *_both("fragment_early", "a later fragment to the host", lambda v: _later(lambda b: GATEWAYS, v)),
    *_both("fragment_unknown", "a later fragment too large to wait", lambda v: _later(lambda b: FAR, v, 2040)),
    *_both("fragment", "a later fragment too large", lambda v: _later(lambda b: FAR, v, 1600), prepare=_first_to_far),
    *_both("nat_protocol", "SCTP to outside", lambda v: _web(lambda w, b: to(w, FAR[v], v, 132, bytes(24)))),
    *_both(
        "malformed",
        "an ICMP error to outside that quotes nothing",
        lambda v: _web(lambda w, b: to(w, FAR[v], v, ECHO[v][0], packets.icmp(3 if v == 4 else 1, 0))),
    ),
    *_both(
        "nat_protocol",
        "an echo reply to outside",
        lambda v: _web(lambda w, b: to(w, FAR[v], v, ECHO[v][0], packets.icmp(ECHO[v][2], 7))),
    ),
    Dropped("nat_protocol", "ICMP's number in IPv6", _web(lambda w, b: to(w, FAR[6], 6, ICMP, packets.icmp(8, 7)))),
    *_both(
        "no_attachment",
        "a device that is no attachment",
        lambda v: _web(lambda w, b: between(w, b.train_0, v)),
        pod="plain",
        attachment_known=False,
    ),
    *_both(
        "no_node",
        "before the agent configured anything",
        lambda v: _web(lambda w, b: between(w, b.train_0, v)),
        attachment_known=False,
        prepare=lambda b: b.datapath.configure(NodeEntry(GATEWAY_MAC, 0)),
    ),
    Dropped("malformed", "IPv4 header of 16 bytes", _patched(4, 0, b"\x44")),
    Dropped("malformed", "IPv6's version under IPv4's type", _patched(4, 0, b"\x65")),
    Dropped("malformed", "IPv4's version under IPv6's type", _patched(6, 0, b"\x45")),
    Dropped("malformed", "IPv4 longer than the frame", _patched(4, 2, b"\x0f\x00")),
    Dropped("malformed", "IPv4 shorter than its header", _patched(4, 2, b"\x00\x10")),
    Dropped(
        "malformed",
        "IPv4 shorter than its header, of a protocol without ports",
        _patched(4, 2, b"\x00\x10\x00\x07\x00\x00\x40\x84"),
    ),
    Dropped("malformed", "IPv4 total length 0", _patched(4, 2, b"\x00\x00")),
    Dropped("malformed", "IPv4 options beyond the packet", _patched(4, 0, b"\x4f")),
    Dropped("malformed", "IPv6 longer than the frame", _patched(6, 4, b"\x0f\x00")),
    Dropped("malformed", "IPv6 without payload", _patched(6, 4, b"\x00\x00")),
    *_both(
        "malformed",
        "TCP header cut short",
        lambda v: _web(lambda w, b: between(w, b.train_0, v, TCP, packets.tcp(1, 2)[:19])),
    ),
    *_both(
        "malformed",
        "UDP header cut short",
        lambda v: _web(lambda w, b: between(w, b.train_0, v, UDP, packets.udp(1, 2)[:7])),
    ),
    *_both(
        "malformed",
        "ICMP header cut short",
        lambda v: _web(lambda w, b: between(w, b.train_0, v, ECHO[v][0], packets.icmp(ECHO[v][1], 1)[:7])),
    ),
    Dropped(
        "malformed",
        "more IPv6 extension headers than anybody needs",
        _web(
            lambda w, b: Ip(
                w.addresses[6], b.train_0.addresses[6], TCP, packets.tcp(1, 2), options=_EXTENSIONS, first=60
            )
        ),
    ),
    Dropped(
        "malformed",
        "an IPv6 extension header beyond the packet",
        _web(
            lambda w, b: Ip(w.addresses[6], b.train_0.addresses[6], TCP, b"", options=b"\x06\xff" + bytes(6), first=60)
        ),
    ),
]


@pytest.mark.parametrize("case", DROPPED, ids=lambda case: f"{case.reason}: {case.name}")
def test_dropped_from_a_pod(bench: Bench, case: Dropped) -> None:
    if case.prepare:
        case.prepare(bench)
    frame = case.frame(bench)
    ifindex = bench.plain_ifindex if case.pod == "plain" else bench.web.ifindex
    outcome = bench.run("pod", frame, ifindex)
    attachment = bench.web.id if case.attachment_known else 0
    assert outcome.drops == {(attachment, case.reason): 1}
    assert outcome.verdict == SHOT
    assert outcome.frame == frame
    assert outcome.counters == {}


def test_an_attachment_without_ipv6_cannot_send_from_the_unspecified_address(bench: Bench) -> None:
    """Zero in the map means that there is none, and must not be taken for an address."""
    web = bench.web
    entry = bench.datapath.attachments()[web.ifindex]
    bench.datapath.set_attachment(web.ifindex, replace(entry, ipv6=bytes(16)))
    outcome = bench.from_pod(web, pod_frame(web, Ip("::", GATEWAYS[6], UDP, packets.udp(1, 2))))
    assert (outcome.verdict, outcome.drops) == (SHOT, {(web.id, "spoofed_address"): 1})


# What the host sends


@pytest.mark.parametrize("version", VERSIONS)
def test_host_to_pod(bench: Bench, version: int) -> None:
    frame = host_frame(Ip(GATEWAYS[version], bench.web.addresses[version], TCP, packets.tcp(80, 40000)))
    outcome = bench.from_host(frame)
    assert outcome.verdict == REDIRECT
    assert outcome.frame == rewritten(frame, bench.web.mac)
    assert outcome.counters == {(bench.web.id, "to_pod", "ip"): 1}


HOST_DROPPED = [
    ("no_endpoint", lambda b: host_frame(Ip(GATEWAYS[4], NOBODY[4], TCP, packets.tcp(1, 2)))),
    ("no_endpoint", lambda b: host_frame(Ip(GATEWAYS[6], NOBODY[6], TCP, packets.tcp(1, 2)))),
    ("no_route", lambda b: host_frame(Ip(GATEWAYS[6], "::ffff:10.90.0.9", TCP, packets.tcp(1, 2)))),
    ("multicast", lambda b: host_frame(Ip(GATEWAYS[4], "224.0.0.251", UDP, packets.udp(1, 2)))),
    ("multicast", lambda b: b"\x33\x33\0\0\0\2" + host_frame(Ip("fe80::1", "ff02::2", ICMPV6, bytes(8)))[6:]),
    ("multicast", lambda b: b"\xff" * 6 + host_frame(Ip(GATEWAYS[4], b.web.addresses[4], UDP, packets.udp(1, 2)))[6:]),
    ("not_ip", lambda b: packets.ethernet(GATEWAY_MAC, GATEWAY_MAC, packets.ETHERTYPE_ARP, bytes(28))),
    ("malformed", lambda b: host_frame(Ip(GATEWAYS[4], b.web.addresses[4], UDP, b"\0\1\0\2"))),
    ("malformed", lambda b: packets.ethernet(GATEWAY_MAC, GATEWAY_MAC, packets.ETHERTYPE_IPV6, bytes(46))),
]


@pytest.mark.parametrize(("reason", "build"), HOST_DROPPED)
def test_dropped_from_the_host(bench: Bench, reason: str, build: Callable[[Bench], bytes]) -> None:
    frame = build(bench)
    outcome = bench.from_host(frame)
    assert (outcome.verdict, outcome.frame, outcome.drops) == (SHOT, frame, {(0, reason): 1})


def test_nothing_reaches_pods_before_the_node_is_configured(bench: Bench) -> None:
    bench.datapath.configure(NodeEntry(GATEWAY_MAC, 0))
    outcome = bench.from_host(host_frame(Ip(GATEWAYS[4], bench.web.addresses[4], TCP, packets.tcp(1, 2))))
    assert (outcome.verdict, outcome.drops) == (SHOT, {(0, "no_node"): 1})


# What comes from outside without a flow of ours is the host's, whatever it is.

UNTOUCHED = [
    lambda b: uplink_frame(Ip(FAR[4], UPLINK[4], TCP, packets.tcp(80, 61001))),
    lambda b: uplink_frame(Ip(FAR[6], UPLINK[6], TCP, packets.tcp(80, 61001))),
    lambda b: uplink_frame(Ip(FAR[4], b.web.addresses[4], TCP, packets.tcp(80, 40000))),
    lambda b: uplink_frame(Ip(FAR[6], b.web.addresses[6], UDP, packets.udp(80, 40000))),
    lambda b: uplink_frame(Ip(FAR[4], UPLINK[4], ICMP, packets.icmp(0, 61001))),
    lambda b: uplink_frame(Ip(FAR[4], UPLINK[4], ICMP, packets.icmp(8, 61001))),
    lambda b: uplink_frame(Ip(FAR[6], UPLINK[6], ICMPV6, packets.icmp(136, 0))),
    lambda b: uplink_frame(Ip(FAR[4], UPLINK[4], 132, bytes(24))),
    lambda b: uplink_frame(Ip(FAR[4], "198.51.100.77", UDP, bytes(24), offset=32)),
    lambda b: uplink_frame(Ip(OUTSIDE[4], "224.0.0.1", UDP, packets.udp(1, 2))),
    lambda b: uplink_frame(Ip(FAR[4], UPLINK[4], UDP, packets.roce(17))),
    lambda b: uplink_frame(Ip(FAR[4], UPLINK[4], TCP, b"short")),
    lambda b: b"\xff" * 6 + uplink_frame(Ip(FAR[4], UPLINK[4], TCP, packets.tcp(80, 61001)))[6:],
    lambda b: packets.ethernet(b"\xff" * 6, b"\x02\0\0\0\0\1", packets.ETHERTYPE_ARP, bytes(28)),
    lambda b: packets.ethernet(b"\x02\0\0\0\0\2", b"\x02\0\0\0\0\1", packets.ETHERTYPE_IPV4, b"\x44" + bytes(45)),
    lambda b: packets.ethernet(b"\x02\0\0\0\0\2", b"\x02\0\0\0\0\1", 0x88CC, bytes(46)),
]


@pytest.mark.parametrize("build", UNTOUCHED)
def test_the_hosts_own_traffic_is_untouched(bench: Bench, build: Callable[[Bench], bytes]) -> None:
    frame = build(bench)
    outcome = bench.from_outside(frame)
    assert (outcome.verdict, outcome.frame, outcome.drops, outcome.counters) == (UNSPEC, frame, {}, {})


# Odd ones


def test_a_gso_frame_counts_as_its_segments(bench: Bench) -> None:
    frame = pod_frame(bench.web, between(bench.web, bench.train_0, 4, TCP, packets.tcp(1, 2, payload=bytes(3000))))
    outcome = bench.from_pod(bench.web, frame, gso=(1448, 3))
    assert outcome.verdict == REDIRECT
    assert outcome.counters[bench.web.id, "from_pod", "ip"] == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_big_tcp_says_zero_for_its_length(bench: Bench, version: int) -> None:
    """Over 64 KiB the length does not fit into the header; only a GSO frame may say so."""
    frame = bytearray(pod_frame(bench.web, between(bench.web, bench.train_0, version)))
    place = 16 if version == 4 else 18
    frame[place : place + 2] = b"\0\0"
    assert bench.from_pod(bench.web, bytes(frame), gso=(1448, 3)).verdict == REDIRECT
    assert bench.from_pod(bench.web, bytes(frame)).drops == {(bench.web.id, "malformed"): 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_gso_frame_may_be_bigger_than_the_uplinks_mtu(bench: Bench, version: int) -> None:
    payload = packets.tcp(40000, 80, payload=bytes(3000))
    frame = pod_frame(bench.web, to(bench.web, FAR[version], version, TCP, payload))
    outcome = bench.from_pod(bench.web, frame, gso=(1400, 3))
    assert packets.look(outcome.frame).source == UPLINK[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_program_that_is_not_there_is_named(bench: Bench, version: int) -> None:
    frame = pod_frame(bench.web, to(bench.web, FAR[version], version))
    with bench.empty_slot("outside"):
        outcome = bench.from_pod(bench.web, frame)
    assert (outcome.verdict, outcome.drops) == (SHOT, {(bench.web.id, "no_program"): 1})
    assert bench.from_pod(bench.web, frame).verdict == REDIRECT


#: Reasons that need more than a packet: other tests in tests/bpf and tests/kernel name them.
ELSEWHERE = {
    "nat_no_port",
    "flow_limit",
    "flow_table_full",
    "icmp_unrelated",
    "no_program",
    "policy_egress",
    "policy_ingress",
    "no_backend",
    "service_conflict",
    "bandwidth_egress",
    "bandwidth_ingress",
}


def test_every_drop_reason_has_a_case() -> None:
    covered = {case.reason for case in DROPPED} | {case.reason for case in ROCE if case.reason}
    tests = Path(__file__).resolve().parents[1]
    texts = [path.read_text("utf-8") for part in ("bpf", "kernel") for path in (tests / part).glob("test_*.py")]
    assert covered | ELSEWHERE == set(lab.artifact().drop_reasons)
    # Here it is once, in the list.
    assert {reason for reason in ELSEWHERE if sum(text.count(f'"{reason}"') for text in texts) < 2} == set()
