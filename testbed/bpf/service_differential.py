"""Random services at work: what the maps hold, where sockets are led to, and where iptables leads packets, beside what
the plain model says."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from rdmanet.datapath import bpf, layout, sockets
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.services import Contents, Scope, service_key
from rdmanet.model import IPAddress, address_key, address_of
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import Kind, Object, ObjectKey, Protocol
from rdmanet.services.engine import Services
from testbed.bpf.differential import ABROAD, NODE, Tally
from testbed.bpf.lab import Lab, Namespace
from testbed.bpf.wire import FIRST_SOURCE_PORT, Router, Wire
from testbed.container import cgroup2_root
from testbed.semantics import random_services
from testbed.semantics.iptables import service_rules
from testbed.semantics.service import Asker, Backend, ServiceWorld

PODS = 6
SERVICES = 40
MAGLEV_SIZE = 251
SOURCE_PORTS = 40_000
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
ANY = {4: ipaddress.ip_address("0.0.0.0"), 6: ipaddress.ip_address("::")}
KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
#: A namespace whose packets nobody answers, so that its connections stay where they were led to.
CALLER = {4: "10.89.0.2", 6: "fd89::2"}


class Question(NamedTuple):
    """Who wants to go where."""

    asker: Asker
    address: IPAddress
    protocol: Protocol
    port: int


class ServiceLab:
    """Maps that the engine brings to one random world after the other, a caller beside them, and iptables."""

    def __init__(self, lab: Lab, caller: Namespace, router: Router, wire: Wire):
        self.lab = lab
        self.local = [ipaddress.ip_address(pod.addresses[version]) for pod in lab.pods for version in (4, 6)]
        self.maps = lab.datapath.services()
        self._services = Services(self.maps, MAGLEV_SIZE, self.local, lambda gone: None)
        self._caller, self._router, self._wire = caller, router, wire
        self._objects: dict[ObjectKey, Object] = {}
        self._sent = 0

    @classmethod
    @contextmanager
    def build(cls, artifact: Artifact) -> Iterator[ServiceLab]:
        """The socket programs are attached to the machine's root cgroup, and act for the caller's namespace alone.
        Raises UnavailableError where they cannot be."""
        with ExitStack() as stack:
            lab = stack.enter_context(Lab.build(artifact, filters=False))
            for _ in range(PODS):
                lab.add_pod()
            lab.datapath.change_node(lambda node: replace(node, maglev_size=MAGLEV_SIZE))
            for address in NODE:
                bpf.update(lab.map("node_addresses"), address_key(address), layout.U32.pack(1))
            stack.callback(sockets.detach, lab.pins)
            lab.datapath.attach_sockets(cgroup2_root())
            caller = stack.enter_context(silent_namespace())
            cookie = caller.run(netns_cookie)
            lab.datapath.enter_namespace(cookie, 1)
            addresses = [tuple(ipaddress.ip_address(a) for a in pod.addresses.values()) for pod in lab.pods]
            router = stack.enter_context(Router.build(addresses, ABROAD, sorted(NODE, key=str)))
            # Packets are routed before iptables leads them elsewhere.
            with router.namespace.route() as route:
                link = route.link(f"pod{PODS}")
                assert link is not None
                for version, everything in ((4, "0.0.0.0/0"), (6, "::/0")):
                    source = next(address for address in sorted(NODE, key=str) if address.version == version)
                    route.add_route(ipaddress.ip_network(everything), link.index, source=source)
            wire = stack.enter_context(router.wire())
            yield cls(lab, caller, router, wire)

    def world(self, random: Random, count: int = SERVICES) -> ServiceWorld:
        """Another one, and the maps are brought to it."""
        world = random_services.world(random, count, self.local, ABROAD, NODE)
        objects: dict[ObjectKey, Object] = {ObjectKey(Kind.SERVICE, s.namespace, s.name): s for s in world.services}
        objects |= {ObjectKey(Kind.ENDPOINT_SLICE, s.namespace, s.name): s for s in world.slices}
        removed = {key: value for key, value in self._objects.items() if key not in objects}
        changed = {key: value for key, value in objects.items() if self._objects.get(key) != value}
        changes = Changes(changed, removed, objects)
        self._services.check(changes)
        self._services.objects_changed(changes)
        self._objects = objects
        return world

    def compare(self, tally: Tally, random: Random, *, live: int, beside: int) -> None:
        """One world: the maps against the model, and for a sample sockets, and packets that iptables translates."""
        world = self.world(random)
        contents = self.maps.read()
        questions = [Question(*question) for question in random_services.questions(world)]
        external = {address for service in world.services for address in service.external_ips}
        for question in questions:
            # From outside nobody reaches addresses that are the cluster's own.
            if question.asker is Asker.INSIDE or question.address in NODE | external:
                found = self.held(contents, question)
                tally.compare("maps", world.backends(*question), found, question)
        inside = [q for q in questions if q.asker is Asker.INSIDE and q.protocol in KINDS]
        known = [q for q in inside if world.backends(*q) is not None]
        sample = random.sample(known, min(live, len(known))) + random.sample(inside, min(live, len(inside)) // 4)
        for question, end in zip(sample, self.led_to(random, sample), strict=True):
            wanted = world.backends(*question)
            if wanted is None:
                wanted = frozenset({Backend(question.address, question.port)})
            tally.compare("sockets", True, end in wanted if end else not wanted, question, end, wanted)
        self._set_iptables(world)
        # Of NodePorts kube-proxy's rules say more than is written here.
        sample = [q for q in random.sample(known, len(known)) if q.address not in NODE][:beside]
        for question, end in zip(sample, self.translated(sample), strict=True):
            wanted = world.backends(*question) or frozenset()
            tally.compare("iptables", True, end in wanted if end else not wanted, question, end, wanted)

    def held(self, contents: Contents, question: Question) -> frozenset[Backend] | None:
        """As the programs look a service up: socket_service() of bpf/socket.c, and the uplink's."""
        asker, address, protocol, port = question
        scope = Scope.CLUSTER if asker is Asker.INSIDE else Scope.OUTSIDE
        entry = contents.services.get(service_key(address_key(address), port, protocol.number, scope))
        if entry is None and address in NODE:
            scope = Scope.NODE if asker is Asker.INSIDE else Scope.OUTSIDE
            key = service_key(address_key(ANY[address.version]), port, protocol.number, scope)
            entry = contents.services.get(key)
        if entry is None:
            return None
        slots = contents.backends.get((entry.id, entry.generation), {})
        assert sorted(slots) == list(range(entry.backends)), question
        if asker is Asker.OUTSIDE and slots:
            places = self.maps.places(entry.maglev_first, MAGLEV_SIZE)
            assert set(places) == set(slots), question
        return frozenset(Backend(address_of(end[:16]), int.from_bytes(end[16:], "big")) for end in slots.values())

    def led_to(self, random: Random, questions: Sequence[Question]) -> list[Backend | None]:
        """Where sockets are that connected to each; None: refused."""
        mapped = [random.random() < 0.3 for _ in questions]
        return self._caller.run(partial(_connect_all, questions, mapped))

    def _set_iptables(self, world: ServiceWorld) -> None:
        for version, command in ((4, "iptables-restore"), (6, "ip6tables-restore")):
            text = service_rules(world, version)
            restore = partial(subprocess.run, [command], input=text, text=True, check=True)
            self._router.namespace.run(restore)

    def translated(self, questions: Sequence[Question]) -> list[Backend | None]:
        """Where iptables leads the node's own packets to each; None: nowhere."""
        # Other ports each time: flows that conntrack knows stay where they were led to.
        first = FIRST_SOURCE_PORT + self._sent % SOURCE_PORTS
        self._sent += len(questions)
        with ExitStack() as opened:
            frames = self._wire.seen(lambda: self._router.namespace.run(partial(_send_all, questions, first, opened)))
        found: list[Backend | None] = [None] * len(questions)
        for _, frame in frames:
            port, end = _ends(frame) or (0, None)
            if first <= port < first + len(questions):
                found[port - first] = end
        return found


@contextmanager
def silent_namespace() -> Iterator[Namespace]:
    """Everything leads into a link at whose other end nobody is."""
    inside, nobody = Namespace(), Namespace()
    try:
        with inside.route() as route:
            route.add_veth(
                "eth0", "02:72:6e:00:03:01", 1500, peer_name="eth0", peer_mac="02:72:6e:00:03:02",
                peer_namespace=nobody.descriptor,
            )  # fmt: skip
            link = route.link("eth0")
            assert link is not None
            with nobody.route() as other:
                peer = other.link("eth0")
                assert peer is not None
                other.set_up(peer.index, link_local=False)
            route.set_up(link.index, noarp=True, link_local=False)
            for version, text in CALLER.items():
                address = ipaddress.ip_address(text)
                route.add_address(link.index, address, address.max_prefixlen)
                everything = ipaddress.ip_network("0.0.0.0/0" if version == 4 else "::/0")
                route.add_route(everything, link.index, source=address)
        yield inside
    finally:
        inside.close()
        nobody.close()


def netns_cookie() -> int:
    """Of the calling thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        return int.from_bytes(opened.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def _connect_all(questions: Sequence[Question], mapped: Sequence[bool]) -> list[Backend | None]:
    with ExitStack() as stack:
        ports: list[int | None] = []
        for port, (question, by_ipv6) in enumerate(zip(questions, mapped, strict=True), FIRST_SOURCE_PORT):
            family = socket.AF_INET if question.address.version == 4 and not by_ipv6 else socket.AF_INET6
            opened = stack.enter_context(socket.socket(family, KINDS[question.protocol]))
            opened.setblocking(False)
            opened.bind(("", port))
            shown = by_ipv6 and question.address.version == 4
            try:
                opened.connect((f"::ffff:{question.address}" if shown else str(question.address), question.port))
            except BlockingIOError:
                pass
            except ConnectionRefusedError:
                ports.append(None)
                continue
            ports.append(port)
        peers = {port: peer for protocol in KINDS for port, peer in _peers(protocol.lower()).items()}
    return [None if port is None else peers[port] for port in ports]


def _peers(protocol: str) -> dict[int, Backend]:
    """Where the namespace's sockets are connected to, by their own port (proc_net_tcp.rst)."""
    found = {}
    for family in ("", "6"):
        for line in Path(f"/proc/thread-self/net/{protocol}{family}").read_text().splitlines()[1:]:
            own, peer = line.split()[1:3]
            address, port = peer.split(":")
            # In words of the machine's byte order.
            words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
            packed = b"".join(words)
            key = packed if len(packed) == 16 else address_key(ipaddress.IPv4Address(packed))
            found[int(own.split(":")[1], 16)] = Backend(address_of(key), int(port, 16))
    return found


def _send_all(questions: Sequence[Question], first: int, stack: ExitStack) -> None:
    """Each from a port that tells which it was."""
    for port, question in enumerate(questions, first):
        family = socket.AF_INET if question.address.version == 4 else socket.AF_INET6
        opened = stack.enter_context(socket.socket(family, KINDS[question.protocol]))
        opened.setblocking(False)
        opened.bind(("", port))
        # What is not seen anywhere was refused, whatever the socket was told.
        with contextlib.suppress(OSError):
            opened.connect((str(question.address), question.port))
            if question.protocol is Protocol.UDP:
                opened.send(b"flow")


def _ends(frame: bytes) -> tuple[int, Backend] | None:
    """The port from which it came, and where it went to."""
    if frame[12:14] == b"\x08\x00":
        protocol, destination, ports = frame[23], frame[30:34], frame[34:38]
    else:
        protocol, destination, ports = frame[20], frame[38:54], frame[54:58]
    if protocol not in (Protocol.TCP.number, Protocol.UDP.number):
        return None
    end = Backend(ipaddress.ip_address(destination), int.from_bytes(ports[2:], "big"))
    return int.from_bytes(ports[:2], "big"), end
