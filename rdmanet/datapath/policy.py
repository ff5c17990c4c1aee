"""The maps of policy (bpf/policy.h): entries in batches, and classes of prefixes."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping

from rdmanet.datapath import bpf
from rdmanet.datapath.layout import U32
from rdmanet.datapath.tables import POLICY_KEY, PREFIX_KEY

#: Set, peer, and how many bits of the key count, then protocol and port: what is beyond those bits is 0.
PolicyEntry = tuple[int, int, int, int, int]
#: How many bits of an address key count, and the key.
PrefixKey = tuple[int, bytes]

_ONE = U32.pack(1)


class PolicyMaps:
    """What a flow is judged by. Synchronous; one writer at a time."""

    def __init__(self, maps: Mapping[str, int]):
        """``maps``: their descriptors by name, which stay the caller's."""
        self._entries, self._prefixes = maps["policy"], maps["prefixes"]
        self._node_addresses = maps["node_addresses"]

    @property
    def max_entries(self) -> int:
        """How many entries there can be."""
        return bpf.map_info(self._entries).max_entries

    @property
    def max_prefixes(self) -> int:
        """How many classes of prefixes there can be."""
        return bpf.map_info(self._prefixes).max_entries

    def entries(self) -> list[PolicyEntry]:
        """All that is allowed."""
        found = []
        for key, _ in bpf.items(self._entries, POLICY_KEY.size, U32.size):
            bits, number, peer, protocol, port = POLICY_KEY.unpack(key)
            assert isinstance(port, bytes)
            found.append((int(number), int(peer), int(bits), int(protocol), int.from_bytes(port, "big")))
        return found

    def allow(self, entries: Collection[PolicyEntry]) -> None:
        """Adds entries, in one call. Raises BpfError; what comes before the one that fails has been written."""
        bpf.update_batch(self._entries, _pack(entries), _ONE * len(entries), len(entries))

    def forbid(self, entries: Collection[PolicyEntry]) -> None:
        """Removes entries; those that are not there are passed over."""
        bpf.delete_batch(self._entries, _pack(entries), POLICY_KEY.size)

    def prefixes(self) -> dict[PrefixKey, int]:
        """The class of each prefix."""
        found = {}
        for key, value in bpf.items(self._prefixes, PREFIX_KEY.size, U32.size):
            bits, address = PREFIX_KEY.unpack(key)
            assert isinstance(address, bytes)
            found[int(bits), address] = int(U32.unpack(value)[0])
        return found

    def set_prefixes(self, classes: Mapping[PrefixKey, int]) -> None:
        """From now on addresses whose longest prefix is one of these are of its class. Raises as ``allow``."""
        keys = b"".join([PREFIX_KEY.pack(*prefix) for prefix in classes])
        bpf.update_batch(self._prefixes, keys, struct.pack(f"={len(classes)}I", *classes.values()), len(classes))

    def delete_prefixes(self, prefixes: Iterable[PrefixKey]) -> None:
        """Removes prefixes; those that are not there are passed over."""
        keys = b"".join([PREFIX_KEY.pack(*prefix) for prefix in prefixes])
        bpf.delete_batch(self._prefixes, keys, PREFIX_KEY.size)

    def node_addresses(self) -> set[bytes]:
        """Address keys of the node's own addresses: who has one is always allowed, and NodePorts are there."""
        return set(bpf.keys(self._node_addresses, 16, bpf.map_info(self._node_addresses).max_entries))

    def set_node_addresses(self, addresses: Collection[bytes]) -> None:
        """Exactly these from now on. Raises BpfError where there are more than the map has room for; those that fit
        have been written then."""
        there = self.node_addresses()
        bpf.delete_batch(self._node_addresses, b"".join(there.difference(addresses)), 16)
        new = sorted(set(addresses) - there)
        bpf.update_batch(self._node_addresses, b"".join(new), _ONE * len(new), len(new))


def _pack(entries: Iterable[PolicyEntry]) -> bytes:
    pack = POLICY_KEY.pack
    return b"".join(
        [pack(bits, number, peer, protocol, port.to_bytes(2, "big")) for number, peer, bits, protocol, port in entries]
    )
