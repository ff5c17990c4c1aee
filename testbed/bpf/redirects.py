"""Every way into a pod that ends in redirect_peer, and ways around the receiver's policy, live.

redirect_peer goes past the receiver's own programs, so what its ingress policies say must be decided before. What comes
is counted inside the pod's namespace: frames are put on the wire by hand where an adversary would, under policies that
allow the receiver everything, and under ones that allow it nothing.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rdmanet.datapath import bpf, layout, sockets
from rdmanet.datapath.artifact import Artifact
from rdmanet.model import address_key
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Kind,
    Namespace,
    NetworkPolicy,
    Object,
    ObjectKey,
    Protocol,
    Requirement,
    Rule,
    Selector,
    Service,
    ServicePort,
)
from rdmanet.policy.engine import Policy
from rdmanet.services.engine import Services
from testbed.bpf import packets
from testbed.bpf.differential import NODE, attachment
from testbed.bpf.lab import FAR, GATEWAY_MAC, UPLINK, Lab, Pod
from testbed.bpf.packets import DESTINATION, FRAGMENT, HOP_BY_HOP, ICMP, ICMPV6, ROUTING, TCP, UDP, Ip
from testbed.bpf.service_differential import netns_cookie
from testbed.bpf.wire import MARK, TIMEOUT_S, Station, Wire, ethertype, lab_wire
from testbed.container import cgroup2_root
from testbed.semantics.network_policy import PolicyPod
from testbed.semantics.random_policies import pod_object

VERSIONS = (4, 6)
SCTP = 132
ECHO = {4: (ICMP, 8), 6: (ICMPV6, 128)}
UNREACHABLE = {4: (3, 1), 6: (1, 0)}
EVERYBODY = Rule((), ())
PORT, LISTENING = 80, 8080
SERVICE = {4: ipaddress.ip_address("10.96.0.10"), 6: ipaddress.ip_address("fd96::10")}
VLAN = {"VLAN tag": b"\x81\x00\x00\x05", "two VLAN tags": b"\x88\xa8\x00\x05\x81\x00\x00\x06"}


@dataclass(frozen=True)
class Attempt:
    """Frames from stations; how many of them come to the receiver when its policies allow everything, and how many
    when they allow nothing. ``prepare`` has come before, under policies that allow it."""

    name: str
    sent: Sequence[tuple[Station, bytes]]
    allowed: int
    denied: int = 0
    prepare: Sequence[tuple[Station, bytes]] = ()


class Redirects:
    """A sender, the receiver and a bystander, and the world outside."""

    def __init__(self, lab: Lab, wire: Wire):
        self.lab, self.wire = lab, wire
        self.sender, self.receiver, self.bystander = lab.pods
        self._policy = Policy(lab.datapath)
        self._policy.recover([], {})
        self._objects: dict[ObjectKey, Object] = {ObjectKey(Kind.NAMESPACE, "", "default"): Namespace("default", {})}
        for pod in lab.pods:
            addresses = tuple(ipaddress.ip_address(pod.addresses[version]) for version in VERSIONS)
            member = PolicyPod("default", f"pod-{pod.id}", {}, {"number": str(pod.id)}, addresses)
            self._objects[ObjectKey(Kind.POD, "default", member.name)] = pod_object(member)
            self._policy.join(attachment(pod.id, member))
        self._policy.objects_changed(Changes(dict(self._objects), {}, self._objects))
        self._port = 1024

    @classmethod
    @contextmanager
    def build(cls, artifact: Artifact) -> Iterator[Redirects]:
        """All of it, gone afterwards; the host forwards everything, as a node of Kubernetes does."""
        with ExitStack() as stack:
            lab = stack.enter_context(Lab.build(artifact))
            for _ in range(3):
                lab.add_pod()
            for address in NODE:
                bpf.update(lab.map("node_addresses"), address_key(address), layout.U32.pack(1))
            # Whoever spoofs addresses meets the programs alone.
            for name in ("all", "default", "uplink0", "rdmanet0"):
                lab.host.sysctl(f"ipv4/conf/{name}/rp_filter", "0")
            stack.callback(sockets.detach, lab.pins)
            lab.datapath.attach_sockets(cgroup2_root())
            for pod in lab.pods:
                lab.datapath.enter_namespace(pod.namespace.run(netns_cookie), pod.id)
            redirects = cls(lab, stack.enter_context(lab_wire(lab)))
            redirects.serve()
            yield redirects

    def serve(self) -> None:
        """A service whose only backend is the receiver."""
        service = Service("default", "self", tuple(SERVICE.values()), (ServicePort("", Protocol.TCP, PORT, None),))
        objects: dict[ObjectKey, Object] = {ObjectKey(Kind.SERVICE, "default", "self"): service}
        for version in VERSIONS:
            address = ipaddress.ip_address(self.receiver.addresses[version])
            ports = (EndpointPort("", Protocol.TCP, LISTENING),)
            piece = EndpointSlice("default", f"self-{version}", "self", ports, (Endpoint(address, True, True, False),))
            objects[ObjectKey(Kind.ENDPOINT_SLICE, "default", piece.name)] = piece
        services = Services(self.lab.datapath.services(), 251, [], lambda gone: None)
        services.objects_changed(Changes(objects, {}, objects))

    def judge(self, ingress: tuple[Rule, ...], egress: tuple[Rule, ...] | None = None) -> None:
        """The policy that selects the receiver."""
        key = ObjectKey(Kind.NETWORK_POLICY, "default", "receiver")
        selector = Selector(frozenset({Requirement("number", "In", frozenset({str(self.receiver.id)}))}))
        policy = NetworkPolicy("default", "receiver", selector, ingress, egress)
        self._objects[key] = policy
        self._policy.objects_changed(Changes({key: policy}, {}, self._objects))

    def arrived(self, sent: Sequence[tuple[Station, bytes]]) -> int:
        """How many marked frames came into the receiver's namespace."""
        place = self.station(self.receiver)
        seen = self.wire.seen(lambda: [self.wire.ends[station][0].send(frame) for station, frame in sent])
        return sum(station == place and MARK in frame for station, frame in seen)

    def from_the_host(self, version: int) -> int:
        """The same of a datagram that the host's own stack sends."""
        place = self.station(self.receiver)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with self.lab.host.socket(family, socket.SOCK_DGRAM) as opened:
            seen = self.wire.seen(lambda: opened.sendto(MARK, (self.receiver.addresses[version], PORT)))
        return sum(station == place and MARK in frame for station, frame in seen)

    def by_service(self, caller: Pod, version: int, *, expected: bool) -> tuple[bool, int]:
        """The caller connects to the service: whether it is connected, and how many segments came into the
        receiver's namespace from outside of it. What is expected is waited for."""
        place = self.station(self.receiver)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with (
            self.receiver.namespace.socket(family, socket.SOCK_STREAM) as listener,
            caller.namespace.socket(family, socket.SOCK_STREAM) as client,
        ):
            listener.bind((self.receiver.addresses[version], LISTENING))
            listener.listen()
            client.setblocking(False)
            seen = self.wire.seen(lambda: client.connect_ex((str(SERVICE[version]), PORT)))
            _, writable, _ = select.select([], [client], [], TIMEOUT_S if expected else 0)
            connected = bool(writable) and client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        return connected, sum(station == place and _is_to(frame, LISTENING) for station, frame in seen)

    def outside_port(self, version: int) -> int:
        """The receiver talks to somebody outside: the port that is seen there."""
        own = self.next_port()
        frame = self.from_pod(self.receiver, Ip(*self.way(self.receiver, FAR, version), UDP, packets.udp(own, PORT)))
        seen = self.wire.seen(lambda: self.wire.ends[frame[0]][0].send(frame[1]))
        (translated,) = [
            packets.look(found).source_port
            for station, found in seen
            if station == self.outside(version) and packets.look(found).source == UPLINK[version]
        ]
        return translated

    # What frames are made of

    def next_port(self) -> int:
        """Nobody had it before."""
        self._port += 1
        return self._port

    def station(self, pod: Pod) -> Station:
        """Where the pod is."""
        return self.wire.stations[ipaddress.ip_address(pod.addresses[4])]

    def outside(self, version: int) -> Station:
        """Where those outside are."""
        return self.wire.stations[ipaddress.ip_address(FAR[version])]

    @staticmethod
    def way(source: Pod, destination: Pod | dict[int, str], version: int) -> tuple[str, str]:
        """Two addresses."""
        found = destination if isinstance(destination, dict) else destination.addresses
        return source.addresses[version], found[version]

    def from_pod(self, pod: Pod, ip: Ip, tag: bytes = b"", to: bytes = GATEWAY_MAC) -> tuple[Station, bytes]:
        """A frame as the pod sends it."""
        return self.station(pod), to + pod.mac + tag + struct.pack("!H", ethertype(ip.version)) + bytes(ip)

    def from_outside(self, ip: Ip, tag: bytes = b"") -> tuple[Station, bytes]:
        """A frame as it comes in."""
        station = self.outside(ip.version)
        return station, station.next_hop_mac + station.mac + tag + struct.pack("!H", ethertype(ip.version)) + bytes(ip)

    def inside(self, protocol: int, flags: int = packets.SYN, port: int | None = None) -> bytes:
        """A marked transport packet from a port that nobody had."""
        source = self.next_port() if port is None else port
        match protocol:
            case packets.TCP:
                return packets.tcp(source, PORT, flags, MARK)
            case packets.UDP:
                return packets.udp(source, PORT, MARK)
            case packets.ICMP | packets.ICMPV6:
                return packets.icmp(ECHO[4 if protocol == ICMP else 6][1], source, MARK)
        return struct.pack("!HHII", source, PORT, 0, 0) + MARK


def _is_to(frame: bytes, port: int) -> bool:
    """Whether this is a TCP segment to the port."""
    if ethertype(4) == int.from_bytes(frame[12:14], "big"):
        return frame[23] == TCP and int.from_bytes(frame[36:38], "big") == port
    return frame[20] == TCP and int.from_bytes(frame[56:58], "big") == port


def attempts(lab: Redirects, version: int) -> Iterator[Attempt]:
    """All of them, for one family, with ports of their own."""
    for build in (_plain, _out_of_state, _errors, _fragments, _odd, _outside):
        yield from build(lab, version)


def _plain(lab: Redirects, version: int) -> Iterator[Attempt]:
    a, b = lab.sender, lab.receiver
    for name, protocol in (("TCP", TCP), ("UDP", UDP), ("echo", ECHO[version][0]), ("SCTP", SCTP), ("protocol 99", 99)):
        ip = Ip(*lab.way(a, b, version), protocol, lab.inside(protocol))
        yield Attempt(f"{name} from pod to pod", [lab.from_pod(a, ip)] * 3, 3)
    # Of a flow that is known: the short way (bpf/usual.h).
    for name, protocol in (("TCP", TCP), ("UDP", UDP)):
        port = lab.next_port()
        begin = lab.from_pod(a, Ip(*lab.way(a, b, version), protocol, lab.inside(protocol, port=port)))
        back = packets.tcp(PORT, port, packets.ACK) if protocol == TCP else packets.udp(PORT, port)
        answer = lab.from_pod(b, Ip(*lab.way(b, a, version), protocol, back))
        more = lab.from_pod(a, Ip(*lab.way(a, b, version), protocol, lab.inside(protocol, packets.ACK, port)))
        yield Attempt(f"{name} of a flow that was allowed", [more] * 3, 3, prepare=[begin, answer, more])
        # The other way round: the receiver began.
        port = lab.next_port()
        out = packets.tcp(PORT, port, packets.SYN) if protocol == TCP else packets.udp(PORT, port)
        begin = lab.from_pod(b, Ip(*lab.way(b, a, version), protocol, out))
        more = lab.from_pod(a, Ip(*lab.way(a, b, version), protocol, lab.inside(protocol, packets.ACK, port)))
        yield Attempt(f"{name} replies", [more] * 3, 3, 3, prepare=[begin])
        if protocol == TCP:
            again = lab.from_pod(a, Ip(*lab.way(a, b, version), protocol, lab.inside(protocol, packets.SYN, port)))
            yield Attempt("a connection against a known one", [again], 1, prepare=[begin])


def _out_of_state(lab: Redirects, version: int) -> Iterator[Attempt]:
    for flags in (packets.ACK, packets.SYN | packets.ACK, packets.RST, packets.FIN | packets.ACK, 0, 0xFF):
        ip = Ip(*lab.way(lab.sender, lab.receiver, version), TCP, lab.inside(TCP, flags))
        yield Attempt(f"TCP flags {flags:#04x} of no connection", [lab.from_pod(lab.sender, ip)], 1)
    echo_reply = packets.icmp(0 if version == 4 else 129, lab.next_port(), MARK)
    ip = Ip(*lab.way(lab.sender, lab.receiver, version), ECHO[version][0], echo_reply)
    yield Attempt("an echo reply to nobody's request", [lab.from_pod(lab.sender, ip)], 1)


def _error(lab: Redirects, version: int, source: Pod, destination: Pod, quoted: Ip) -> Ip:
    kind, code = UNREACHABLE[version]
    body = struct.pack("!BBHI", kind, code, 0, 0) + bytes(quoted)
    return Ip(*lab.way(source, destination, version), ECHO[version][0], body)


def _errors(lab: Redirects, version: int) -> Iterator[Attempt]:
    a, b, c = lab.sender, lab.receiver, lab.bystander
    never = Ip(*lab.way(b, a, version), UDP, lab.inside(UDP))
    yield Attempt("an ICMP error about no flow", [lab.from_pod(a, _error(lab, version, a, b, never))], 0)
    others = Ip(*lab.way(b, c, version), UDP, lab.inside(UDP))
    began = [lab.from_pod(b, others)]
    yield Attempt(
        "an ICMP error about another's flow", [lab.from_pod(a, _error(lab, version, a, b, others))], 0, prepare=began
    )
    own = Ip(*lab.way(b, a, version), UDP, lab.inside(UDP))
    yield Attempt(
        "an ICMP error about the receiver's flow",
        [lab.from_pod(a, _error(lab, version, a, b, own))],
        1,
        1,
        [lab.from_pod(b, own)],
    )
    outward = Ip(*lab.way(a, b, version), UDP, lab.inside(UDP))
    yield Attempt(
        "an ICMP error about the sender's own packet", [lab.from_pod(a, _error(lab, version, a, b, outward))], 0
    )


def _fragments(lab: Redirects, version: int) -> Iterator[Attempt]:
    a, b, c = lab.sender, lab.receiver, lab.bystander
    source, destination = lab.way(a, b, version)
    first = packets.fragment(source, destination, lab.inside(UDP).ljust(24, b"."), more=True)
    later = packets.fragment(source, destination, MARK * 4, offset=24)
    frames = [lab.from_pod(a, first), lab.from_pod(a, later)]
    yield Attempt("both parts of a packet", frames, 2)
    unknown = packets.fragment(*lab.way(c, b, version), MARK * 4, offset=24)
    yield Attempt("a later part alone", [lab.from_pod(c, unknown)], 0)
    over = packets.fragment(source, destination, MARK * 4, offset=8 if version == 4 else 0, protocol=TCP)
    tiny = packets.fragment(source, destination, lab.inside(TCP)[:8], more=True, protocol=TCP)
    yield Attempt("a first part that ends before the ports' flags", [lab.from_pod(a, tiny), lab.from_pod(a, over)], 0)


def _odd(lab: Redirects, version: int) -> Iterator[Attempt]:
    a, b, c = lab.sender, lab.receiver, lab.bystander
    source, destination = lab.way(a, b, version)
    usual = Ip(source, destination, UDP, lab.inside(UDP))
    spoofed = {
        "the bystander's": c.addresses[version],
        "the node's": UPLINK[version],
        "the receiver's own": destination,
        "somebody's outside": FAR[version],
    }
    for whose, address in spoofed.items():
        ip = dataclasses.replace(usual, source=address)
        yield Attempt(f"{whose} address as source", [lab.from_pod(a, ip)], 0)
        if whose != "somebody's outside":
            yield Attempt(f"{whose} address as source, from outside", [lab.from_outside(ip)], 0)
    for name, tag in VLAN.items():
        yield Attempt(f"a {name} from a pod", [lab.from_pod(a, usual, tag)], 0)
        yield Attempt(
            f"a {name} from outside", [lab.from_outside(dataclasses.replace(usual, source=FAR[version]), tag)], 0
        )
    yield Attempt("to a group's MAC", [lab.from_pod(a, usual, to=bytes.fromhex("01005e000001"))], 0)
    yield Attempt("to everybody's MAC", [lab.from_pod(a, usual, to=b"\xff" * 6)], 0)
    yield Attempt("to the receiver's MAC", [lab.from_pod(a, usual, to=b.mac)], 1)
    if version == 4:
        options = dataclasses.replace(usual, options=b"\x07\x07\x04\0\0\0\0\0")
        yield Attempt("with IPv4 options", [lab.from_pod(a, options)], 1)
        return
    for name, kind in (("hop-by-hop options", HOP_BY_HOP), ("destination options", DESTINATION)):
        ip = dataclasses.replace(usual, options=packets.extension(UDP, kind), first=kind)
        yield Attempt(f"with {name}", [lab.from_pod(a, ip)], 1)
    routing = struct.pack("!BBBB4x", UDP, 0, 0, 0)
    yield Attempt(
        "with a routing header", [lab.from_pod(a, dataclasses.replace(usual, options=routing, first=ROUTING))], 1
    )
    inner = packets.extension(FRAGMENT, DESTINATION) + packets.extension(UDP, FRAGMENT, offset=24)
    later = dataclasses.replace(usual, options=inner, first=DESTINATION, offset=24)
    yield Attempt(
        "a later part behind options", [lab.from_pod(c, dataclasses.replace(later, source=c.addresses[6]))], 0
    )
    mapped = Ip(f"::ffff:{a.addresses[4]}", f"::ffff:{b.addresses[4]}", UDP, lab.inside(UDP))
    yield Attempt("mapped addresses", [lab.from_pod(a, mapped)], 0)
    half = Ip(a.addresses[6], f"::ffff:{b.addresses[4]}", UDP, lab.inside(UDP))
    yield Attempt("a mapped destination", [lab.from_pod(a, half)], 0)


def _outside(lab: Redirects, version: int) -> Iterator[Attempt]:
    b = lab.receiver
    for name, protocol in (("TCP", TCP), ("UDP", UDP), ("echo", ECHO[version][0])):
        ip = Ip(FAR[version], b.addresses[version], protocol, lab.inside(protocol))
        yield Attempt(f"{name} from outside by the host's routes", [lab.from_outside(ip)] * 2, 2)
    translated = lab.outside_port(version)
    answer = Ip(FAR[version], UPLINK[version], UDP, packets.udp(PORT, translated, MARK))
    yield Attempt("answers to a masqueraded flow", [lab.from_outside(answer)] * 2, 2, 2)
    other_port = dataclasses.replace(answer, payload=packets.udp(PORT + 1, translated, MARK))
    yield Attempt("somebody else's answer", [lab.from_outside(other_port)], 0)
    next_port = dataclasses.replace(answer, payload=packets.udp(PORT, translated + 1, MARK))
    yield Attempt("an answer to a port of NAT that is free", [lab.from_outside(next_port)], 0)
    kind, code = UNREACHABLE[version]
    quoted = Ip(UPLINK[version], FAR[version], UDP, packets.udp(translated, PORT, MARK))
    body = struct.pack("!BBHI", kind, code, 0, 0) + bytes(quoted)
    error = Ip(FAR[version], UPLINK[version], ECHO[version][0], body)
    yield Attempt("an ICMP error about a masqueraded flow", [lab.from_outside(error)], 1, 1)
    quoted = Ip(UPLINK[version], FAR[version], UDP, packets.udp(translated + 1, PORT, MARK))
    body = struct.pack("!BBHI", kind, code, 0, 0) + bytes(quoted)
    error = Ip(FAR[version], UPLINK[version], ECHO[version][0], body)
    yield Attempt("an ICMP error about no masqueraded flow", [lab.from_outside(error)], 0)
    first = packets.fragment(
        FAR[version], UPLINK[version], packets.udp(PORT, translated, MARK).ljust(24, b"."), more=True
    )
    later = packets.fragment(FAR[version], UPLINK[version], MARK * 4, offset=24)
    yield Attempt("parts of an answer", [lab.from_outside(first), lab.from_outside(later)], 2, 2)


@dataclass
class Proof:
    """What was tried, and what was not as it should be."""

    attempts: int = 0
    stopped: int = 0  # frames that came where everything is allowed, and did not where nothing is
    wrong: list[str] = field(default_factory=list)

    def compare(self, name: str, version: int, wanted: object, found: object) -> None:
        """One attempt; of each first what allowing gives, then what denying does."""
        self.attempts += 1
        if wanted != found:
            self.wrong.append(f"{name}, IPv{version}: {found} instead of {wanted}")


def carry_out(lab: Redirects) -> Proof:
    """All attempts, under policies that allow the receiver everything and under ones that allow it nothing."""
    proof = Proof()
    for version in VERSIONS:
        for attempt in attempts(lab, version):
            lab.judge((EVERYBODY,))
            lab.arrived(attempt.prepare)
            lab.judge(())
            denied = lab.arrived(attempt.sent)
            lab.judge((EVERYBODY,))
            allowed = lab.arrived(attempt.sent)
            proof.compare(attempt.name, version, (attempt.allowed, attempt.denied), (allowed, denied))
            proof.stopped += allowed - denied
        for rules in ((EVERYBODY,), ()):
            lab.judge(rules)
            # "traffic to and from the node where a Pod is running is always allowed", and a pod's to itself.
            proof.compare("the host's own", version, 1, lab.from_the_host(version))
            itself = lab.by_service(lab.receiver, version, expected=True)
            proof.compare("a service to itself", version, (True, 0), itself)
            connected, segments = lab.by_service(lab.sender, version, expected=bool(rules))
            proof.compare("a service's caller", version, (bool(rules), bool(rules)), (connected, segments > 0))
            proof.stopped += segments
        # The receiver may begin nothing any more: what it began gets no answers.
        lab.judge((EVERYBODY,))
        translated = lab.outside_port(version)
        answer = Ip(FAR[version], UPLINK[version], UDP, packets.udp(PORT, translated, MARK))
        lab.judge((), ())
        proof.compare("answers to a flow that is forbidden by now", version, 0, lab.arrived([lab.from_outside(answer)]))
        lab.judge((EVERYBODY,))
    return proof
