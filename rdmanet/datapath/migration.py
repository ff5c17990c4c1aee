"""Maps whose definition has changed: the contents of the old one carried into the new one while programs write.

First ``fill`` copies everything; then the programs that use the new map are put in their places; then ``catch_up``
copies what the old one got meanwhile. The table of flows is filled when only programs run that look into both
(``bridge``, ``fill_rest``). Fields go by name: what is new is zero, what is no more is left out; whole
numbers may change their width. Counters that both maps got may miss what is counted while they are added up.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import platform
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rdmanet.datapath import bpf, near
from rdmanet.datapath.artifact import Layout, MapDefinition, Places
from rdmanet.errors import BpfError, StateError

log = logging.getLogger(__name__)

#: The table of flows, and what programs have in its place for a while: the table as it was.
FLOWS, FLOWS_BEFORE = "flows", "flows_before"
#: Nothing in them outlives a program.
_WITHOUT_CONTENTS = ("events", "event_layout", FLOWS_BEFORE)
#: Numbers that both the old and the new program may have added to.
_SUMS = ("counters", "drops", "flow_counts", "flows_begun", "events_lost")
#: Before artifacts were kept; these structs were the beginning of what they are now, in so many bytes.
_FIRST_VALUE_SIZES = {"node": 16, "attachments": 52, "endpoints": 24}
#: The least recently used make room.
_EVICTING = (bpf.MAP_TYPE_LRU_HASH, 10)
_ARRAYS = (bpf.MAP_TYPE_ARRAY, 6)
_NUMBERS = (1, 2, 4, 8)
_BATCH = 4096

_MEMBARRIER = {"x86_64": 324, "aarch64": 283}
_MEMBARRIER_GLOBAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Move:
    """One map that is made anew; ``old`` and ``new`` are descriptors."""

    name: str
    old: int
    new: int
    old_definition: MapDefinition
    new_definition: MapDefinition
    old_layout: Layout
    new_layout: Layout
    seen: dict[bytes, bytes] = field(default_factory=dict)  # what was copied, as the old map has it
    resumed: bool = False  # begun by a process that is gone: what it copied is not known


def bridge(moves: Sequence[Move], maps: Mapping[str, int]) -> dict[str, int] | None:
    """The maps of programs that look for flows in the old table where the new one has none, which a flow that begins in
    the middle of a swap needs; None where the table stays, or has another layout by now."""
    for move in moves:
        if move.name == FLOWS and FLOWS_BEFORE in maps and move.old_layout == move.new_layout:
            return {**maps, FLOWS_BEFORE: move.old}
    return None


def old_layout(name: str, found: MapDefinition, known: Layout | None, wanted: Layout) -> Layout | None:
    """How a pinned map is laid out: as its artifact says, where that was kept. None: not known."""
    if known is not None:
        return known
    if found.value_size == _FIRST_VALUE_SIZES.get(name):
        return Layout(
            wanted.key, {word: place for word, place in wanted.value.items() if sum(place) <= found.value_size}
        )
    return None


def fill(move: Move) -> None:
    """Copies everything. Raises StateError when it does not fit."""
    if move.name in _WITHOUT_CONTENTS or move.name in near.HASHES:
        return
    key_of, value_of = _converters(move)
    bound = move.new_definition.max_entries
    count = 0
    keys, values = bytearray(), bytearray()
    with _fits(move):
        for key, raw in _items(move.old, move.old_definition):
            move.seen[key] = raw
            if move.new_definition.type in _ARRAYS:
                if not any(raw):
                    continue
                if int.from_bytes(key, sys.byteorder) >= bound:
                    raise _too_small(move, int.from_bytes(key, sys.byteorder) + 1)
            count += 1
            if count > bound and move.new_definition.type not in _EVICTING:
                raise _too_small(move, count)
            if _per_cpu(move.new_definition):
                bpf.update(move.new, key_of(key), value_of(raw))
                continue
            keys += key_of(key)
            values += value_of(raw)
            if len(keys) == _BATCH * move.new_definition.key_size:
                bpf.update_batch(move.new, bytes(keys), bytes(values), _BATCH)
                keys.clear()
                values.clear()
        bpf.update_batch(move.new, bytes(keys), bytes(values), len(keys) // move.new_definition.key_size)


def require_room(move: Move) -> None:
    """Raises StateError when the new map is too small for what the old one holds."""
    count = sum(1 for _ in _items(move.old, move.old_definition))
    if count > move.new_definition.max_entries:
        raise _too_small(move, count)


def fill_rest(move: Move) -> None:
    """Copies what the new table of flows lacks. Programs use both by now: they have copied what they met, and what they
    have entered stays. Flows that do not fit any more, as others have begun, are lost."""
    lost = 0
    for key, raw in _items(move.old, move.old_definition):
        move.seen[key] = raw
        try:
            bpf.update(move.new, key, raw, bpf.NOEXIST)
        except BpfError as error:
            if error.errno in (errno.E2BIG, errno.ENOMEM):
                lost += 1
            elif error.errno != errno.EEXIST:
                raise
    if lost:
        log.warning("%d entries of the old table of flows had no room in the new one", lost)


def catch_up(move: Move) -> None:
    """Copies what has changed in the old map since it was read last. What the new map has by itself goes first."""
    if move.name in _WITHOUT_CONTENTS or move.name in near.HASHES:
        return
    key_of, value_of = _converters(move)
    found = dict(_items(move.old, move.old_definition))
    with _fits(move):
        for key, raw in found.items():
            before = move.seen.get(key)
            if raw == before:
                continue
            new_key = key_of(key)
            current = _lookup(move.new, new_key, move.new_definition)
            if current is None or (before is not None and current == value_of(before)):
                bpf.update(move.new, new_key, value_of(raw))
            elif move.name in _SUMS and move.resumed:
                bpf.update(move.new, new_key, _greater(current, value_of(raw)))
            elif move.name in _SUMS:
                earlier = bytes(len(raw)) if before is None else before
                bpf.update(move.new, new_key, _sum(current, value_of(raw), value_of(earlier)))
        for key in move.seen.keys() - found.keys():
            new_key = key_of(key)
            if _lookup(move.new, new_key, move.new_definition) == value_of(move.seen[key]):
                bpf.delete(move.new, new_key)
    move.seen = found


def fill_near(maps: Mapping[str, int], definitions: Mapping[str, MapDefinition], name: str) -> None:
    """Fills a new array of copies from its hash."""
    hashed = near.HASHES[name]
    near.fill(maps, name, _items(maps[hashed], definitions[hashed]))


def wait_for_programs() -> None:
    """Returns when no program runs any more that had begun before: what has been replaced writes nothing from now on
    (membarrier(2), MEMBARRIER_CMD_GLOBAL: the kernel's synchronize_rcu)."""
    number = _MEMBARRIER[platform.machine()]
    result = _libc.syscall(ctypes.c_long(number), ctypes.c_long(_MEMBARRIER_GLOBAL), ctypes.c_long(0), ctypes.c_long(0))
    if result < 0:
        code = ctypes.get_errno()
        raise BpfError("The kernel does not say when replaced programs have ended.", operation="membarrier", errno=code)


def _items(descriptor: int, definition: MapDefinition) -> Iterator[tuple[bytes, bytes]]:
    size = bpf.buffer_bytes(definition.type, definition.value_size)
    return bpf.items(descriptor, definition.key_size, size, min(_BATCH, definition.max_entries))


def _lookup(descriptor: int, key: bytes, definition: MapDefinition) -> bytes | None:
    return bpf.lookup(descriptor, key, bpf.buffer_bytes(definition.type, definition.value_size))


def _per_cpu(definition: MapDefinition) -> bool:
    return definition.type in bpf.PERCPU_TYPES


def _converters(move: Move) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    """How keys and values of the old map are written in the new one."""
    old, new = move.old_definition, move.new_definition
    key_of = converter(move.old_layout.key, old.key_size, move.new_layout.key, new.key_size)
    value_of = converter(move.old_layout.value, old.value_size, move.new_layout.value, new.value_size)
    if not _per_cpu(new):
        return key_of, value_of
    step, padding = (old.value_size + 7) // 8 * 8, bytes(-new.value_size % 8)

    def every_cpu(raw: bytes) -> bytes:
        return b"".join(value_of(raw[at : at + old.value_size]) + padding for at in range(0, len(raw), step))

    return key_of, every_cpu


def converter(old: Places, old_size: int, new: Places, new_size: int) -> Callable[[bytes], bytes]:
    """A function from the bytes of one layout to those of another."""
    if (old, old_size) == (new, new_size):
        return bytes
    pairs = [(*old[word], *place) for word, place in new.items() if word in old]

    def convert(raw: bytes) -> bytes:
        made = bytearray(new_size)
        for old_at, old_bytes, new_at, new_bytes in pairs:
            part = raw[old_at : old_at + old_bytes]
            if old_bytes != new_bytes and old_bytes in _NUMBERS and new_bytes in _NUMBERS:
                number = int.from_bytes(part, sys.byteorder)
                part = min(number, 256**new_bytes - 1).to_bytes(new_bytes, sys.byteorder)
            made[new_at : new_at + min(len(part), new_bytes)] = part[:new_bytes]
        return bytes(made)

    return convert


def _sum(current: bytes, now: bytes, earlier: bytes) -> bytes:
    """Numbers of 64 bits: what there is, and what was added since."""
    words = struct.Struct(f"={len(current) // 8}Q")
    return words.pack(
        *(
            (a + b - c) % 2**64
            for a, b, c in zip(words.unpack(current), words.unpack(now), words.unpack(earlier), strict=True)
        )
    )


def _greater(current: bytes, other: bytes) -> bytes:
    """Of numbers of 64 bits the greater ones: never counted twice, at worst what was counted in between is missed."""
    words = struct.Struct(f"={len(current) // 8}Q")
    return words.pack(*map(max, words.unpack(current), words.unpack(other)))


@contextmanager
def _fits(move: Move) -> Iterator[None]:
    try:
        yield
    except BpfError as error:
        if error.errno in (errno.E2BIG, errno.ENOMEM):
            raise _too_small(move, move.new_definition.max_entries + 1) from error
        raise


def _too_small(move: Move, count: int) -> StateError:
    return StateError(
        f"The map {move.name} holds {count} entries or more and cannot be made smaller than that: its new size is "
        f"{move.new_definition.max_entries}; ask for more in the configuration. Nothing was changed.",
        operation="migrate",
        subject=move.name,
    )
