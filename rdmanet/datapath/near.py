"""The arrays of copies beside two hashes (bpf/endpoint.h): where a key's place is, who has one, and who may.

A place is empty while its hash is written to: never would an agent that died in between leave two values. What is
limited has none, so that the programs' short way, which does not look at limits, is not for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.layout import ATTACHMENT, ENDPOINT, LIMITED, U32

#: Array → its hash, and the other way round.
HASHES = {"near_attachment": "attachments", "near_endpoint": "endpoints"}
_ARRAYS = {hashed: array for array, hashed in HASHES.items()}
_FLAGS = {"attachments": ATTACHMENT.places()["flags"], "endpoints": ENDPOINT.places()["flags"]}


def leave(maps: Mapping[str, int], name: str, key: bytes) -> bool:
    """Empties the place of a hash's key if it is the key's; returns whether it is nobody's then."""
    array, place, size = maps[_ARRAYS[name]], _place(name, key), _size(name)
    raw = bpf.lookup(array, U32.pack(place), size)
    assert raw is not None, "an array has all its elements"
    if raw[: len(key)] == key:
        bpf.update(array, U32.pack(place), bytes(size))
        return True
    return not any(raw[: len(key)])


def enter(maps: Mapping[str, int], name: str, key: bytes, raw: bytes) -> None:
    """Copies an entry of the hash to its place, which is nobody's, unless it may have none."""
    if not _is_limited(name, raw):
        bpf.update(maps[_ARRAYS[name]], U32.pack(_place(name, key)), key + raw)


def fill(maps: Mapping[str, int], array: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Fills a new array from its hash's entries: who comes first has the place."""
    name, taken = HASHES[array], set()
    for key, raw in entries:
        place = _place(name, key)
        if place not in taken and not _is_limited(name, raw):
            taken.add(place)
            bpf.update(maps[array], U32.pack(place), key + raw)


def _place(name: str, key: bytes) -> int:
    if name == "endpoints":
        return layout.near_endpoint_place(key)
    return int.from_bytes(key, sys.byteorder) % layout.NEAR_PLACES


def _size(name: str) -> int:
    return layout.NEAR_ENDPOINT.size if name == "endpoints" else layout.NEAR_ATTACHMENT.size


def _is_limited(name: str, raw: bytes) -> bool:
    offset, size = _FLAGS[name]
    return bool(int.from_bytes(raw[offset : offset + size], sys.byteorder) & LIMITED)
