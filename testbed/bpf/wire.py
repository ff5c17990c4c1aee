"""Packets on the wire between namespaces: sent by hand at one end, seen or not at the other.

What is seen was let through by whatever is between; that nothing more comes is known by fences: packets that always
pass, sent behind the others on the same processor, whose queue keeps their order.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rdmanet.model import IPAddress
from rdmanet.netlink.route import RouteSocket
from testbed.bpf import packets
from testbed.bpf.lab import FAR, GATEWAY_MAC, OUTSIDE, UPLINK, Lab, Namespace
from testbed.semantics.iptables import FENCE_PROTOCOL
from testbed.semantics.network_policy import Flow

ETH_P_ALL = 3
PACKET_OUTGOING = 4  # packet(7)
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
MARK = b"flow"
FIRST_SOURCE_PORT = 20_000
TIMEOUT_S = 30.0
#: That a packet waits in, at most: to the node, from its one device to the other, to the receiver.
QUEUES = 3
ECHO = {4: (packets.ICMP, 8), 6: (packets.ICMPV6, 128)}


@dataclass(frozen=True)
class Station:
    """An end of the wire: its eth0, the MAC behind which everybody else is, and an address to which fences come."""

    namespace: Namespace
    mac: bytes
    next_hop_mac: bytes
    address: str


def flow_packet(flow: Flow, number: int) -> packets.Ip:
    """The flow's first packet, marked with its number."""
    ports = FIRST_SOURCE_PORT + number, flow.port or 0
    return _packet(flow, ports, packets.SYN, ECHO[flow.source.version][1], MARK + struct.pack("!I", number))


def answer_packet(flow: Flow, number: int) -> packets.Ip:
    """What its other end would send back."""
    ports = flow.port or 0, FIRST_SOURCE_PORT + number
    reply = {4: 0, 6: 129}[flow.source.version]
    if flow.port is None:
        ports = ports[1], 0  # the request's identifier
    return _packet(_back(flow), ports, packets.SYN | packets.ACK, reply, b"answer")


def question_back(flow: Flow, number: int) -> tuple[packets.Ip, Flow] | None:
    """What would begin a flow the other way with the same ports or the same identifier; None where it looks like an
    answer."""
    own = FIRST_SOURCE_PORT + number
    if flow.protocol not in (packets.TCP, packets.ICMP, packets.ICMPV6):
        return None
    ports = (own, 0) if flow.port is None else (flow.port, own)
    back = _back(flow, None if flow.port is None else own)
    return _packet(back, ports, packets.SYN, ECHO[flow.source.version][1], b"question"), back


def _back(flow: Flow, port: int | None = None) -> Flow:
    return Flow(flow.destination, flow.source, flow.protocol, port)


def _packet(flow: Flow, ports: tuple[int, int], flags: int, echo: int, data: bytes) -> packets.Ip:
    match flow.protocol:
        case packets.TCP:
            payload = packets.tcp(*ports, flags, data)
        case packets.UDP:
            payload = packets.udp(*ports, data)
        case packets.ICMP | packets.ICMPV6:
            payload = packets.icmp(echo, ports[0], data)
        case _:  # ports where SCTP has them, then its tag and checksum, which nobody on the way looks at
            payload = struct.pack("!HHII", *ports, 0, 0) + data
    return packets.Ip(str(flow.source), str(flow.destination), flow.protocol, payload)


def first_frame(station: Station, flow: Flow, number: int) -> bytes:
    """The flow's first packet as a frame from there."""
    ip = flow_packet(flow, number)
    return packets.ethernet(station.next_hop_mac, station.mac, ethertype(ip.version), bytes(ip))


def ethertype(version: int) -> int:
    """Of the family."""
    return packets.ETHERTYPE_IPV4 if version == 4 else packets.ETHERTYPE_IPV6


@dataclass
class Wire:
    """Stations by the addresses that are there; fences come to all of them from the namespace in the middle."""

    stations: dict[IPAddress, Station]
    fence: socket.socket
    ends: dict[Station, tuple[socket.socket, socket.socket]]  # what sends and what sees

    @classmethod
    @contextmanager
    def open(cls, stations: dict[IPAddress, Station], fence_from: Namespace) -> Iterator[Wire]:
        """With a raw socket at each station."""
        with ExitStack() as stack:
            fence = stack.enter_context(fence_from.socket(socket.AF_INET, socket.SOCK_RAW, FENCE_PROTOCOL))
            ends = {
                station: (stack.enter_context(_sender(station)), stack.enter_context(_sniffer(station)))
                for station in stations.values()
            }
            yield cls(stations, fence, ends)

    def arrivals(self, flows: Sequence[Flow]) -> set[int]:
        """Sends the first packet of each flow; the places of those that came to where they go."""
        frames = [first_frame(self.stations[flow.source], flow, number) for number, flow in enumerate(flows)]
        return self.deliver(flows, frames)

    def deliver(self, flows: Sequence[Flow], frames: Sequence[bytes]) -> set[int]:
        """As ``arrivals``, with frames made by the caller, each sent where its flow begins."""

        def send() -> None:
            for flow, frame in zip(flows, frames, strict=True):
                self.ends[self.stations[flow.source]][0].send(frame)

        numbers = (_number(frame, flows) for _, frame in self.seen(send))
        return {number for number in numbers if number is not None}

    def seen(self, send: Callable[[], object]) -> list[tuple[Station, bytes]]:
        """What came to any station because of what ``send`` does."""
        for _, sniffer in self.ends.values():
            _drain(sniffer)
        _on_one_processor(send)
        # A fence comes behind what is in a queue already, and before what is queued again on its way.
        seen = []
        for _ in range(QUEUES):
            _on_one_processor(self._send_fences)
            for station, (_, sniffer) in self.ends.items():
                seen += [(station, frame) for frame in _until_fence(sniffer)]
        return seen

    def _send_fences(self) -> None:
        for station in self.ends:
            self.fence.sendto(b"fence", (station.address, 0))


def _on_one_processor(work: Callable[[], object]) -> None:
    """In a thread that stays on one processor: what it sends is dealt with in order."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            work()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def _sniffer(station: Station) -> Iterator[socket.socket]:
    with station.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer:
        sniffer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        sniffer.bind(("eth0", ETH_P_ALL))
        yield sniffer


@contextmanager
def _sender(station: Station) -> Iterator[socket.socket]:
    with station.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("eth0", 0))
        yield sender


def _drain(sniffer: socket.socket) -> None:
    """What came since the last time, mostly answers to what was sent then."""
    sniffer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sniffer.recv(1)


def _until_fence(sniffer: socket.socket) -> Iterator[bytes]:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        sniffer.settimeout(max(0.01, deadline - time.monotonic()))
        frame, where = sniffer.recvfrom(1 << 16)
        if where[2] == PACKET_OUTGOING:
            continue
        if _protocol(frame) == FENCE_PROTOCOL:
            return
        yield frame


def _protocol(frame: bytes) -> int | None:
    match int.from_bytes(frame[12:14], "big"):
        case packets.ETHERTYPE_IPV4:
            return frame[23]
        case packets.ETHERTYPE_IPV6:
            return frame[20]
    return None


def _number(frame: bytes, flows: Sequence[Flow]) -> int | None:
    """The flow's, if this is its packet where it goes to: what answers or errors quote of it goes elsewhere."""
    place = frame.rfind(MARK)
    if place < 0 or len(frame) < place + 8:
        return None
    (number,) = struct.unpack_from("!I", frame, place + 4)
    if number >= len(flows):
        return None
    flow: Flow = flows[number]
    destination = frame[30:34] if flow.destination.version == 4 else frame[38:54]
    if _protocol(frame) != flow.protocol or destination != flow.destination.packed:
        return None
    return int(number)


@dataclass
class Router:
    """Pods and a world outside around a namespace that forwards: where iptables decides."""

    namespace: Namespace
    pods: list[Namespace] = field(default_factory=list)
    stations: dict[IPAddress, Station] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def build(
        cls, pods: Sequence[tuple[IPAddress, ...]], outside: Sequence[IPAddress], node: Sequence[IPAddress]
    ) -> Iterator[Router]:
        """A namespace for each pod; those outside share one, behind the default route."""
        router = cls(Namespace())
        try:
            for family in ("ipv4", "ipv6"):
                router.namespace.sysctl(f"{family}/conf/all/forwarding", "1")
            with router.namespace.route() as route:
                loopback = route.link("lo")
                assert loopback is not None
                for address in node:
                    route.add_address(loopback.index, address, address.max_prefixlen)
            for number, addresses in enumerate(pods):
                router._connect(number, addresses)
            router._connect(len(pods), tuple(outside))
            yield router
        finally:
            for inside in router.pods:
                inside.close()
            router.namespace.close()

    def _connect(self, number: int, addresses: tuple[IPAddress, ...]) -> None:
        inside = Namespace()
        self.pods.append(inside)
        near, far = f"02:72:6e:00:01:{number:02x}", f"02:72:6e:00:02:{number:02x}"
        with self.namespace.route() as route:
            route.add_veth(f"pod{number}", near, 1500, peer_name="eth0", peer_mac=far, peer_namespace=inside.descriptor)
            index = _up(route, f"pod{number}")
            for address in addresses:
                route.add_route(ipaddress.ip_network(address), index)
                route.add_permanent_neighbour(index, address, far)
        with inside.route() as route:
            index = _up(route, "eth0")
            for address in addresses:
                route.add_address(index, address, address.max_prefixlen)
        macs = bytes.fromhex(far.replace(":", "")), bytes.fromhex(near.replace(":", ""))
        for address in addresses:
            self.stations[address] = Station(inside, *macs, str(addresses[0]))

    @contextmanager
    def wire(self) -> Iterator[Wire]:
        """Between all of them."""
        with Wire.open(self.stations, self.namespace) as wire:
            yield wire


@contextmanager
def lab_wire(lab: Lab) -> Iterator[Wire]:
    """Between a lab's pods and outside, with the datapath's programs on all devices."""
    assert lab.filters
    lab.host.sysctl("ipv4/conf/all/forwarding", "1")
    lab.host.sysctl("ipv6/conf/all/forwarding", "1")
    outside_mac, uplink_mac = bytes.fromhex("02726e000021"), bytes.fromhex("02726e000020")
    with lab.host.route() as route:
        for address in OUTSIDE.values():
            route.add_permanent_neighbour(lab.uplink_ifindex, ipaddress.ip_address(address), outside_mac.hex(":"))
    with lab.outside.route() as route:
        link = route.link("eth0")
        assert link is not None
        for address in UPLINK.values():
            route.add_permanent_neighbour(link.index, ipaddress.ip_address(address), uplink_mac.hex(":"))
    stations = {}
    for pod in lab.pods:
        for address in pod.addresses.values():
            stations[ipaddress.ip_address(address)] = Station(pod.namespace, pod.mac, GATEWAY_MAC, pod.addresses[4])
    for version in (4, 6):
        for address in (FAR[version], OUTSIDE[version]):
            stations[ipaddress.ip_address(address)] = Station(lab.outside, outside_mac, uplink_mac, OUTSIDE[4])
    with Wire.open(stations, lab.host) as wire:
        yield wire


def _up(route: RouteSocket, name: str) -> int:
    link = route.link(name)
    assert link is not None
    route.set_up(link.index, link_local=False)
    return link.index
