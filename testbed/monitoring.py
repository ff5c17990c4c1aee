"""Drops for reasons that a pod's own frames can cause, and new flows, beside what the agent's monitor shows of them.

Shared by the tests and the row `monitor` of `make accept`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.bpf import packets
from testbed.outside import FAR_IPV4, FAR_IPV6
from testbed.peer import Peer
from testbed.rows import need
from testbed.watching import Watch
from testbed.world import Attached, World

GATEWAY_MAC = bytes.fromhex("027200000000")
ODD_MAC = bytes.fromhex("02deadbeef00")
NOBODY = {4: "10.213.15.250", 6: "fd72:646d:616e::fffe"}
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
TYPES = {4: packets.ETHERTYPE_IPV4, 6: packets.ETHERTYPE_IPV6}
GROUP = {4: "224.0.0.251", 6: "ff02::fb"}
SCTP = 132
NO_ADDRESSES = ("malformed", "not_ip")
#: Behind which flows begin, so that each is another one.
FIRST_PORT = 20000


@dataclass
class Stage:
    """A host with an agent and two pods."""

    world: World
    one: Attached
    two: Attached
    frames: Peer

    @classmethod
    @contextlib.contextmanager
    def start(cls, name: str, config: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Stage]:
        """All of it, gone afterwards."""
        with World.start(name, config) as world:
            one, two = (world.add(world.pod(pod)) for pod in ("one", "two"))
            for attached in (one, two):
                attached.pod.start()
            yield cls(world, one, two, world.prober("one", one.pod.running))

    def send(self, frames: Sequence[bytes], times: int = 1) -> None:
        """From pod one, all of them so often."""
        texts = [frame.hex() for frame in frames]
        self.frames.ask("frames", ifname=self.one.pod.ifname, frames=texts, times=times)

    def frame(self, version: int, destination: str, protocol: int, payload: bytes, **changes: Any) -> bytes:
        """One that pod one sends, with changes: ``source``, ``mac``."""
        source = changes.get("source", self.one.address(version))
        packet = bytes(packets.Ip(source, destination, protocol, payload))
        mac = changes.get("mac", bytes.fromhex(self.one.mac.replace(":", "")))
        return packets.ethernet(GATEWAY_MAC, mac, TYPES[version], packet)

    def dropped(self, version: int) -> dict[str, bytes]:
        """A frame for each reason."""
        mac = bytes.fromhex(self.one.mac.replace(":", ""))
        own, two = self.one.address(version), self.two.address(version)
        udp = packets.udp(5000, 6000)
        later = bytes(packets.fragment(own, two, b"x" * 64, offset=64))
        return {
            "malformed": packets.ethernet(GATEWAY_MAC, mac, TYPES[version], bytes(46)),
            "not_ip": packets.ethernet(GATEWAY_MAC, mac, 0x88CC, bytes(46)),
            "spoofed_mac": self.frame(version, two, packets.UDP, udp, mac=ODD_MAC),
            "spoofed_address": self.frame(version, two, packets.UDP, udp, source=NOBODY[version]),
            "multicast": self.frame(version, GROUP[version], packets.UDP, udp),
            "no_endpoint": self.frame(version, NOBODY[version], packets.UDP, udp),
            "nat_protocol": self.frame(version, FAR[version], SCTP, bytes(24)),
            "fragment_early": packets.ethernet(GATEWAY_MAC, mac, TYPES[version], later),
        }

    def flow(self, version: int, number: int) -> bytes:
        """The first packet of another flow to pod two."""
        return self.frame(version, self.two.address(version), packets.UDP, packets.udp(FIRST_PORT + number, 9))


def all_seen(stage: Stage, watch: Watch, times: int) -> int:
    """Sends frames for each reason and new flows, so often; all must be shown, with names. Returns how many."""
    wanted: Counter[tuple[str, str]] = Counter()
    for version in (4, 6):
        for reason, frame in stage.dropped(version).items():
            stage.send([frame] * times)
            wanted["dropped", reason] += times
        stage.send([stage.flow(version, number) for number in range(times)])
        wanted["allowed", ""] += times

    def ours(events: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
        return Counter((event["verdict"], event.get("reason", "")) for event in events if _is_ours(event))

    watch.wait(lambda events: not wanted - ours(events), f"{sum(wanted.values())} events expected")
    seen = ours(watch.events)
    need(seen == wanted, f"{seen} were shown instead of {wanted}")
    for event in watch.events:
        if _is_ours(event):
            need(event["pod"] == "default/one", f"without its pod: {event}")
            to_two = event.get("destination") in stage.two.addresses
            need(not to_two or event["peer"] == "default/two", f"without its peer: {event}")
            whole = event.get("reason") in NO_ADDRESSES or (event.get("source") and event.get("destination"))
            need(bool(whole), f"without addresses: {event}")
    return sum(wanted.values())


def _is_ours(event: dict[str, Any]) -> bool:
    """Pods' kernels drop of their own: neighbour discovery to groups, and pod two refuses the flows' datagrams."""
    if event["verdict"] == "allowed":
        return FIRST_PORT <= event.get("source_port", 0) < FIRST_PORT + 10000 and event.get("destination_port") == 9
    return event.get("protocol") != "icmpv6" and event.get("reason") != "neighbour" and event["pod"] == "default/one"
