"""Every drop reason that a host with an agent can be brought to, and who is to blame each time.

``provoke`` does it all on one stage; what came of it is compared by the test and by the row `monitor` of `make accept`.
Only ``no_node`` is missing: before the agent has configured the node nobody can be watching.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.artifact import CONTINUATIONS, Artifact
from rdmanet.datapath.maps import Datapath
from rdmanet.model import UNLIMITED, Bandwidth, GuardEntry, GuardState, Limit, address_key
from testbed.bpf import packets
from testbed.host import ARTIFACT
from testbed.monitoring import FAR, GATEWAY_MAC, NOBODY, TYPES, Stage
from testbed.outside import GATEWAY_IPV4, GATEWAY_IPV6, UPLINK
from testbed.peer import Peer
from testbed.policies import labelled, policy
from testbed.rows import need
from testbed.services import CLUSTER_IP, NODE, NODE_PORT, PORT, TARGET_PORT, service, slices, start_caller
from testbed.world import PINS, Attached

MAX_FLOWS, FLOWS_PER_POD = 1024, 256
OUTSIDE_PORTS = 4
CONFIG: dict[str, dict[str, Any]] = {
    "masquerade": {"first_port": 61000, "last_port": 61000 + OUTSIDE_PORTS - 1},
    "tracking": {"max_flows": MAX_FLOWS, "max_flows_per_pod": FLOWS_PER_POD},
    # Entries and programs that are wrong on purpose would be put right.
    "agent": {"repair": False},
}
ICMP = {4: packets.ICMP, 6: packets.ICMPV6}
GATEWAY = {4: GATEWAY_IPV4, 6: GATEWAY_IPV6}
#: Where routes of the host lead that no pod can take (RFC 2544, RFC 3849).
NOWHERE = {4: "198.18.1.1", 6: "2001:db8:901::1"}
ELSEWHERE = {4: "198.18.2.1", 6: "2001:db8:902::1"}
NARROW, NARROW_BYTES = {4: "203.0.113.77", 6: "2001:db8:200::77"}, 1300
QPN = 77
CLIENT_PORT = 5555
#: What pods' own kernels send as well, unasked.
BACKGROUND = ("multicast", "neighbour")

Blame = tuple[str, int, str | None, str | None]  # reason, IP version, pod, peer


@dataclass
class Provoker:
    """Sends what is dropped, and notes what must be shown of it."""

    stage: Stage
    crowd: Attached
    callers: dict[str, Peer] = field(default_factory=dict)
    probers: dict[str, Peer] = field(default_factory=dict)
    expected: Counter[Blame] = field(default_factory=Counter)

    @classmethod
    @contextlib.contextmanager
    def start(cls, name: str) -> Iterator[Provoker]:
        """A stage with a third pod, tables that can be filled, and routes that lead nowhere."""
        with Stage.start(name, CONFIG) as stage, contextlib.ExitStack() as stack:
            world = stage.world
            assert world.host.outside is not None
            crowd = world.add(world.pod("crowd"))
            crowd.pod.start()
            made = cls(stage, crowd)
            places = {"one": stage.one.pod.running, "outside": world.host.outside}
            for place, container in places.items():
                made.callers[place] = stack.enter_context(start_caller(world.host, place, container))
            made.probers["crowd"] = world.prober("crowd", crowd.pod.running)
            made.probers["host"] = world.prober("host", world.host)
            world.host.ip(
                "link add odd0 type veth peer name odd1",
                # Nothing goes out there unasked.
                "link set odd0 addrgenmode none",
                "link set odd1 addrgenmode none",
                "link set odd0 up",
                "link set odd1 up",
                *(
                    f"route add {NARROW[version]} via {GATEWAY[version]} dev {UPLINK} mtu lock {NARROW_BYTES}"
                    for version in (4, 6)
                ),
                *(f"route add blackhole {NOWHERE[version]}" for version in (4, 6)),
                *(f"route add {ELSEWHERE[version]} dev odd0" for version in (4, 6)),
            )
            yield made

    @contextlib.contextmanager
    def datapath(self) -> Iterator[Datapath]:
        """The host's pinned maps, from this process."""
        pins = self.stage.world.host.path(PINS)
        with Datapath.open(Artifact.load(ARTIFACT), pins, {"flows": MAX_FLOWS}) as datapath:
            yield datapath

    def put(self, *documents: dict[str, Any]) -> None:
        """Objects."""
        self.stage.world.host.api("PUT", "/v1/objects", {"documents": list(documents)})

    def delete(self, *documents: dict[str, Any]) -> None:
        """Objects."""
        self.stage.world.host.api("DELETE", "/v1/objects", {"documents": list(documents)})

    def expect(
        self, reason: str, version: int, pod: str | None = "one", peer: str | None = None, times: int = 1
    ) -> None:
        """So many drops of what pod one sends, unless said otherwise."""
        names = [None if name is None else f"default/{name}" for name in (pod, peer)]
        self.expected[reason, version, names[0], names[1]] += times

    def provoke(self, version: int) -> None:
        """All reasons of the first life of the agent."""
        self._frames(version)
        self._routes(version)
        self._masquerade(version)
        self._policy(version)
        self._bandwidth(version)
        self._services(version)
        self._roce(version)
        self._broken(version)

    def _frames(self, version: int) -> None:
        stage = self.stage
        peers = {"spoofed_mac": "two", "spoofed_address": "two", "fragment_early": "two"}
        for reason, frame in stage.dropped(version).items():
            stage.send([frame] * 3)
            peer = peers.get(reason)
            # Before the addresses are looked at, nobody knows whose they are.
            self.expect(reason, 0 if reason in ("malformed", "not_ip") else version, peer=peer, times=3)
        own, two = stage.one.address(version), stage.two.address(version)
        mac = bytes.fromhex(stage.one.mac.replace(":", ""))
        about = bytes(packets.Ip(two, own, packets.UDP, packets.udp(33000, 33001)))
        error = packets.icmp(3 if version == 4 else 1, 0, b"")[:8] + about
        stage.send([stage.frame(version, two, ICMP[version], error)])
        self.expect("icmp_unrelated", version, peer="two")
        parts = [
            bytes(packets.fragment(own, NOBODY[version], packets.udp(5000, 6000, bytes(64)), more=True)),
            bytes(packets.fragment(own, NOBODY[version], bytes(64), offset=72)),
        ]
        # The first one is not let through.
        stage.send([packets.ethernet(GATEWAY_MAC, mac, TYPES[version], part) for part in parts])
        self.expect("no_endpoint", version)
        self.expect("fragment_unknown", version)
        if version == 4:
            arp = packets.arp(1, mac, own, two)
            stage.send([packets.ethernet(b"\xff" * 6, mac, packets.ETHERTYPE_ARP, arp)])
            self.expect("neighbour", 0)
        else:
            behind = packets.extension(packets.ICMPV6)
            solicitation = packets.icmp(135, 0, bytes(16))
            packet = packets.Ip(own, two, packets.ICMPV6, solicitation, options=behind, first=packets.DESTINATION)
            stage.send([packets.ethernet(GATEWAY_MAC, mac, TYPES[6], bytes(packet))])
            self.expect("neighbour", 6, peer="two")

    def _routes(self, version: int) -> None:
        udp = packets.udp(5000, 6000)
        for reason, destination in (("no_route", NOWHERE[version]), ("not_uplink", ELSEWHERE[version])):
            self.stage.send([self.stage.frame(version, destination, packets.UDP, udp)])
            self.expect(reason, version)
        # Its first part is let through; a later one is larger than the way there.
        own, mac = self.stage.one.address(version), bytes.fromhex(self.stage.one.mac.replace(":", ""))
        parts = [
            bytes(packets.fragment(own, NARROW[version], packets.udp(5000, 6000, bytes(64)), more=True)),
            bytes(packets.fragment(own, NARROW[version], bytes(NARROW_BYTES), offset=72)),
        ]
        self.stage.send([packets.ethernet(GATEWAY_MAC, mac, TYPES[version], part) for part in parts])
        self.expect("fragment", version)

    def _masquerade(self, version: int) -> None:
        many = OUTSIDE_PORTS + 5
        ports = [packets.udp(10000 + number, 6001) for number in range(many)]
        self.stage.send([self.stage.frame(version, FAR[version], packets.UDP, udp) for udp in ports])
        self.expect("nat_no_port", version, times=5)
        roce = packets.udp(packets.ROCE_PORT, 6001)
        self.stage.send([self.stage.frame(version, FAR[version], packets.UDP, roce)])
        self.expect("roce_nat", version)
        if version == 4:  # the share is that of both families
            crowd, two = self.crowd.address(4), self.stage.two.address(4)
            mac = bytes.fromhex(self.crowd.mac.replace(":", ""))
            datagrams = [packets.udp(1000 + number, 9) for number in range(FLOWS_PER_POD + 40)]
            sent = [bytes(packets.Ip(crowd, two, packets.UDP, datagram)) for datagram in datagrams]
            frames = [packets.ethernet(GATEWAY_MAC, mac, TYPES[4], packet) for packet in sent]
            self.probers["crowd"].ask("frames", ifname=self.crowd.pod.ifname, frames=[one.hex() for one in frames])
            self.expect("flow_limit", 4, pod="crowd", peer="two", times=40)

    def _policy(self, version: int) -> None:
        for reason, name, direction in (("policy_ingress", "two", "ingress"), ("policy_egress", "one", "egress")):
            documents = [labelled(name, app=name), policy("nobody", selects=name, direction=direction)]
            self.put(*documents)
            self.stage.send([self.stage.flow(version, 5000)])
            self.expect(reason, version, peer="two")
            self.delete(*documents)

    def _bandwidth(self, version: int) -> None:
        """Limits into which nothing fits, written here: those that people ask for hold many packets."""
        with self.datapath() as datapath:
            attachments, endpoints = datapath.attachments(), datapath.endpoints()
            own, target = address_key(self.stage.one.address(4)), address_key(self.stage.two.address(version))
            sender, entry = next((index, one) for index, one in attachments.items() if one.ipv4 == own)
            numbers = {"egress": entry.attachment_id, "ingress": endpoints[target].attachment_id}
            nothing = {name: Bandwidth(**{name: Limit(1000, 1)}) for name in numbers}
            try:
                datapath.set_bandwidth(numbers["egress"], nothing["egress"])
                datapath.set_attachment(sender, replace(entry, limited=True))
                self.stage.send([self.stage.flow(version, 7000)])
                self.expect("bandwidth_egress", version, peer="two")
                datapath.set_attachment(sender, entry)
                datapath.set_bandwidth(numbers["ingress"], nothing["ingress"])
                datapath.set_endpoint(target, replace(endpoints[target], limited=True))
                self.stage.send([self.stage.flow(version, 7000)])
                self.expect("bandwidth_ingress", version, peer="two")
            finally:
                datapath.set_attachment(sender, entry)
                datapath.set_endpoint(target, endpoints[target])
                for number in numbers.values():
                    datapath.set_bandwidth(number, UNLIMITED)

    def _services(self, version: int) -> None:
        self.put(service(node_port=NODE_PORT), *slices({}))
        self.callers["one"].ask("many", kind="udp", address=CLUSTER_IP[version], port=PORT, count=2)
        self.expect("no_backend", version, times=2)
        self._from_outside(version, CLIENT_PORT)
        self.expect("no_backend", version, pod=None)
        # The only backend's end talks to the client already.
        own = {4: self.stage.one.address(4), 6: self.stage.one.address(6)}
        self.put(*slices({"one": own}))
        udp = packets.udp(TARGET_PORT, CLIENT_PORT + version)
        self.stage.send([self.stage.frame(version, GATEWAY[version], packets.UDP, udp)])
        self._from_outside(version, CLIENT_PORT + version)
        self.expect("service_conflict", version, pod=None, peer="one")

    def _from_outside(self, version: int, port: int) -> None:
        """A datagram to the node's port, which nobody answers."""
        caller = self.callers["outside"]
        name = f"{version} {port}"
        own: dict[str, Any] = {"source": GATEWAY[version], "source_port": port}
        caller.ask("open", id=name, kind="udp", address=NODE[version], port=NODE_PORT, **own)
        caller.ask("send", id=name)
        caller.ask("close", id=name)

    def _roce(self, version: int) -> None:
        """The broker's entries, written here: this kernel may have no RDMA devices, and packets are packets."""
        stage = self.stage
        own, two = stage.one.address(version), stage.two.address(version)
        frame = stage.frame(version, two, packets.UDP, packets.roce(QPN))
        stage.send([frame])
        self.expect("roce_no_device", version, peer="two")
        with self.datapath() as datapath:
            attachments, endpoints = datapath.attachments(), datapath.endpoints()
            sender = next(
                number for number, one in attachments.items() if one.ipv4 == address_key(stage.one.address(4))
            )
            target = address_key(two)
            try:
                datapath.set_attachment(sender, replace(attachments[sender], device=True, enforce=True))
                datapath.set_endpoint(target, replace(endpoints[target], device=True))
                stage.send([frame])
                self.expect("roce_unleased", version, peer="two")
                for reason, peer, state in (
                    ("roce_revoked", own, GuardState.REVOKED),
                    ("roce_not_peer", two, GuardState.GRANTED),
                ):
                    entry = GuardEntry(lease=1, peer_address=address_key(peer), peer_qpn=QPN, state=state)
                    datapath.set_guard(target, QPN, entry)
                    stage.send([frame])
                    self.expect(reason, version, peer="two")
            finally:
                datapath.delete_guard(target, QPN)
                datapath.set_attachment(sender, attachments[sender])
                datapath.set_endpoint(target, endpoints[target])

    def _broken(self, version: int) -> None:
        """A filter of ours on a device that is no attachment; a slot that somebody has emptied."""
        host = self.stage.world.host
        words = ["tc", "filter", "add", "dev", "odd0", "ingress", "pref", "1", "bpf", "direct-action"]
        host.exec(["tc", "qdisc", "replace", "dev", "odd0", "clsact"])
        host.exec([*words, "object-pinned", f"{PINS}/dispatch_pod"])
        frame = self.stage.flow(version, 6000)
        self.probers["host"].ask("frames", ifname="odd1", frames=[frame.hex()])
        self.expect("no_attachment", version, pod=None, peer="two")
        host.exec(["tc", "qdisc", "del", "dev", "odd0", "clsact"])
        slot = layout.U32.pack(CONTINUATIONS["outside"])
        with contextlib.ExitStack() as stack:
            programs = bpf.get(host.path(PINS) / "programs")
            assert programs is not None
            stack.callback(os.close, programs)
            number = bpf.lookup(programs, slot, 4)
            assert number is not None
            program = bpf.program_by_id(int(layout.U32.unpack(number)[0]))
            assert program is not None
            stack.callback(os.close, program)
            bpf.delete(programs, slot)
            try:
                self.stage.send([self.stage.frame(version, FAR[version], packets.UDP, packets.udp(5000, 6002))])
            finally:
                bpf.update(programs, slot, layout.U32.pack(program))
        self.expect("no_program", version)

    def begin_second_life(self) -> None:
        """The uplink has lost its addresses, and no pod's share of the table is bounded any more."""
        world = self.stage.world
        world.host.stop_agent()
        world.host.ip(
            f"address flush dev {UPLINK}",
            f"route replace default dev {UPLINK}",
            f"route replace ::/0 dev {UPLINK}",
        )
        world.agent_config["tracking"]["max_flows_per_pod"] = 0
        world.start_agent()

    def provoke_second(self) -> None:
        """What is left."""
        stage = self.stage
        for version in (4, 6):
            stage.send([stage.frame(version, FAR[version], packets.UDP, packets.udp(5000, 6003))])
            self.expect("no_masquerade_address", version)
        stage.send([stage.flow(4, number) for number in range(MAX_FLOWS)])
        stage.send([stage.flow(6, 9000 + number) for number in range(20)])
        self.expect("flow_table_full", 6, peer="two", times=20)


def blames(events: list[dict[str, Any]]) -> Counter[Blame]:
    """Drops as they were shown."""
    found: Counter[Blame] = Counter()
    for event in events:
        if event["verdict"] == "dropped":
            address = event.get("destination")
            version = 0 if address is None else 6 if ":" in address else 4
            found[event["reason"], version, event["pod"], event["peer"]] += 1
    return found


def check(expected: Counter[Blame], events: list[dict[str, Any]]) -> None:
    """All that was provoked was shown, with its names, and so often."""
    found = blames(events)
    reasons = {reason for reason, *_ in expected}
    for blame in sorted({*expected, *(blame for blame in found if blame[0] in reasons)}, key=str):
        wanted, shown = expected[blame], found[blame]
        more = blame[0] in BACKGROUND or (blame[0] == "flow_table_full" and blame[1] == 4)
        need(shown == wanted or (more and shown >= wanted), f"{blame} was shown {shown} times instead of {wanted}")


def provoked(provoker: Provoker, events: list[dict[str, Any]]) -> bool:
    """Whether as much was shown as was provoked."""
    return not provoker.expected - blames(events)
