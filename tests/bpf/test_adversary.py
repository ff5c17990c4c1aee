"""Ways around a receiver's ingress policy, tried as an adversary would: each must end before the receiver."""

from __future__ import annotations

import pytest

from rdmanet.datapath import bpf, layout
from rdmanet.model import address_key
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, UNSPEC, Bench, pod_frame, uplink_frame
from testbed.bpf.lab import FAR, GATEWAYS, UPLINK
from testbed.bpf.packets import DESTINATION, FRAGMENT, ICMPV6, TCP, UDP, Ip

VERSIONS = (4, 6)
ADVERTISEMENT = 136


@pytest.fixture(autouse=True)
def own_addresses(bench: Bench) -> None:
    """The node's, which policy trusts."""
    for address in (*GATEWAYS.values(), *UPLINK.values()):
        bpf.update(bench.map("node_addresses"), address_key(address), layout.U32.pack(1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("whose", ["node", "pod", "own"])
def test_from_outside_nobody_speaks_for_the_node_or_its_pods(bench: Bench, version: int, whose: str) -> None:
    """IPv6's stack would forward such a packet, and host.c take it for the node's own, which is always allowed."""
    target, other = bench.web, bench.train_0
    source = {
        "node": UPLINK[version],
        "pod": other.addresses[version],
        "own": target.addresses[version],
    }[whose]
    for payload, protocol in ((packets.udp(4000, 53), UDP), (packets.tcp(4000, 80, packets.SYN), TCP)):
        outcome = bench.from_outside(uplink_frame(Ip(source, target.addresses[version], protocol, payload)))
        assert (outcome.verdict, outcome.reason) == (SHOT, "spoofed_address")
        # To the node itself: its stack knows martians.
        outcome = bench.from_outside(uplink_frame(Ip(source, UPLINK[version], protocol, payload)))
        assert outcome.verdict == UNSPEC


def test_mapped_addresses_meet_no_flow_of_ipv4(bench: Bench) -> None:
    sent = bench.from_pod(bench.web, pod_frame(bench.web, Ip(bench.web.addresses[4], FAR[4], UDP, packets.udp(9, 53))))
    assert sent.verdict == REDIRECT
    port = packets.look(sent.frame).source_port
    answer = packets.udp(53, port)
    assert bench.from_outside(uplink_frame(Ip(FAR[4], UPLINK[4], UDP, answer))).verdict == REDIRECT
    mapped = Ip(f"::ffff:{FAR[4]}", f"::ffff:{UPLINK[4]}", UDP, answer)
    assert bench.from_outside(uplink_frame(mapped)).verdict == UNSPEC


@pytest.mark.parametrize("hidden", ["options", "fragment"])
def test_no_pod_says_who_anothers_neighbours_are(bench: Bench, hidden: str) -> None:
    """Pods are joined without a hop in between: an advertisement would come with hop limit 255, as from the link."""
    web, peer = bench.web, bench.train_0
    body = packets.icmp(ADVERTISEMENT, 0x2000, bytes(16))
    header, first = (
        (packets.extension(ICMPV6, DESTINATION), DESTINATION)
        if hidden == "options"
        else (packets.extension(ICMPV6, FRAGMENT), FRAGMENT)
    )
    ip = Ip(web.addresses[6], peer.addresses[6], ICMPV6, body, options=header, first=first)
    outcome = bench.from_pod(web, pod_frame(web, ip))
    assert (outcome.verdict, outcome.reason) == (SHOT, "neighbour")
