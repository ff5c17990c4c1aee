"""Packets of pods that are too large for the uplink, or have no hop left: pods are told."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, Bench, Outcome, pod_frame, rewritten
from testbed.bpf.lab import FAR, GATEWAY_MAC, UPLINK, Pod
from testbed.bpf.packets import ICMPV6, TCP, UDP, Ip

VERSIONS = (4, 6)


def test_the_last_hop_goes_to_the_host_for_its_icmp_answer(bench: Bench) -> None:
    ip = Ip(bench.web.addresses[4], FAR[4], TCP, packets.tcp(40000, 80), hop_limit=1)
    frame = pod_frame(bench.web, ip)
    outcome = bench.from_pod(bench.web, frame)
    assert outcome.verdict == REDIRECT
    assert outcome.frame == rewritten(frame, GATEWAY_MAC, bench.web.mac)


@pytest.mark.parametrize("dont_fragment", [True, False])
@pytest.mark.parametrize("more", [True, False])
def test_too_big_for_the_uplink_goes_to_the_host_for_its_icmp_answer(
    bench: Bench, more: bool, dont_fragment: bool
) -> None:
    """With DF, that the stack tells the pod and does not send parts on with the pod's address."""
    ip = Ip(bench.web.addresses[4], FAR[4], UDP, packets.udp(40000, 53, bytes(1600)), more=more)
    wanted = pod_frame(bench.web, replace(ip, dont_fragment=True))
    outcome = bench.from_pod(bench.web, pod_frame(bench.web, replace(ip, dont_fragment=dont_fragment)))
    assert outcome.verdict == REDIRECT
    assert outcome.frame == rewritten(wanted, GATEWAY_MAC, bench.web.mac)


#: Bytes of the payload, and of those that are quoted behind the network header.
QUOTES = [(8, 16), (400, 408), (1300, 408)]


@pytest.mark.parametrize(("size", "quoted"), QUOTES)
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_the_last_hop_of_ipv6_is_answered(bench: Bench, protocol: int, size: int, quoted: int) -> None:
    """RFC 4443 3.3: the host's stack would not, as it does not forward for others."""
    web = bench.web
    payload = packets.udp(1, 2, bytes(size)) if protocol == UDP else packets.tcp(1, 2, payload=bytes(size))
    ip = Ip(web.addresses[6], FAR[6], protocol, payload, hop_limit=1)
    outcome = bench.from_pod(web, pod_frame(web, ip))
    _is_told(outcome, web, bytes(ip)[40 : 40 + (quoted if protocol == UDP else min(quoted + 12, 408))], (3, 0, 0), 1)


@pytest.mark.parametrize("segments", [0, 2])
def test_too_big_an_ipv6_packet_for_the_uplink_is_answered(bench: Bench, segments: int) -> None:
    """RFC 4443 3.2; of a GSO frame its segments count."""
    web = bench.web
    payload = packets.tcp(1, 2, payload=bytes(1600 * max(segments, 1)))
    ip = Ip(web.addresses[6], FAR[6], TCP, payload)
    outcome = bench.from_pod(web, pod_frame(web, ip), gso=(1600, segments) if segments else (0, 0))
    _is_told(outcome, web, bytes(ip)[40:448], (2, 0, 1500), 64, max(segments, 1))


def _is_told(
    outcome: Outcome, pod: Pod, quoted: bytes, expected: tuple[int, int, int], hop_limit: int, segments: int = 1
) -> None:
    assert outcome.verdict == REDIRECT
    seen = packets.look(outcome.frame)
    assert (seen.destination_mac, seen.source_mac) == (pod.mac, GATEWAY_MAC)
    assert (seen.source, seen.destination) == ("fe80::1", pod.addresses[6])
    kind, code, _, mtu_bytes = struct.unpack_from("!BBHI", seen.transport)
    assert (kind, code, mtu_bytes) == expected
    assert seen.transport[8 + 7] == hop_limit
    assert seen.transport[8 + 40 :] == quoted
    assert outcome.counters == {(pod.id, "from_pod", "ip"): segments, (pod.id, "to_pod", "ip"): 1}


@pytest.mark.parametrize("segment_bytes", [1400, 1440, 1441, 1460, 1461])
@pytest.mark.parametrize("version", VERSIONS)
def test_segments_of_a_frame_fit_or_do_not(bench: Bench, version: int, segment_bytes: int) -> None:
    """Headers leave 1460 bytes of an MTU of 1500, IPv6's 1440."""
    web = bench.web
    payload = packets.tcp(1, 2, payload=bytes(2 * segment_bytes))
    frame = pod_frame(web, Ip(web.addresses[version], FAR[version], TCP, payload, dont_fragment=True))
    outcome = bench.from_pod(web, frame, gso=(segment_bytes, 2))
    assert outcome.verdict == REDIRECT
    assert (packets.look(outcome.frame).source == UPLINK[version]) == (segment_bytes <= {4: 1460, 6: 1440}[version])


def test_no_error_about_an_error(bench: Bench) -> None:
    """RFC 4443 2.4 (e.1)."""
    web = bench.web
    error = packets.icmp(3, 0, bytes(60))
    outcome = bench.from_pod(web, pod_frame(web, Ip(web.addresses[6], FAR[6], ICMPV6, error, hop_limit=1)))
    assert (outcome.verdict, outcome.drops) == (SHOT, {(web.id, "no_route"): 1})
