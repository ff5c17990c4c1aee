"""Packets cut short or changed at random: nothing gets past anti-spoofing, nothing breaks the programs."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.bpf import packets
from testbed.bpf.bench import (
    OK,
    REDIRECT,
    SHOT,
    STOLEN,
    UNSPEC,
    Bench,
    good_frames,
    host_frame,
    pod_frame,
    uplink_frame,
)
from testbed.bpf.lab import FAR, GATEWAY_MAC, GATEWAYS, UPLINK
from testbed.bpf.packets import TCP, Ip


def shortest(frame: bytes) -> int:
    """BPF_PROG_TEST_RUN takes no frame without its whole network header (kernel 6.18); tests/kernel/
    test_datapath_live.py sends shorter ones."""
    return {packets.ETHERTYPE_IPV4: 34, packets.ETHERTYPE_IPV6: 54}.get(int.from_bytes(frame[12:14], "big"), 15)


KINDS = (
    "tcp4",
    "tcp6",
    "udp4-outside",
    "udp6-outside",
    "echo4-host",
    "echo6-host",
    "roce4",
    "roce6",
    "datagram4",
    "datagram6",
    "options4",
    "extensions6",
    "arp",
)


#: By ethertype: where a packet's traffic class is, and the checksum that covers it.
CLASS_PLACES = {packets.ETHERTYPE_IPV4: {15, 24, 25}, packets.ETHERTYPE_IPV6: {14, 15}}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_at_each_length(bench: Bench, kind: str) -> None:
    whole = good_frames(bench)[kind]
    assert bench.from_pod(bench.train_0, whole).verdict in (OK, REDIRECT)
    for length in range(shortest(whole), len(whole)):
        outcome = bench.from_pod(bench.train_0, whole[:length])
        assert (length, outcome.verdict, outcome.drops) == (length, SHOT, {(bench.train_0.id, "malformed"): 1})


@pytest.mark.parametrize("version", [4, 6])
def test_cut_short_from_host_and_outside(bench: Bench, version: int) -> None:
    address = bench.train_0.addresses[version]
    inward = host_frame(Ip(GATEWAYS[version], address, TCP, packets.tcp(1, 2)))
    for length in range(shortest(inward), len(inward)):
        outcome = bench.from_host(inward[:length])
        assert (length, outcome.verdict, outcome.drops) == (length, SHOT, {(0, "malformed"): 1})
    # A flow exists, so only its whole answers may be taken.
    flow = pod_frame(bench.train_0, Ip(address, FAR[version], TCP, packets.tcp(1, 2)))
    port = packets.look(bench.from_pod(bench.train_0, flow).frame).source_port
    back = uplink_frame(Ip(FAR[version], UPLINK[version], TCP, packets.tcp(2, port)))
    assert bench.from_outside(back).verdict == REDIRECT
    for length in range(shortest(back), len(back)):
        outcome = bench.from_outside(back[:length])
        assert (length, outcome.verdict, outcome.frame) == (length, UNSPEC, back[:length])


@pytest.mark.parametrize("kind", KINDS)
def test_changed_at_random(bench: Bench, kind: str) -> None:
    whole = good_frames(bench)[kind]
    sources = {ipaddress.ip_address(address).packed for address in bench.train_0.addresses.values()}

    changes = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changes)
    def check(changed: list[tuple[int, int]]) -> None:
        frame = bytearray(whole)
        for place, value in changed:
            frame[place] = value
        outcome = bench.from_pod(bench.train_0, bytes(frame))
        assert outcome.verdict in (OK, SHOT, REDIRECT, STOLEN)
        assert (outcome.verdict == SHOT) == bool(outcome.drops)
        if outcome.verdict == SHOT:
            # The class is written before the destination is looked at.
            places = [place for place, value in enumerate(frame) if outcome.frame[place] != value]
            assert len(outcome.frame) == len(frame)
            assert CLASS_PLACES.get(int.from_bytes(frame[12:14], "big"), set()).issuperset(places)
            return
        assert bytes(frame[6:12]) == bench.train_0.mac
        ethertype = int.from_bytes(frame[12:14], "big")
        if ethertype == packets.ETHERTYPE_ARP:
            own = bench.train_0.mac + ipaddress.ip_address(bench.train_0.addresses[4]).packed
            answer = GATEWAY_MAC + ipaddress.ip_address(GATEWAYS[4]).packed + own
            assert (outcome.verdict, bytes(frame[22:32])) == (REDIRECT, own)
            assert (outcome.frame[:12], outcome.frame[22:42]) == (bench.train_0.mac + GATEWAY_MAC, answer)
            return
        source = frame[26:30] if ethertype == packets.ETHERTYPE_IPV4 else frame[22:38]
        assert bytes(source) in sources
        if outcome.verdict == STOLEN:
            # The first fragment of one whose later part, of an example before, waits: both are sent in once more.
            assert ethertype == packets.ETHERTYPE_IPV6 or int.from_bytes(frame[20:22], "big") & 0x3FFF == 0x2000
            return
        assert outcome.verdict == REDIRECT
        assert GATEWAY_MAC in (outcome.frame[:6], outcome.frame[6:12]) or outcome.frame[:12] == bytes(frame[:12])

    check()
