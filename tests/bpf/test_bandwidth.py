"""Limits of pods' kernel traffic (bpf/limit.h), packet by packet: which are dropped, who pays, and who does not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.maps import AttachmentEntry, Datapath
from rdmanet.datapath.tables import LIMIT
from rdmanet.model import UNLIMITED, Bandwidth, Limit, address_key
from testbed.bpf import packets
from testbed.bpf.bench import (
    REDIRECT,
    SHOT,
    Bench,
    Outcome,
    between,
    host_frame,
    pod_frame,
    rewritten,
    to,
    uplink_frame,
)
from testbed.bpf.lab import FAR, GATEWAYS, UPLINK, Pod
from testbed.bpf.packets import ICMP, ICMPV6, TCP, UDP, Ip
from testbed.service_entries import MAGLEV_PLACES, OUTSIDE, ServiceEntries
from tests.bpf.flows import entries
from tests.bpf.test_nat import back, out, outside_port
from tests.bpf.test_policy import select

VERSIONS = (4, 6)
DIRECTIONS = ("egress", "ingress")
KINDS = {"tcp": TCP, "udp": UDP}
COUNT = 5
#: What nothing fits into.
NOTHING = 1


def payload(kind: str, size: int = 1000) -> bytes:
    body = bytes(size)
    return packets.tcp(40000, 80, payload=body) if kind == "tcp" else packets.udp(40000, 80, body)


def frame_between(pod: Pod, peer: Pod, version: int, kind: str = "udp", size: int = 1000) -> bytes:
    return pod_frame(pod, between(pod, peer, version, KINDS[kind], payload(kind, size)))


def dropped(outcome: Outcome, pod: Pod, direction: str) -> None:
    assert (outcome.verdict, outcome.drops) == (SHOT, {(pod.id, f"bandwidth_{direction}"): 1})
    assert outcome.counters == {}, "it was counted as passed"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_fits_into_the_burst_passes_and_no_more(bench: Bench, direction: str, kind: str, version: int) -> None:
    pod, peer = bench.train_0, bench.web
    frame = frame_between(pod, peer, version, kind)
    limited = pod if direction == "egress" else peer
    bench.limit(limited, **{direction: COUNT * len(frame)})
    for _ in range(COUNT):
        outcome = bench.from_pod(pod, frame)
        assert (outcome.verdict, outcome.frame) == (REDIRECT, rewritten(frame, peer.mac))
        assert outcome.counters == {(pod.id, "from_pod", "ip"): 1, (peer.id, "to_pod", "ip"): 1}
    for _ in range(3):
        dropped(bench.from_pod(pod, frame), limited, direction)
    # The other way, where nobody is limited.
    for _ in range(COUNT + 1):
        answer = bench.from_pod(peer, frame_between(peer, pod, version, kind))
        assert answer.verdict == REDIRECT, answer.drops


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_packet_that_does_not_fit_leaves_the_room_to_smaller_ones(bench: Bench, direction: str) -> None:
    """And both families have one bucket; a GSO frame is a packet of all its bytes."""
    pod, peer = bench.train_0, bench.web
    large, small = frame_between(pod, peer, 4, "tcp", 3000), frame_between(pod, peer, 6, "tcp", 100)
    bench.limit(pod if direction == "egress" else peer, **{direction: len(large) + 2 * len(small)})
    assert bench.from_pod(pod, large, gso=(1000, 3)).verdict == REDIRECT
    dropped(bench.from_pod(pod, large, gso=(1000, 3)), pod if direction == "egress" else peer, direction)
    assert [bench.from_pod(pod, small).verdict for _ in range(3)] == [REDIRECT, REDIRECT, SHOT]


def ways_in(bench: Bench, version: int, entered: ServiceEntries) -> dict[str, Callable[[], Outcome]]:
    """Of a packet into `web`, but for the one from a pod; what they need is there already."""
    web, icmp = bench.web, {4: ICMP, 6: ICMPV6}[version]
    port = outside_port(out(bench, web, "udp", version))
    own = Ip(UPLINK[version], FAR[version], UDP, packets.udp(port, 7000, b"request"))
    error = packets.icmp(3 if version == 4 else 1, 0, b"")[:8] + bytes(own)
    entered.put(7, version, 30080, "udp", [(web.addresses[version], 8080)], scope=OUTSIDE)
    host = Ip(GATEWAYS[version], web.addresses[version], UDP, payload("udp"))
    nodeport = Ip(FAR[version], UPLINK[version], UDP, packets.udp(40000, 30080, b"question"))
    return {
        "from the host": lambda: bench.from_host(host_frame(host)),
        "an answer from outside": lambda: back(bench, "udp", version, port),
        "an error about what it sent": lambda: bench.from_outside(
            uplink_frame(Ip(FAR[version], UPLINK[version], icmp, error))
        ),
        "to a NodePort": lambda: bench.from_outside(uplink_frame(nodeport)),
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_every_way_into_a_pod(bench: Bench, version: int) -> None:
    for name in ("services", "backends", "members", "affinity"):
        bench.clear(name)
    bench.datapath.change_node(lambda node: replace(node, maglev_size=MAGLEV_PLACES))
    with ServiceEntries(bench.lab.pins) as entered:
        ways = ways_in(bench, version, entered)
        for name, way in ways.items():
            assert way().verdict == REDIRECT, name
        bench.limit(bench.web, ingress=NOTHING)
        for way in ways.values():
            dropped(way(), bench.web, "ingress")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_way_out_of_a_pod(bench: Bench, version: int) -> None:
    """Nothing is entered or translated for what does not go."""
    pod = bench.web
    frames = [
        frame_between(pod, bench.train_0, version),
        pod_frame(pod, to(pod, FAR[version], version, UDP, payload("udp"))),
        pod_frame(pod, to(pod, GATEWAYS[version], version, UDP, payload("udp"))),
    ]
    for frame in frames:
        assert bench.from_pod(pod, frame).verdict == REDIRECT
    bench.clear("flows")
    bench.limit(pod, egress=NOTHING)
    for frame in frames:
        dropped(bench.from_pod(pod, frame), pod, "egress")
    assert entries(bench) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_who_may_not_talk_to_a_pod_takes_nothing_of_its_share(bench: Bench, version: int) -> None:
    """A sender pays for itself in any case."""
    pod, peer = bench.train_0, bench.web
    frame = frame_between(pod, peer, version)
    bench.limit(peer, ingress=len(frame))
    bench.limit(pod, egress=COUNT * len(frame) + len(frame))
    select(bench, peer, 7, ingress=7)
    for _ in range(COUNT):
        assert bench.from_pod(pod, frame).drops == {(peer.id, "policy_ingress"): 1}
    select(bench, peer, 0)
    assert bench.from_pod(pod, frame).verdict == REDIRECT
    dropped(bench.from_pod(pod, frame), pod, "egress")


@pytest.mark.parametrize("version", VERSIONS)
def test_roce_is_not_limited(bench: Bench, version: int) -> None:
    pod, peer = bench.train_0, bench.train_1
    for one in (pod, peer):
        bench.limit(one, ingress=NOTHING, egress=NOTHING)
    roce = pod_frame(pod, between(pod, peer, version, UDP, packets.roce(17)))
    for _ in range(COUNT):
        assert bench.from_pod(pod, roce).verdict == REDIRECT
    dropped(bench.from_pod(pod, frame_between(pod, peer, version)), pod, "egress")


def entry_of(bench: Bench, pod: Pod, direction: str) -> tuple[bytes, dict[str, int]]:
    key = layout.U32.pack(2 * bench.slot_of(pod) + (direction == "ingress"))
    raw = bpf.lookup(bench.map("limits"), key, LIMIT.size)
    assert raw is not None
    return key, dict(zip((name for name, _ in LIMIT.fields), map(int, LIMIT.unpack(raw)), strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_bucket_fills_with_time(bench: Bench, direction: str) -> None:
    """As if time had passed: the clock in the entry is put back."""
    pod, peer = bench.train_0, bench.web
    limited, frame = (pod if direction == "egress" else peer), frame_between(pod, peer, 4)
    bench.limit(limited, **{direction: COUNT * len(frame)})
    results = []
    for frames in (COUNT, 2, COUNT):
        passed = 0
        while bench.from_pod(pod, frame).verdict == REDIRECT:
            passed += 1
        results.append(passed)
        key, entry = entry_of(bench, limited, direction)
        assert entry["next_ns"] > time.monotonic_ns()
        # A byte takes a second; half a frame more is not enough for another one.
        entry["next_ns"] -= min(2 * len(frame) + len(frame) // 2, entry["burst_ns"]) * 10**9 if frames == COUNT else 0
        if frames == 2:
            entry["next_ns"] = time.monotonic_ns() - 10**9
        bpf.update(bench.map("limits"), key, LIMIT.pack(*entry.values()))
    assert results == [COUNT, 2, COUNT]


@pytest.mark.parametrize("bits_per_s", [1000, 10**6, 10**9, 10**11, 10**12, 10**15])
def test_the_numbers_of_a_rate(bench: Bench, bits_per_s: int) -> None:
    """Of the time that a byte takes no more is lost than 1/8 at the fastest, and no number is too large."""
    limit = Limit(bits_per_s, 2**29)
    bench.datapath.set_bandwidth(bench.web.id, Bandwidth(egress=limit))
    assert bench.datapath.bandwidth(bench.web.id) == Bandwidth(egress=limit)
    _, entry = entry_of(bench, bench.web, "egress")
    exact = 8 * 10**9 * 2**20 / bits_per_s
    assert 7 / 8 * exact <= entry["byte_time"] <= exact
    assert entry["burst_ns"] == 8 * 10**9 * 2**29 // bits_per_s
    assert (512 * 1024 * entry["byte_time"]) < 2**64
    assert time.monotonic_ns() + entry["burst_ns"] + 2**50 < 2**63


def test_the_same_limit_again_fills_no_bucket(bench: Bench) -> None:
    pod, peer = bench.train_0, bench.web
    frame = frame_between(pod, peer, 6)
    for _ in range(2):
        bench.limit(pod, egress=len(frame))
    assert bench.from_pod(pod, frame).verdict == REDIRECT
    bench.limit(pod, egress=len(frame))
    dropped(bench.from_pod(pod, frame), pod, "egress")
    bench.limit(pod, egress=len(frame) + 1)
    assert bench.from_pod(pod, frame).verdict == REDIRECT
    bench.limit(pod)
    for _ in range(COUNT):
        assert bench.from_pod(pod, frame).verdict == REDIRECT


def near_places(bench: Bench, pod: Pod) -> list[bool]:
    """Whether its entries have places of their own: of what it sends, of each family to it."""
    place = layout.U32.pack(pod.ifindex % layout.NEAR_PLACES)
    raw = bpf.lookup(bench.map("near_attachment"), place, layout.NEAR_ATTACHMENT.size)
    assert raw is not None
    found = [raw[:4] == layout.U32.pack(pod.ifindex)]
    for version in VERSIONS:
        key = address_key(pod.addresses[version])
        place = layout.U32.pack(layout.near_endpoint_place(key))
        raw = bpf.lookup(bench.map("near_endpoint"), place, layout.NEAR_ENDPOINT.size)
        assert raw is not None
        found.append(raw[:16] == key)
    return found


def test_the_short_way_is_for_those_without_a_limit(bench: Bench) -> None:
    """They have a place near by; a limited pod has none, also when something else of its entries changes."""
    pod = bench.train_0
    assert near_places(bench, pod) == [True, True, True]
    keys = [address_key(address) for address in pod.addresses.values()]
    for limits, places in (
        ({"egress": 9}, [False, True, True]),
        ({"ingress": 9}, [True, False, False]),
        ({"ingress": 9, "egress": 9}, [False, False, False]),
        ({}, [True, True, True]),
    ):
        bench.limit(pod, **limits)
        assert near_places(bench, pod) == places, limits
        for number in (7, 0):
            bench.datapath.set_policy(pod.id, keys, (number, number, number))
            assert near_places(bench, pod) == places, limits


def test_another_owner_of_the_slot_is_not_limited(bench: Bench) -> None:
    """Nor is an attachment whose numbers are cleared while it is there freed from its limits."""
    datapath, ifindex = bench.datapath, 100_000
    mine = Bandwidth(ingress=Limit(10**6, 2**20), egress=Limit(10**7, 2**21))
    datapath.set_attachment(ifindex, AttachmentEntry(500, bytes(6), limited=True))
    datapath.set_bandwidth(500, mine)
    datapath.forget(500)
    assert datapath.bandwidth(500) == mine
    with Datapath.open(bench.lab.artifact, bench.lab.pins) as another:
        assert another.bandwidth(500) == mine
    (slot,) = [
        layout.attachment_slot(raw)[1]
        for key in bench.keys("attachments")
        if (raw := bpf.lookup(bench.map("attachments"), key, layout.ATTACHMENT.size))
        and layout.attachment_slot(raw)[0] == 500
    ]
    datapath.delete_attachment(ifindex)
    datapath.forget(500)
    datapath.set_attachment(ifindex, AttachmentEntry(501, bytes(6)))
    raw = bpf.lookup(bench.map("attachments"), layout.U32.pack(ifindex), layout.ATTACHMENT.size)
    assert raw is not None
    assert layout.attachment_slot(raw) == (501, slot)
    assert (datapath.bandwidth(500), datapath.bandwidth(501)) == (UNLIMITED, UNLIMITED)
    datapath.delete_attachment(ifindex)
    datapath.forget(501)


def test_cpus_pay_into_one_clock(bench: Bench) -> None:
    """What several let through at once is paid for: each may be one packet ahead where the bucket ends, and one may be
    forgotten where it was full."""
    pod, peer, count, runs = bench.train_0, bench.web, 400, 400
    frame = frame_between(pod, peer, 4)
    bench.limit(pod, egress=count * len(frame))
    cpus = sorted(os.sched_getaffinity(0))
    passed = dict.fromkeys(cpus, 0)
    program, begin = bench.datapath.dispatcher("pod"), threading.Barrier(len(cpus))
    context = bytearray(192)
    context[40:44] = pod.ifindex.to_bytes(4, "little")

    def run(cpu: int) -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cpu})
        try:
            begin.wait()
            for _ in range(runs):
                passed[cpu] += bpf.run_program(program, frame, bytes(context)).verdict == REDIRECT
        finally:
            os.sched_setaffinity(0, before)

    threads = [threading.Thread(target=bench.lab.host.run, args=(partial(run, cpu),)) for cpu in cpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count <= sum(passed.values()) <= count + 2 * len(cpus), passed
