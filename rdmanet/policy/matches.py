"""Ports of rules as prefixes: how much of a flow's protocol and port must be what (struct policy_key, bpf/policy.h)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from rdmanet.objects.values import ContainerPort, PolicyPort

PEER_BITS = 64  # any protocol
PROTOCOL_BITS = 80  # any port of it; up to 16 more are the port's
PORT_BITS = 16


class Match(NamedTuple):
    """``bits`` of the key count: those of set and peer always, then the protocol, then the port's first ones."""

    bits: int
    protocol: int
    port: int


#: What a rule without ports allows: every protocol, ICMP as well.
EVERYTHING = Match(PEER_BITS, 0, 0)


@lru_cache(maxsize=4096)
def matches(protocol: int, first: int | None, last: int | None) -> tuple[Match, ...]:
    """The prefixes that together are the ports from ``first`` to ``last`` (None: just the first), at most 30; without
    ``first`` all of the protocol's."""
    if first is None:
        return (Match(PROTOCOL_BITS, protocol, 0),)
    found = []
    end = first if last is None else last
    while first <= end:
        # The largest block that begins at first and does not go beyond the end.
        size = first & -first or 1 << PORT_BITS
        while first + size - 1 > end:
            size >>= 1
        found.append(Match(PROTOCOL_BITS + PORT_BITS - size.bit_length() + 1, protocol, first))
        first += size
    return tuple(found)


def of_ports(ports: Iterable[PolicyPort]) -> tuple[Match, ...]:
    """What a rule's ports with numbers, and those without any, match; names are left out."""
    return tuple(
        match
        for port in ports
        if not isinstance(port.port, str)
        for match in matches(port.protocol.number, port.port, port.end_port)
    )


def of_name(port: PolicyPort, receiver: Iterable[ContainerPort]) -> tuple[Match, ...]:
    """What a port's name means at the pod that receives: nothing where that has no such port of this protocol."""
    return tuple(
        match
        for own in receiver
        if own.name == port.port and own.protocol is port.protocol
        for match in matches(own.protocol.number, own.port, None)
    )


def covering(protocol: int, port: int | None) -> tuple[Match, ...]:
    """Every match that holds for a flow of this protocol to this port (None: the protocol has none)."""
    number = port or 0
    return (
        EVERYTHING,
        *(
            Match(PROTOCOL_BITS + bits, protocol, number >> (PORT_BITS - bits) << (PORT_BITS - bits))
            for bits in range(PORT_BITS + 1)
        ),
    )
