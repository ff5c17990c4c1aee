"""ARP and neighbour discovery of pods, answered by the program; every byte of the answers is compared."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from rdmanet.datapath import bpf
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, Bench
from testbed.bpf.lab import GATEWAY_MAC, GATEWAYS, UPLINK, Pod
from testbed.bpf.packets import ICMPV6, Ip

LINK_LOCAL = "fe80::2:7"
ROUTER = "fe80::1"
ALL_NODES = "ff02::1"
SOURCE_OPTION, TARGET_OPTION, NONCE = 1, 2, 14
ROUTER_SOLICITED_OVERRIDE = 0xE0000000


def option(kind: int, mac: bytes) -> bytes:
    return bytes((kind, 1)) + mac


def solicited_node(target: str) -> str:
    """RFC 4291 2.7.1."""
    return str(ipaddress.IPv6Address(bytes.fromhex("ff0200000000000000000001ff") + _packed(target)[-3:]))


def _packed(address: str) -> bytes:
    return ipaddress.IPv6Address(address).packed


def solicitation(
    pod: Pod,
    target: str,
    *,
    source: str | None = None,
    options: bytes | None = None,
    unicast: bool = False,
    hop_limit: int = 255,
    kind: int = 135,
) -> bytes:
    """A neighbour solicitation (RFC 4861 4.3) as the pod's stack sends it."""
    options = option(SOURCE_OPTION, pod.mac) if options is None else options
    destination = target if unicast else solicited_node(target)
    body = struct.pack("!BBHI", kind, 0, 0, 0) + _packed(target) + options
    ip = Ip(source or pod.addresses[6], destination, ICMPV6, body, hop_limit)
    mac = GATEWAY_MAC if unicast else b"\x33\x33" + _packed(destination)[-4:]
    return packets.ethernet(mac, pod.mac, packets.ETHERTYPE_IPV6, bytes(ip))


def advertisement(pod: Pod, target: str, destination: str) -> bytes:
    """The answer, whole."""
    body = struct.pack("!BBHI", 136, 0, 0, ROUTER_SOLICITED_OVERRIDE) + _packed(target)
    ip = Ip(target, destination, ICMPV6, body + option(TARGET_OPTION, GATEWAY_MAC), 255)
    return packets.ethernet(pod.mac, GATEWAY_MAC, packets.ETHERTYPE_IPV6, bytes(ip))


def redirected_to(bench: Bench, frame: bytes, pod: Pod) -> bytes:
    outcome = bench.from_pod(pod, frame)
    assert (outcome.verdict, outcome.drops, outcome.counters) == (REDIRECT, {}, {})
    return outcome.frame


@pytest.mark.parametrize("target", [GATEWAYS[4], UPLINK[4]])
@pytest.mark.parametrize("unicast", [False, True])
def test_arp_for_a_next_hop_is_answered(bench: Bench, target: str, unicast: bool) -> None:
    web = bench.web
    body = packets.arp(1, web.mac, web.addresses[4], target)
    asked = packets.ethernet(GATEWAY_MAC if unicast else b"\xff" * 6, web.mac, packets.ETHERTYPE_ARP, body)
    own, next_hop = (ipaddress.IPv4Address(one).packed for one in (web.addresses[4], target))
    answer = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + GATEWAY_MAC + next_hop + web.mac + own
    answered = redirected_to(bench, asked, web)
    assert answered == packets.ethernet(web.mac, GATEWAY_MAC, packets.ETHERTYPE_ARP, answer)


@pytest.mark.parametrize("target", [ROUTER, GATEWAYS[6], UPLINK[6]])
@pytest.mark.parametrize("unicast", [False, True])
@pytest.mark.parametrize("link_local", [False, True])
@pytest.mark.parametrize("options", ["source", "none", "source-and-nonce"])
def test_a_solicitation_for_a_next_hop_is_answered(
    bench: Bench, target: str, unicast: bool, link_local: bool, options: str
) -> None:
    web = bench.web
    own = option(SOURCE_OPTION, web.mac)
    given = {"source": own, "none": b"", "source-and-nonce": own + bytes((NONCE, 1, 1, 2, 3, 4, 5, 6))}[options]
    source = LINK_LOCAL if link_local else web.addresses[6]
    asked = solicitation(web, target, source=source, options=given, unicast=unicast)
    assert redirected_to(bench, asked, web) == advertisement(web, target, source)


def test_every_checksum_of_an_answer_is_right(bench: Bench) -> None:
    """Kernels before 6.13 give a sum of 32 bits, whose highest bit is no sign: each source has another one."""
    web = bench.web
    for number in range(0, 1 << 16, 0x0421):
        source = f"fe80::{number:x}:7"
        asked = solicitation(web, ROUTER, source=source)
        assert redirected_to(bench, asked, web) == advertisement(web, ROUTER, source)


def test_a_bad_neighbour_is_dropped_by_name(bench: Bench) -> None:
    web, other = bench.web, bench.train_0
    another = b"\x02\0\0\0\0\x09"
    for reason, frame in (
        ("spoofed_address", solicitation(web, ROUTER, source=other.addresses[6])),
        ("spoofed_address", solicitation(web, ROUTER, source=GATEWAYS[6], unicast=True)),
        ("spoofed_mac", solicitation(web, ROUTER, options=option(SOURCE_OPTION, another))),
        ("spoofed_mac", solicitation(other, ROUTER)),
        ("malformed", solicitation(web, ROUTER, hop_limit=254)),
        ("neighbour", solicitation(web, other.addresses[6])),
        ("neighbour", solicitation(web, other.addresses[6], unicast=True)),
        ("neighbour", solicitation(web, web.addresses[6])),
        ("neighbour", solicitation(web, ROUTER, source="::", unicast=True)),
        ("neighbour", solicitation(web, ROUTER, kind=136, unicast=True)),
        ("neighbour", solicitation(web, ROUTER, kind=137, unicast=True)),
        # Duplicate address detection, unsolicited advertisements, router solicitations: as all multicast.
        ("multicast", solicitation(web, web.addresses[6], source="::", options=b"")),
        ("multicast", solicitation(web, ALL_NODES, kind=136)),
        ("multicast", solicitation(web, ROUTER, kind=133)),
    ):
        outcome = bench.from_pod(web, frame)
        assert (outcome.verdict, outcome.drops) == (SHOT, {(web.id, reason): 1})
        assert outcome.frame == frame


def test_a_solicitation_cut_short_is_dropped(bench: Bench) -> None:
    web = bench.web
    frame = solicitation(web, ROUTER, options=b"", unicast=True)
    short = bytearray(frame[:-4])
    short[18:20] = struct.pack("!H", 20)
    assert bench.from_pod(web, bytes(short)).drops == {(web.id, "malformed"): 1}


def test_an_attachment_without_ipv6_gets_no_answer_to_the_unspecified_address(bench: Bench) -> None:
    web = bench.web
    asked = solicitation(web, ROUTER, source="::", unicast=True)
    assert bench.from_pod(web, asked).reason == "neighbour"


def test_only_the_nodes_addresses_are_next_hops(bench: Bench) -> None:
    """Which those are the map says."""
    web = bench.web
    assert len({bytes(key) for key in bench.keys("node_addresses")}) == len(GATEWAYS) + len(UPLINK)
    key = bytes(10) + b"\xff\xff" + ipaddress.IPv4Address(UPLINK[4]).packed
    bpf.delete(bench.map("node_addresses"), key)
    try:
        body = packets.arp(1, web.mac, web.addresses[4], UPLINK[4])
        frame = packets.ethernet(b"\xff" * 6, web.mac, packets.ETHERTYPE_ARP, body)
        assert bench.from_pod(web, frame).drops == {(web.id, "neighbour"): 1}
    finally:
        bpf.update(bench.map("node_addresses"), key, struct.pack("=I", 1))
