"""Prefix classes: one number for each CIDR that some policy names, and which of them are inside which block.

The datapath finds the longest prefix that holds an address (``prefixes``, bpf/policy.h). As every cidr and every except
is a class, a class is wholly inside a block or wholly outside of it.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rdmanet.model import IPAddress
from rdmanet.objects.values import IpBlock, IPNetwork

_BITS = {4: 32, 6: 128}
#: Where IPv4 is among the address keys (RFC 4291 2.5.5.2).
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


class Prefix(NamedTuple):
    """Addresses whose first ``length`` bits are those of ``network``."""

    version: int
    network: int
    length: int

    def __str__(self) -> str:
        kind = ipaddress.IPv4Network if self.version == 4 else ipaddress.IPv6Network
        return str(kind((self.network, self.length)))

    @property
    def last(self) -> int:
        """The highest address, as a number."""
        return self.network | ((1 << (_BITS[self.version] - self.length)) - 1)

    def holds(self, other: Prefix) -> bool:
        """Whether every address of the other one is in this one."""
        shift = _BITS[self.version] - self.length
        return (
            self.version == other.version
            and self.length <= other.length
            and self.network >> shift == other.network >> shift
        )


#: All of IPv4.
_IPV4 = Prefix(4, 0, 0)


def prefix_of(network: IPNetwork) -> Prefix | None:
    """None for an IPv6 network of mapped addresses: no packet has them."""
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        return None
    return Prefix(network.version, int(network.network_address), network.prefixlen)


def host_prefix(address: IPAddress) -> Prefix:
    """The address alone."""
    return Prefix(address.version, int(address), _BITS[address.version])


def longest(address: IPAddress, numbers: Mapping[Prefix, int]) -> int | None:
    """The number of the longest prefix that holds the address, as the datapath finds it."""
    bits, version = int(address), address.version
    for length in range(_BITS[version], -1, -1):
        shift = _BITS[version] - length
        number = numbers.get(Prefix(version, bits >> shift << shift, length))
        if number is not None:
            return number
    return None


class Block:
    """An ipBlock, and the numbers of the classes inside it."""

    __slots__ = ("cidr", "classes", "excepted")

    def __init__(self, block: IpBlock):
        self.cidr = prefix_of(block.cidr)
        self.excepted = tuple(p for p in map(prefix_of, block.excepted) if p is not None)
        self.classes: set[int] = set()

    def holds(self, prefix: Prefix) -> bool:
        """Whether all of the prefix is allowed; of a class all or nothing is."""
        return (
            self.cidr is not None
            and self.cidr.holds(prefix)
            and not any(excepted.holds(prefix) for excepted in self.excepted)
        )


class Prefixes:
    """The classes that are named, by whom they are named, and their numbers. Not for several threads at a time."""

    def __init__(
        self, changed: Callable[[Block], None], preferred: Mapping[Prefix, int] | None = None, highest: int = 0
    ):
        """``changed`` is told of each block whose classes are others now; ``preferred`` are numbers from before, and
        ``highest`` the highest that anything speaks of."""
        self.numbers: dict[Prefix, int] = {}
        self.touched: set[Prefix] = set()  # came or went; whoever has dealt with them clears it
        self._changed = changed
        self._preferred = dict(preferred or {})
        self._next = max(highest, *self._preferred.values(), 0) + 1
        self._uses: Counter[Prefix] = Counter()
        self._sorted: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        self._by_cidr: dict[Prefix, set[Block]] = {}

    def add_block(self, block: Block) -> None:
        """Makes classes of what the block names, and finds those that are inside."""
        if block.cidr is None:
            return
        own = self._sorted[block.cidr.version]
        first = bisect_left(own, (block.cidr.network, block.cidr.length))
        for network, length in own[first : bisect_right(own, (block.cidr.last, 1 << 8))]:
            prefix = Prefix(block.cidr.version, network, length)
            if block.holds(prefix):
                block.classes.add(self.numbers[prefix])
        self._by_cidr.setdefault(block.cidr, set()).add(block)
        for prefix in (block.cidr, *block.excepted):
            self.acquire(prefix)

    def remove_block(self, block: Block) -> None:
        """The classes that nobody else names go."""
        if block.cidr is None:
            return
        for prefix in (block.cidr, *block.excepted):
            self.release(prefix)
        blocks = self._by_cidr[block.cidr]
        blocks.discard(block)
        if not blocks:
            del self._by_cidr[block.cidr]
        block.classes.clear()

    def acquire(self, prefix: Prefix) -> int:
        """One more names the prefix; its number."""
        self._uses[prefix] += 1
        if self._uses[prefix] == 1:
            number = self._preferred.pop(prefix, 0)
            if not number:
                number, self._next = self._next, self._next + 1
            self.numbers[prefix] = number
            self.touched.add(prefix)
            insort(self._sorted[prefix.version], (prefix.network, prefix.length))
            for block in self._around(prefix):
                block.classes.add(number)
                self._changed(block)
            if _over_ipv4(prefix):
                # Without a longer one IPv4's addresses would be of this class, as their keys are.
                self.acquire(_IPV4)
        return self.numbers[prefix]

    def release(self, prefix: Prefix) -> None:
        """One less does."""
        self._uses[prefix] -= 1
        if self._uses[prefix]:
            return
        del self._uses[prefix]
        number = self.numbers.pop(prefix)
        self.touched.add(prefix)
        own = self._sorted[prefix.version]
        del own[bisect_left(own, (prefix.network, prefix.length))]
        for block in self._around(prefix):
            block.classes.discard(number)
            self._changed(block)
        if _over_ipv4(prefix):
            self.release(_IPV4)

    def _around(self, prefix: Prefix) -> list[Block]:
        """The blocks that hold the prefix."""
        found = []
        bits = _BITS[prefix.version]
        for length in range(prefix.length, -1, -1):
            shift = bits - length
            blocks = self._by_cidr.get(Prefix(prefix.version, prefix.network >> shift << shift, length))
            if blocks:
                found += [block for block in blocks if block.holds(prefix)]
        return found


def _over_ipv4(prefix: Prefix) -> bool:
    mapped = int(_MAPPED.network_address)
    return prefix.version == 6 and prefix.length < 96 and prefix.holds(Prefix(6, mapped, 96))
