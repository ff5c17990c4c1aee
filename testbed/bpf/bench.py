"""Runs single programs on single packets in a lab with real devices and routes, and tells what they did."""

from __future__ import annotations

import ipaddress
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.artifact import CONTINUATIONS, HOOKS, Artifact
from rdmanet.datapath.maps import NodeEntry, UplinkEntry
from rdmanet.model import UNLIMITED, Bandwidth, Limit, address_key
from testbed.bpf import lab as labs
from testbed.bpf import packets
from testbed.bpf.lab import FAR, GATEWAY_MAC, GATEWAYS, Lab, Pod
from testbed.bpf.packets import FRAGMENT, HOP_BY_HOP, ICMP, ICMPV6, TCP, UDP, Ip

# include/uapi/linux/pkt_cls.h
UNSPEC, OK, SHOT, STOLEN, REDIRECT = 0xFFFFFFFF, 0, 2, 4, 7

SLOTS = {**HOOKS, **CONTINUATIONS}

#: Where the route leads to a device that is no uplink, and where routes end.
NOT_UPLINK = {4: "192.0.2.9", 6: "2001:db8:300::9"}
BLACKHOLE = {4: "192.0.2.129", 6: "2001:db8:301::1"}
UNREACHABLE = {4: "192.0.2.161", 6: "2001:db8:302::1"}
PROHIBIT = {4: "192.0.2.193", 6: "2001:db8:303::1"}
_ROUTE_TYPES = {"blackhole": BLACKHOLE, "unreachable": UNREACHABLE, "prohibit": PROHIBIT}


@dataclass(frozen=True)
class Outcome:
    """What one run did: verdict, the frame afterwards, what was counted in it."""

    verdict: int
    frame: bytes
    drops: dict[tuple[int, str], int]
    counters: dict[tuple[int, str, str], int]  # packets

    @property
    def reason(self) -> str | None:
        """The drop's name, when exactly one packet was dropped."""
        return next(iter(self.drops))[1] if len(self.drops) == 1 else None


class Bench:
    """Two pods with devices, one without, one that enforces; a second device in the host that is no uplink."""

    def __init__(self, lab: Lab, plain_ifindex: int):
        self.lab = lab
        self.datapath = lab.datapath
        self.plain_ifindex = plain_ifindex  # of a link that rdmanet knows nothing of
        self.train_0, self.train_1, self.web, self.strict = lab.pods

    @classmethod
    @contextmanager
    def build(cls, artifact: Artifact) -> Iterator[Bench]:
        with Lab.build(artifact, filters=False) as lab:
            for device, enforce in ((True, False), (True, False), (False, False), (True, True)):
                lab.add_pod(device=device, enforce=enforce)
            with lab.host.route() as route:
                route.add_veth("plain0", "02:72:6e:00:00:30", 1500, peer_name="plain1", peer_mac="02:72:6e:00:00:31")
                plain = route.link("plain0")
                other = route.link("plain1")
                assert plain is not None
                assert other is not None
                route.set_up(plain.index)
                route.set_up(other.index)
                for destination in NOT_UPLINK.values():
                    route.add_route(ipaddress.ip_network(destination), plain.index)
            lab.host_routes(_ROUTE_TYPES)
            yield cls(lab, plain.index)

    def reset(self) -> None:
        """Empty tables, the usual entries."""
        for name in ("guard", "datagrams", "counters", "flows_begun", "drops", "uplinks"):
            self.clear(name)
        for name in ("flows", "fragments", "waiting", "policy", "prefixes"):
            self.clear(name)
        for pod in self.lab.pods:
            self.set_flow_count(pod, 0)
            self.datapath.set_bandwidth(pod.id, UNLIMITED)
        self.datapath.configure(NodeEntry(GATEWAY_MAC, self.lab.host_ifindex, True, labs.FIRST_PORT, labs.LAST_PORT))
        self.datapath.set_uplink(
            self.lab.uplink_ifindex, UplinkEntry(address_key(labs.UPLINK[4]), address_key(labs.UPLINK[6]))
        )
        for pod in self.lab.pods:
            self.lab.write_entries(pod)

    def clear(self, name: str) -> None:
        if name in ("counters", "flows_begun"):
            definition = self.lab.artifact.maps[name]
            zeros = bytes(bpf.buffer_bytes(definition.type, definition.value_size))
            for pod in self.lab.pods:
                bpf.update(self.map(name), layout.U32.pack(self.slot_of(pod)), zeros)
            return
        for key in self.keys(name):
            bpf.delete(self.map(name), key)
        if name == "flows":
            self.forget_known()

    def forget_known(self) -> None:
        """What the short way knows of the table for the rest of the tick: call when entries of flows are changed."""
        definition = self.lab.artifact.maps["known_flows"]
        keys = b"".join(layout.U32.pack(place) for place in range(definition.max_entries))
        room = bpf.buffer_bytes(definition.type, definition.value_size) * definition.max_entries
        bpf.update_batch(self.map("known_flows"), keys, bytes(room), definition.max_entries)

    def slot_of(self, pod: Pod) -> int:
        """The place of the pod's counters."""
        raw = bpf.lookup(self.map("attachments"), layout.U32.pack(pod.ifindex), layout.ATTACHMENT.size)
        return 0 if raw is None else layout.attachment_slot(raw)[1]

    def flow_count(self, pod: Pod) -> int:
        """How many flows the pod's share of the table has."""
        raw = bpf.lookup(self.map("flow_counts"), layout.U32.pack(self.slot_of(pod)), 8)
        return 0 if raw is None else int.from_bytes(raw, sys.byteorder)

    def set_flow_count(self, pod: Pod, count: int) -> None:
        bpf.update(self.map("flow_counts"), layout.U32.pack(self.slot_of(pod)), layout.U64.pack(count))

    def keys(self, name: str) -> list[bytes]:
        definition = self.lab.artifact.maps[name]
        return list(bpf.keys(self.map(name), definition.key_size, definition.max_entries))

    def map(self, name: str) -> int:
        return self.lab.map(name)

    def run(self, hook: str, frame: bytes, ifindex: int, *, gso: tuple[int, int] = (0, 0)) -> Outcome:
        """Runs the hook's program through its dispatcher as tc would; ``gso``: bytes per segment, segments."""
        return self.run_program(self.datapath.dispatcher(hook), frame, ifindex, gso=gso)

    def run_program(self, program: int, frame: bytes, ifindex: int, *, gso: tuple[int, int] = (0, 0)) -> Outcome:
        for name in ("counters", "flows_begun", "drops"):
            self.clear(name)
        context = bytearray(192)  # struct __sk_buff
        struct.pack_into("=I", context, 40, ifindex)
        struct.pack_into("=I", context, 164, gso[1])
        struct.pack_into("=I", context, 176, gso[0])
        done = self.lab.host.run(lambda: bpf.run_program(program, frame, bytes(context)))
        return Outcome(
            done.verdict,
            done.packet,
            {key: packets for key, packets in self.datapath.drops().items() if packets},
            {key: count.packets for key, count in self.datapath.counters().items()},
        )

    def limit(self, pod: Pod, *, ingress: int | None = None, egress: int | None = None) -> None:
        """Limits the pod to bursts of so many bytes, and after that to a byte a second."""
        limits = [None if burst is None else Limit(8, burst) for burst in (ingress, egress)]
        self.datapath.set_bandwidth(pod.id, Bandwidth(*limits))
        entry = self.datapath.attachment(pod.ifindex)
        assert entry is not None
        self.datapath.set_attachment(pod.ifindex, replace(entry, limited=egress is not None))
        for key in map(address_key, pod.addresses.values()):
            endpoint = self.datapath.endpoint(key)
            assert endpoint is not None
            self.datapath.set_endpoint(key, replace(endpoint, limited=ingress is not None))

    def slot(self, hook: str) -> int:
        """The id of the program in the hook's slot, 0 when it is empty."""
        raw = bpf.lookup(self.map("programs"), layout.U32.pack(SLOTS[hook]), 4)
        return 0 if raw is None else int(struct.unpack("=I", raw)[0])

    @contextmanager
    def empty_slot(self, hook: str) -> Iterator[None]:
        """The hook's program is in its slot again afterwards."""
        program = bpf.program_by_id(self.slot(hook))
        assert program is not None
        try:
            bpf.delete(self.map("programs"), layout.U32.pack(SLOTS[hook]))
            yield
        finally:
            bpf.update(self.map("programs"), layout.U32.pack(SLOTS[hook]), layout.U32.pack(program))
            os.close(program)

    def from_pod(self, pod: Pod, frame: bytes, *, gso: tuple[int, int] = (0, 0)) -> Outcome:
        return self.run("pod", frame, pod.ifindex, gso=gso)

    def from_host(self, frame: bytes) -> Outcome:
        return self.run("host", frame, self.lab.peer_ifindex)

    def from_outside(self, frame: bytes) -> Outcome:
        return self.run("uplink", frame, self.lab.uplink_ifindex)


def pod_frame(pod: Pod, ip: packets.Ip) -> bytes:
    """As the pod's stack sends it: to the gateway."""
    ethertype = packets.ETHERTYPE_IPV4 if ip.version == 4 else packets.ETHERTYPE_IPV6
    return packets.ethernet(GATEWAY_MAC, pod.mac, ethertype, bytes(ip))


def uplink_frame(ip: packets.Ip) -> bytes:
    """As it comes in from outside."""
    ethertype = packets.ETHERTYPE_IPV4 if ip.version == 4 else packets.ETHERTYPE_IPV6
    ours, theirs = bytes.fromhex("02726e000020"), bytes.fromhex("02726e000021")
    return packets.ethernet(ours, theirs, ethertype, bytes(ip))


def host_frame(ip: packets.Ip) -> bytes:
    """As it comes out of rdmanet1: both ends have the gateway's MAC."""
    ethertype = packets.ETHERTYPE_IPV4 if ip.version == 4 else packets.ETHERTYPE_IPV6
    return packets.ethernet(GATEWAY_MAC, GATEWAY_MAC, ethertype, bytes(ip))


def between(
    source: Pod, destination: Pod, version: int, protocol: int = packets.TCP, payload: bytes | None = None
) -> packets.Ip:
    payload = packets.tcp(40000, 80) if payload is None else payload
    return packets.Ip(source.addresses[version], destination.addresses[version], protocol, payload)


def to(
    source: Pod, destination: str, version: int, protocol: int = packets.TCP, payload: bytes | None = None
) -> packets.Ip:
    payload = packets.tcp(40000, 80) if payload is None else payload
    return packets.Ip(source.addresses[version], destination, protocol, payload)


def rewritten(frame: bytes, destination_mac: bytes, source_mac: bytes = GATEWAY_MAC) -> bytes:
    return destination_mac + source_mac + frame[12:]


def good_frames(bench: Bench) -> dict[str, bytes]:
    """One good packet of each kind, from train_0."""
    pod, peer = bench.train_0, bench.train_1
    four, six = pod.addresses[4], pod.addresses[6]
    extensions = packets.extension(FRAGMENT, HOP_BY_HOP) + packets.extension(UDP, FRAGMENT, more=True)
    body = packets.arp(1, pod.mac, four, GATEWAYS[4])
    return {
        "tcp4": pod_frame(pod, Ip(four, peer.addresses[4], TCP, packets.tcp(1, 2))),
        "tcp6": pod_frame(pod, Ip(six, peer.addresses[6], TCP, packets.tcp(1, 2))),
        "udp4-outside": pod_frame(pod, Ip(four, FAR[4], UDP, packets.udp(1, 2))),
        "udp6-outside": pod_frame(pod, Ip(six, FAR[6], UDP, packets.udp(1, 2))),
        "echo4-host": pod_frame(pod, Ip(four, GATEWAYS[4], ICMP, packets.icmp(8, 1))),
        "echo6-host": pod_frame(pod, Ip(six, GATEWAYS[6], ICMPV6, packets.icmp(128, 1))),
        "roce4": pod_frame(pod, Ip(four, peer.addresses[4], UDP, packets.roce(17))),
        "roce6": pod_frame(pod, Ip(six, peer.addresses[6], UDP, packets.roce(17))),
        "datagram4": pod_frame(pod, Ip(four, peer.addresses[4], UDP, packets.datagram(17, 20))),
        "datagram6": pod_frame(pod, Ip(six, peer.addresses[6], UDP, packets.datagram(17, 20))),
        "options4": pod_frame(pod, Ip(four, peer.addresses[4], UDP, packets.roce(17), options=b"\x01" * 40)),
        "extensions6": pod_frame(
            pod, Ip(six, peer.addresses[6], UDP, packets.roce(17), options=extensions, first=HOP_BY_HOP)
        ),
        "arp": packets.ethernet(b"\xff" * 6, pod.mac, packets.ETHERTYPE_ARP, body),
    }
