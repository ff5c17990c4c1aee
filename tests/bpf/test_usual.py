"""The usual packet's short way (bpf/usual.h) says what the long one says, and entries near and far are the same."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.maps import AttachmentEntry, Datapath, EndpointEntry
from rdmanet.model import address_key
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, Bench, Outcome, between, pod_frame, rewritten
from testbed.bpf.lab import GATEWAY_MAC, Pod
from testbed.bpf.packets import ACK, FIN, RST, SYN, TCP, UDP
from tests.bpf.flows import ALIAS, REPLIED, TRANSLATED, entries
from tests.bpf.test_policy import select

VERSIONS = (4, 6)
NEAR = ("near_attachment", "near_endpoint")
CHANGED_FRAMES = 1000


def clear_near(bench: Bench) -> None:
    """As if every place belonged to somebody else: all is looked up by hash."""
    for name in NEAR:
        definition = bench.lab.artifact.maps[name]
        for place in range(definition.max_entries):
            bpf.update(bench.map(name), layout.U32.pack(place), bytes(definition.value_size))


def usual_frames(bench: Bench) -> list[bytes]:
    pod, peer = bench.train_0, bench.train_1
    payloads = [(TCP, packets.tcp(1, 2)), (UDP, packets.udp(1, 2)), (UDP, packets.udp(1, 2, b""))]
    payloads.append((UDP, packets.roce(17)))
    return [pod_frame(pod, between(pod, peer, v, *payload)) for v in VERSIONS for payload in payloads]


def changed_frames(bench: Bench) -> list[bytes]:
    """Usual frames with one to three of their header's bytes changed, or cut short."""
    chance = random.Random(4791)
    frames = usual_frames(bench)
    found = []
    for _ in range(CHANGED_FRAMES):
        frame = bytearray(chance.choice(frames))
        # The kernel reads the EtherType itself and refuses shorter frames (tests/bpf/test_fuzz.py).
        least = 34 if frame[12:14] == b"\x08\x00" else 54
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(min(len(frame), least + 14))
            if place not in (12, 13):
                frame[place] = chance.choice((0, 1, 0xFF, frame[place] ^ 1 << chance.randrange(8)))
        if chance.random() < 0.2:
            frame = frame[: chance.randint(least, len(frame))]
        found.append(bytes(frame))
    return found


def outcomes(bench: Bench, frames: list[bytes]) -> list[Outcome]:
    return [bench.from_pod(bench.train_0, frame) for frame in frames]


def begin_all(bench: Bench) -> None:
    """A flow for each usual frame."""
    for frame in usual_frames(bench):
        bench.from_pod(bench.train_0, frame)


def test_near_and_far_say_the_same(bench: Bench) -> None:
    frames = usual_frames(bench) + changed_frames(bench)
    begin_all(bench)
    near, near_flows = outcomes(bench, frames), flow_states(bench)
    bench.reset()
    begin_all(bench)
    clear_near(bench)
    far, far_flows = outcomes(bench, frames), flow_states(bench)
    assert near == far
    assert near_flows == far_flows
    assert sum(outcome.verdict == REDIRECT for outcome in near) > len(frames) // 20, "nearly all were malformed"
    assert len({outcome.reason for outcome in near}) > 5


def flow_states(bench: Bench) -> dict[bytes, dict[str, int | bytes]]:
    """Everything but times."""
    return {
        entry.key: {name: value for name, value in entry.fields.items() if not name.endswith("_ns")}
        for entry in entries(bench)
    }


#: What a flow's entry says when the next packet comes.
STATES: dict[str, dict[str, int]] = {
    "as it began": {},
    "replied": {"flags": REPLIED},
    "origin closing": {"closing": 1},
    "target closing": {"closing": 2, "flags": REPLIED},
    "closed": {"closing": 3, "flags": REPLIED},
    "another epoch": {"epoch": 0xFFFFFFFF},
    "another epoch, replied": {"epoch": 0xFFFFFFFF, "flags": REPLIED},
    "translated": {"flags": TRANSLATED},
    "an alias": {"flags": TRANSLATED | ALIAS},
    "an earlier pod's": {"origin": 4_000_000},
    "to an earlier pod": {"target": 4_000_000},
    "idle for 50 s": {"last_seen_ns": 50},
    "idle for 61 s": {"last_seen_ns": 61},
    "stale where it is opening": {"last_seen_ns": 250},
    "stale but for TCP": {"last_seen_ns": 400, "flags": REPLIED},
    "stale": {"last_seen_ns": 7500},
    "seen a moment from now": {"last_seen_ns": -5},
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("state", STATES)
def test_short_and_long_do_the_same_to_a_flow(bench: Bench, state: str, protocol: int, version: int) -> None:
    """Whatever it says, in both directions, under policy that allows only the direction in which it began."""
    changes = dict(STATES[state])
    if "last_seen_ns" in changes:
        changes["last_seen_ns"] = time.monotonic_ns() - changes["last_seen_ns"] * 10**9
    pods = (bench.train_0, bench.train_1)

    def packet(source: int, flags: int) -> bytes:
        ports = (1, 2) if source == 0 else (2, 1)
        payload = packets.tcp(*ports, flags) if protocol == TCP else packets.udp(*ports)
        return pod_frame(pods[source], between(pods[source], pods[1 - source], version, protocol, payload))

    def results() -> list[object]:
        found: list[object] = []
        for number, flags in ((0, ACK), (1, ACK), (0, FIN | ACK), (1, SYN), (1, RST)):
            for name in ("flows", "fragments"):
                bench.clear(name)
            for pod in pods:
                bench.set_flow_count(pod, 0)
            begun = bench.from_pod(pods[0], packet(0, ACK))
            (entry,) = entries(bench)
            flags_now = int(entry.fields["flags"]) | changes.get("flags", 0)
            before = {**changes, "flags": flags_now}
            entry.write(bench, **before)
            outcome = bench.from_pod(pods[number], packet(number, flags))
            (after,) = entries(bench)
            seen_ns = int(after.fields["last_seen_ns"]) > changes.get("last_seen_ns", 0)
            found.append((begun, outcome, flow_states(bench), seen_ns, [bench.flow_count(pod) for pod in pods]))
        return found

    select(bench, pods[1], 7, egress=7)
    near = results()
    clear_near(bench)
    assert results() == near


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gso", [(0, 0), (500, 3)])
def test_the_short_way_counts_and_delivers(bench: Bench, version: int, gso: tuple[int, int]) -> None:
    body = packets.tcp(1, 2, payload=b"x" * 1000)
    frame = pod_frame(bench.train_0, between(bench.train_0, bench.web, version, TCP, body))
    bench.from_pod(bench.train_0, frame)
    outcome = bench.from_pod(bench.train_0, frame, gso=gso)
    assert (outcome.verdict, outcome.frame) == (REDIRECT, rewritten(frame, bench.web.mac))
    count = gso[1] or 1
    assert outcome.counters == {(bench.train_0.id, "from_pod", "ip"): count, (bench.web.id, "to_pod", "ip"): count}


def sharing(pod: Pod, version: int) -> str:
    """An address that nobody has, whose place is the pod's address's."""
    network = {4: "10.91.", 6: "fd91::"}[version]
    if version == 4:
        return network + ".".join(pod.addresses[4].split(".")[2:])
    return network + pod.addresses[6].rsplit("::", 1)[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_place_is_the_first_comers(bench: Bench, version: int) -> None:
    """A second address of the same place is looked up by hash, before and after the first one goes."""
    web, other = bench.web, address_key(sharing(bench.web, version))
    place = layout.near_endpoint_place(other)
    assert place == layout.near_endpoint_place(address_key(web.addresses[version]))
    bench.datapath.set_endpoint(other, EndpointEntry(web.ifindex, web.mac, web.id))

    def delivered(address: str) -> bool:
        ip = packets.Ip(bench.train_0.addresses[version], address, TCP, packets.tcp(1, 2))
        return bench.from_pod(bench.train_0, pod_frame(bench.train_0, ip)).frame[:6] == web.mac

    raw = bpf.lookup(bench.map("near_endpoint"), layout.U32.pack(place), layout.NEAR_ENDPOINT.size)
    assert raw is not None
    assert raw[:16] == address_key(web.addresses[version])
    assert delivered(sharing(web, version))
    assert delivered(web.addresses[version])
    bench.datapath.delete_endpoint(address_key(web.addresses[version]))
    assert delivered(sharing(web, version))
    assert not delivered(web.addresses[version])
    bench.datapath.delete_endpoint(other)
    assert not delivered(sharing(web, version))


def test_what_left_its_place_is_gone(bench: Bench) -> None:
    datapath, ifindex = bench.datapath, 100_000
    for _ in range(2):
        datapath.set_attachment(ifindex, AttachmentEntry(500, bytes(6)))
        second = AttachmentEntry(501, GATEWAY_MAC)
        datapath.set_attachment(ifindex + layout.NEAR_PLACES, second)
        assert datapath.attachments()[ifindex + layout.NEAR_PLACES] == second
        datapath.delete_attachment(ifindex)
        datapath.delete_attachment(ifindex + layout.NEAR_PLACES)
        place = layout.U32.pack(ifindex % layout.NEAR_PLACES)
        raw = bpf.lookup(bench.map("near_attachment"), place, layout.NEAR_ATTACHMENT.size)
        assert raw == bytes(layout.NEAR_ATTACHMENT.size)
        datapath.forget(500)
        datapath.forget(501)


def test_slots_outlive_the_agent(bench: Bench) -> None:
    """Another agent finds each attachment's counters where they are, and gives their place to nobody else."""
    frame = pod_frame(bench.train_0, between(bench.train_0, bench.web, 4))
    bench.from_pod(bench.train_0, frame)
    before = bench.datapath.counters()
    with Datapath.open(bench.lab.artifact, bench.lab.pins) as other:
        assert other.counters() == before != {}
        other.set_attachment(200_000, AttachmentEntry(700, bytes(6)))
        other.set_attachment(bench.web.ifindex, other.attachments()[bench.web.ifindex])
        assert other.counters() == before
        raw = bpf.lookup(bench.map("attachments"), layout.U32.pack(200_000), layout.ATTACHMENT.size)
        assert raw is not None
        taken = {layout.attachment_slot(value)[1] for _, value in other._items("attachments")}
        assert len(taken) == len(bench.lab.pods) + 1
        other.delete_attachment(200_000)
        other.forget(700)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_flow_that_was_taken_out_of_the_table_begins_anew_with_the_next_tick(bench: Bench, version: int) -> None:
    frame = pod_frame(bench.train_0, between(bench.train_0, bench.train_1, version))
    bench.from_pod(bench.train_0, frame)
    (before,) = entries(bench)
    before.write(bench, flags=int(before.fields["flags"]) | REPLIED)
    bench.from_pod(bench.train_0, frame)
    bpf.delete(bench.map("flows"), before.key)
    # No tick is so long.
    until = time.monotonic() + 10
    while not entries(bench) and time.monotonic() < until:
        assert bench.from_pod(bench.train_0, frame).verdict == REDIRECT
    (after,) = entries(bench)
    assert not int(after.fields["flags"]) & REPLIED


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_known_of_a_flow_is_known_under_one_epoch(bench: Bench, version: int) -> None:
    """Whatever the tick: a change bites with the next packet. Most of these attempts are within one."""
    frame = pod_frame(bench.train_0, between(bench.train_0, bench.train_1, version))
    bench.from_pod(bench.train_0, frame)
    select(bench, bench.train_1, 7, ingress=7)
    for _ in range(50):
        assert bench.from_pod(bench.train_0, frame).verdict == REDIRECT
        bench.datapath.change_node(lambda node: replace(node, epoch=node.epoch + 1))
        assert bench.from_pod(bench.train_0, frame).drops == {(bench.train_1.id, "policy_ingress"): 1}
        bench.datapath.change_node(lambda node: replace(node, epoch=node.epoch - 1))
