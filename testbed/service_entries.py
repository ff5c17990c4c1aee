"""Services written straight into a host's maps: what the programs do with them is shown apart from who writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rdmanet.datapath import bpf, tables
from rdmanet.datapath.layout import U32
from rdmanet.model import address_key

CLUSTER, NODE, OUTSIDE = range(3)  # enum service_scope in bpf/service.h
PROTOCOLS = {"tcp": 6, "udp": 17}
READY, TERMINATING = 1, 2
HAS_MEMBERS = 1
MAGLEV_PLACES = 101  # of these tests' services
ANY = {4: address_key("0.0.0.0"), 6: address_key("::")}

End = tuple[str, int]


def port_bytes(port: int) -> bytes:
    """As in packets."""
    return port.to_bytes(2, "big")


@dataclass
class ServiceEntries:
    """The pinned maps below ``pins``."""

    pins: Path
    _maps: dict[str, int] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _generation: int = 0
    _slots: dict[int, list[bytes]] = field(default_factory=dict)

    def __enter__(self) -> ServiceEntries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def map(self, name: str) -> int:
        """A pinned map's descriptor."""
        if name not in self._maps:
            descriptor = bpf.get(self.pins / name)
            assert descriptor is not None, f"{name} is not pinned"
            self._stack.callback(os.close, descriptor)
            self._maps[name] = descriptor
        return self._maps[name]

    def put(
        self,
        number: int,
        address: str | int,
        port: int,
        kind: str,
        backends: Sequence[End],
        *,
        scope: int = CLUSTER,
        affinity_s: int = 0,
        members: Mapping[End, int] | None = None,
        maglev_first: int = 0,
    ) -> None:
        """A service with its id ``number``; ``address`` 4 or 6 is any of the node's of that family. In the order in
        which the agent writes: new slots, the service, old slots away. ``members`` are those that live: the backends,
        unless said otherwise."""
        self._generation += 1
        new = []
        for slot, end in enumerate(backends):
            new.append(tables.BACKEND_KEY.pack(number, self._generation, slot))
            bpf.update(self.map("backends"), new[-1], tables.BACKEND.pack(address_key(end[0]), port_bytes(end[1])))
        living = dict.fromkeys(backends, READY) if members is None else members
        for raw in bpf.keys(self.map("members"), tables.MEMBER_KEY.size, 131072):
            _, service, _ = tables.MEMBER_KEY.unpack(raw)
            if service == number:
                bpf.delete(self.map("members"), raw)
        for end, state in living.items():
            key = tables.MEMBER_KEY.pack(address_key(end[0]), number, port_bytes(end[1]))
            bpf.update(self.map("members"), key, U32.pack(state))
        if scope == OUTSIDE and backends:
            for place in range(MAGLEV_PLACES):
                bpf.update(self.map("maglev"), U32.pack(maglev_first + place), U32.pack(place % len(backends)))
        bpf.update(
            self.map("services"),
            self.key(address, port, kind, scope),
            tables.SERVICE.pack(number, self._generation, len(backends), affinity_s, maglev_first, HAS_MEMBERS),
        )
        for raw in self._slots.get(number, []):
            bpf.delete(self.map("backends"), raw)
        self._slots[number] = new

    def key(self, address: str | int, port: int, kind: str, scope: int = CLUSTER) -> bytes:
        """Of the map ``services``."""
        key = ANY[address] if isinstance(address, int) else address_key(address)
        return tables.SERVICE_KEY.pack(key, port_bytes(port), PROTOCOLS[kind], scope)

    def remove(self, address: str | int, port: int, kind: str, scope: int = CLUSTER) -> None:
        """The service alone; its backends stay, as for a moment when the agent removes one."""
        bpf.delete(self.map("services"), self.key(address, port, kind, scope))

    def age_affinity(self, number: int, seconds: int) -> None:
        """As if all clients of this service had called that much earlier."""
        for raw in bpf.keys(self.map("affinity"), tables.AFFINITY_KEY.size, 65536):
            found = bpf.lookup(self.map("affinity"), raw, tables.AFFINITY.size)
            if tables.AFFINITY_KEY.unpack(raw)[1] == number and found is not None:
                address, port, last_used_ns = tables.AFFINITY.unpack(found)
                earlier = int(last_used_ns) - seconds * 1_000_000_000
                bpf.update(self.map("affinity"), raw, tables.AFFINITY.pack(address, port, earlier))

    def node_address(self, address: str) -> None:
        """One of the node's own."""
        bpf.update(self.map("node_addresses"), address_key(address), U32.pack(1))
