"""Services as the maps hold them (bpf/service.h): packing, and many entries in one call."""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rdmanet.datapath import bpf, layout, loader, tables

_KEY = struct.Struct("=16s2sBB")
_END = struct.Struct("!16sH")
_SERVICE = struct.Struct("=6I")
_BACKEND_KEY = struct.Struct("=3I")
_MEMBER_KEY = struct.Struct("=16sI2s2x")
_SOCKET_KEY = struct.Struct("=Q18sB5x")
_HAS_MEMBERS = 1
_IDS = {  # maps that name services: name → where the id is in the entry (its key, then its value)
    "affinity": tables.AFFINITY_KEY.places()["service"][0],
    "sockets": tables.SOCKET_KEY.size + tables.SOCKET.places()["service"][0],
    "socket_flows": tables.SOCKET_KEY.size + tables.SOCKET.places()["service"][0],
}


class Scope(enum.IntEnum):
    """enum service_scope: who asks."""

    CLUSTER = 0
    NODE = 1
    OUTSIDE = 2


class MemberState(enum.IntEnum):
    """What ``members`` says of a backend."""

    READY = 1
    TERMINATING = 2


class ServiceEntry(NamedTuple):
    """struct service_entry."""

    id: int
    generation: int
    backends: int  # how many
    affinity_s: int
    maglev_first: int
    has_members: bool


class Slots(NamedTuple):
    """The backends of one generation, by slot. An end is an address key and a port in network byte order."""

    id: int
    generation: int
    ends: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the maps hold."""

    services: dict[bytes, ServiceEntry]  # by struct service_key
    backends: dict[tuple[int, int], dict[int, bytes]]  # (id, generation) → slot → end
    members: dict[tuple[int, bytes], int]  # (id, end) → state


@dataclass(frozen=True, slots=True)
class Bounds:
    """Entries that may be used: half of what the maps could hold, so that everything can be exchanged at once.
    ``places`` are those of Maglev tables, all of them."""

    services: int
    backends: int
    members: int
    places: int


def service_key(address: bytes, port: int, protocol: int, scope: Scope) -> bytes:
    """struct service_key; the address is an address key."""
    return _KEY.pack(address, port.to_bytes(2, "big"), protocol, scope)


def parse_service_key(key: bytes) -> tuple[bytes, int, int, Scope]:
    """(address key, port, protocol, scope) of a struct service_key."""
    address, port, protocol, scope = _KEY.unpack(key)
    return address, int.from_bytes(port, "big"), protocol, Scope(scope)


def end_of(address: bytes, port: int) -> bytes:
    """An address key and a port as one: 18 bytes."""
    return _END.pack(address, port)


class ServiceMaps:
    """The maps of services. Writing into a full one raises BpfError: the caller has asked ``bounds`` before."""

    def __init__(self, pinned: loader.Pinned):
        self._pinned = pinned

    def bounds(self) -> Bounds:
        """How much fits."""
        entries = {name: bpf.map_info(self._map(name)).max_entries for name in ("services", "backends", "members")}
        places = bpf.map_info(self._map("maglev")).max_entries
        return Bounds(entries["services"] // 2, entries["backends"] // 2, entries["members"] // 2, places)

    def read(self) -> Contents:
        """Everything there is."""
        contents = Contents({}, {}, {})
        for key, value in self._items("services", _KEY.size, _SERVICE.size):
            id_, generation, backends, affinity_s, first, flags = _SERVICE.unpack(value)
            has_members = bool(flags & _HAS_MEMBERS)
            contents.services[key] = ServiceEntry(id_, generation, backends, affinity_s, first, has_members)
        for key, value in self._items("backends", _BACKEND_KEY.size, tables.BACKEND.size):
            id_, generation, slot = _BACKEND_KEY.unpack(key)
            contents.backends.setdefault((id_, generation), {})[slot] = value[:18]
        for key, value in self._items("members", _MEMBER_KEY.size, layout.U32.size):
            address, id_, port = _MEMBER_KEY.unpack(key)
            contents.members[id_, address + port] = int(layout.U32.unpack(value)[0])
        return contents

    def highest_remembered_id(self) -> int:
        """The highest id that clients and sockets remember; 0 where none does."""
        highest = 0
        for name, place in _IDS.items():
            key, value = tables.MAPS[name]
            for pair in self._items(name, key.size, value.size):
                highest = max(highest, struct.unpack_from("=I", b"".join(pair), place)[0])
        return highest

    def set_services(self, entries: Sequence[tuple[bytes, ServiceEntry]]) -> None:
        """By struct service_key; each entry is exchanged as a whole."""
        values = [
            _SERVICE.pack(e.id, e.generation, e.backends, e.affinity_s, e.maglev_first, _HAS_MEMBERS * e.has_members)
            for _, e in entries
        ]
        self._write("services", [key for key, _ in entries], values)

    def delete_services(self, keys: Collection[bytes]) -> None:
        """Those that are not there are passed over."""
        self._remove("services", keys, _KEY.size)

    def set_backends(self, all_slots: Iterable[Slots]) -> None:
        """Writes generations' slots."""
        keys, values = [], []
        for id_, generation, ends in all_slots:
            keys += [_BACKEND_KEY.pack(id_, generation, slot) for slot in range(len(ends))]
            values += [end + b"\0\0" for end in ends]
        self._write("backends", keys, values)

    def delete_backends(self, slots: Iterable[tuple[int, int, int]]) -> None:
        """By (id, generation, slot)."""
        self._remove("backends", [_BACKEND_KEY.pack(*slot) for slot in slots], _BACKEND_KEY.size)

    def set_members(self, members: Sequence[tuple[int, bytes, MemberState]]) -> None:
        """(id, end, state) each."""
        keys = [_MEMBER_KEY.pack(end[:16], id_, end[16:]) for id_, end, _ in members]
        self._write("members", keys, [layout.U32.pack(state) for _, _, state in members])

    def delete_members(self, members: Iterable[tuple[int, bytes]]) -> None:
        """By (id, end)."""
        keys = [_MEMBER_KEY.pack(end[:16], id_, end[16:]) for id_, end in members]
        self._remove("members", keys, _MEMBER_KEY.size)

    def set_places(self, first: int, slots: Sequence[int]) -> None:
        """A Maglev table: each place the slot of a backend."""
        keys = struct.pack(f"={len(slots)}I", *range(first, first + len(slots)))
        bpf.update_batch(self._map("maglev"), keys, struct.pack(f"={len(slots)}I", *slots), len(slots))

    def places(self, first: int, count: int) -> list[int]:
        """A Maglev table as it is."""
        found = [bpf.lookup(self._map("maglev"), layout.U32.pack(place), 4) for place in range(first, first + count)]
        return [int(layout.U32.unpack(raw)[0]) for raw in found if raw is not None]

    def sockets(self, gone: Collection[tuple[int, bytes]], protocol: int) -> dict[int, set[bytes]]:
        """Sockets that a service has led to one of these (id, end): cookie → ends."""
        found: dict[int, set[bytes]] = {}
        place = tables.SOCKET.places()["service"][0]
        for key, value in self._items("sockets", tables.SOCKET_KEY.size, tables.SOCKET.size):
            cookie, end, used = _SOCKET_KEY.unpack(key)
            if used == protocol and (struct.unpack_from("=I", value, place)[0], end) in gone:
                found.setdefault(cookie, set()).add(end)
        return found

    def _map(self, name: str) -> int:
        return self._pinned.maps[name]

    def _items(self, name: str, key_bytes: int, value_bytes: int) -> Iterable[tuple[bytes, bytes]]:
        return bpf.items(self._map(name), key_bytes, value_bytes)

    def _write(self, name: str, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        bpf.update_batch(self._map(name), b"".join(keys), b"".join(values), len(keys))

    def _remove(self, name: str, keys: Collection[bytes], key_bytes: int) -> None:
        if keys:
            bpf.delete_batch(self._map(name), b"".join(keys), key_bytes)
