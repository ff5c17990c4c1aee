"""What CNI's CHECK expects of an attachment: what its ``prevResult`` lists (specification 1.1.0, section 2 "CHECK").

The result is the last one of the chain: a later plugin may have taken an address or a route of ours out of it, have
moved routes to a table of its own (sbr), or have changed the interface (tuning). What it still lists of ours must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rdmanet.cni import Result
from rdmanet.cni.values import config_error
from rdmanet.ipam import IPNetwork
from rdmanet.model import Attachment, IPAddress
from rdmanet.netlink.messages import Link
from rdmanet.steps import Way


@dataclass(frozen=True, slots=True)
class Expected:
    """The parts of an attachment that must be in the pod. ``mac`` is empty where nobody said one."""

    addresses: tuple[IPAddress, ...]
    routed: frozenset[int]  # families with a default route
    mac: str = ""

    @classmethod
    def all_of(cls, attachment: Attachment) -> Expected:
        """As ADD left it."""
        return cls(attachment.addresses, frozenset(a.version for a in attachment.addresses), attachment.mac)

    @classmethod
    def by_result(cls, attachment: Attachment, result: Result) -> Expected:
        """As the chain's result has it. CniError (7) where that is not this attachment's."""
        found = [
            (index, interface)
            for index, interface in enumerate(result.interfaces)
            if interface.name == attachment.ifname and interface.sandbox
        ]
        if not found:
            raise config_error(
                f'"prevResult" has no interface {attachment.ifname} in a sandbox; give CHECK the result of ADD'
            )
        indexes = {index for index, _ in found}
        listed = {ip.address.ip for ip in result.ips if ip.interface is None or ip.interface in indexes}
        # Another plugin's default routes need not be ours.
        routed = {route.destination.version for route in result.routes if route.destination.prefixlen == 0}
        own = {address.version for address in attachment.addresses}
        return cls(
            tuple(address for address in attachment.addresses if address in listed),
            frozenset(routed & own),
            found[-1][1].mac.lower(),
        )

    def among(self, ways: Iterable[Way]) -> list[Way]:
        """What of all that ADD makes inside the pod must still be there."""
        return [
            way._replace(
                routes={to: mtu for to, mtu in way.routes.items() if to.prefixlen or to.version in self.routed}
            )
            for way in ways
            if way.address in self.addresses
        ]

    def problems_of(
        self, attachment: Attachment, link: Link, routes: Iterable[tuple[IPNetwork, IPAddress]]
    ) -> Iterator[str]:
        """Sentences about the pod's interface itself, and about routes of families whose address need not be there."""
        if not link.up:
            yield f"the interface {link.name} is down"
        if self.mac and link.mac != self.mac:
            yield f"{link.name} has the MAC {link.mac}, and the result says {self.mac}"
        elif link.mac != attachment.mac:
            yield (
                f"{link.name} has the MAC {link.mac}, and only what comes from and goes to {attachment.mac} passes: ask"
                " rdmanet for another one (capability mac)"
            )
        ways_out = {destination.version for destination, _ in routes if destination.prefixlen == 0}
        for version in sorted(self.routed - {address.version for address in self.addresses} - ways_out):
            yield f"the default route for IPv{version} is missing"
