"""The bandwidth class: what the pod hook writes into RoCE packets, and into no others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.maps import AttachmentEntry
from rdmanet.model import address_key
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, Bench, between, pod_frame, rewritten, to
from testbed.bpf.lab import GATEWAYS, Pod
from testbed.bpf.packets import UDP, Ip

VERSIONS = (4, 6)
CLASS = 0x68  # CS3, a usual choice for RoCE
#: Offset in the frame of the IPv4 header's checksum.
CHECKSUM = slice(14, 34)


def frame_with(pod: Pod, ip: Ip, traffic_class: int) -> bytes:
    """The frame with this byte for class and ECN, its checksum right."""
    frame = bytearray(pod_frame(pod, ip))
    if ip.version == 6:
        frame[14] = 0x60 | traffic_class >> 4
        frame[15] = (traffic_class & 15) << 4 | frame[15] & 15
        return bytes(frame)
    frame[15] = traffic_class
    frame[24:26] = bytes(2)
    header = 14 + (frame[14] & 15) * 4
    frame[24:26] = packets.checksum(bytes(frame[14:header])).to_bytes(2, "big")
    return bytes(frame)


@pytest.fixture
def classed(bench: Bench) -> Bench:
    """train_0 has a class."""
    pod = bench.train_0
    ipv4, ipv6 = (address_key(pod.addresses[version]) for version in VERSIONS)
    entry = AttachmentEntry(pod.id, pod.mac, ipv4, ipv6, device=True, traffic_class=CLASS)
    bench.datapath.set_attachment(pod.ifindex, entry)
    return bench


def roce(bench: Bench, version: int) -> Ip:
    return between(bench.train_0, bench.train_1, version, UDP, packets.roce(17))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ecn", range(4))
@pytest.mark.parametrize("sent", [0x00, CLASS, 0xFC])
def test_the_pods_class_is_written_and_congestion_bits_stay(classed: Bench, sent: int, ecn: int, version: int) -> None:
    pod, ip = classed.train_0, roce(classed, version)
    outcome = classed.from_pod(pod, frame_with(pod, ip, sent | ecn))
    assert (outcome.verdict, outcome.drops) == (REDIRECT, {})
    wanted = frame_with(pod, ip, CLASS | ecn)
    assert outcome.frame == rewritten(wanted, classed.train_1.mac)
    if version == 4:
        assert packets.checksum(outcome.frame[CHECKSUM]) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_without_a_class_cannot_choose_one(bench: Bench, version: int) -> None:
    pod, ip = bench.train_0, roce(bench, version)
    outcome = bench.from_pod(pod, frame_with(pod, ip, 0xB9))
    assert outcome.frame == rewritten(frame_with(pod, ip, 0x01), bench.train_1.mac)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_flow_label_and_options_stay(classed: Bench, version: int) -> None:
    pod, ip = classed.train_0, roce(classed, version)
    if version == 4:
        ip = replace(ip, options=b"\x01" * 8)
    frame = bytearray(frame_with(pod, ip, 0))
    if version == 6:
        frame[15:18] = b"\x0a\xbc\xde"
    outcome = classed.from_pod(pod, bytes(frame))
    expected = bytearray(frame_with(pod, ip, CLASS))
    if version == 6:
        expected[15:18] = b"\x8a\xbc\xde"
    assert outcome.frame == rewritten(bytes(expected), classed.train_1.mac)


@pytest.mark.parametrize("version", VERSIONS)
def test_roce_to_the_host_has_it_too(classed: Bench, version: int) -> None:
    pod = classed.train_0
    ip = to(pod, GATEWAYS[version], version, UDP, packets.roce(17))
    outcome = classed.from_pod(pod, frame_with(pod, ip, 0))
    assert outcome.drops == {}
    assert outcome.frame[14:] == frame_with(pod, ip, CLASS)[14:]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("protocol", [packets.TCP, UDP])
def test_other_packets_keep_theirs(classed: Bench, protocol: int, version: int) -> None:
    pod = classed.train_0
    payload = packets.tcp(40000, 80) if protocol == packets.TCP else packets.udp(40000, 80)
    frame = frame_with(pod, between(pod, classed.train_1, version, protocol, payload), 0x29)
    assert classed.from_pod(pod, frame).frame == rewritten(frame, classed.train_1.mac)


def test_the_entry_holds_it_beside_its_flags(classed: Bench) -> None:
    pod = classed.train_0
    entry = classed.datapath.attachment(pod.ifindex)
    assert entry is not None
    assert (entry.traffic_class, entry.device, entry.enforce) == (CLASS, True, False)
    raw = bpf.lookup(classed.map("attachments"), layout.U32.pack(pod.ifindex), layout.ATTACHMENT.size)
    assert raw is not None
    assert raw[6] == CLASS
