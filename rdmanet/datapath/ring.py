"""The ring buffer of events (bpf/monitor.h), and what was lost of them.

Format: Documentation/bpf/ringbuf.rst and kernel/bpf/ringbuf.c (457f44363a88). The reader maps two pages of numbers,
its own position (which it may write) and the programs', then the data twice behind each other, so that no record is
cut. A record is a length of 32 bits with two flags, 4 bytes of the kernel's, and the event, to a multiple of 8 bytes.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.tables import EVENT
from rdmanet.errors import UnavailableError

KINDS = {1: "dropped", 2: "allowed"}  # enum event_kind, as verdicts
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER_BYTES = 8


class Event(NamedTuple):
    """struct event; addresses are address keys, ports in host byte order, ``time_ns`` of CLOCK_MONOTONIC."""

    time_ns: int
    source: bytes
    destination: bytes
    translated: bytes
    kind: int
    reason: int
    attachment: int
    peer: int
    frame_bytes: int
    source_port: int
    destination_port: int
    translated_port: int
    protocol: int
    direction: int
    hook: int
    tcp_flags: int
    ethertype: int

    @classmethod
    def decode(cls, raw: bytes) -> Event:
        """From the struct's bytes."""
        fields = list(EVENT.unpack(raw))
        for place in (9, 10, 11):
            port = fields[place]
            assert isinstance(port, bytes)
            fields[place] = int.from_bytes(port, "big")
        return cls(*fields)  # type: ignore[arg-type]  # of the types that the table says


class Ring:
    """One reader of the ring; there may be no other."""

    def __init__(self, descriptor: int):
        """``descriptor`` stays the caller's. Raises UnavailableError where the ring cannot be mapped."""
        self.map_id = bpf.map_info(descriptor).id
        size = bpf.map_info(descriptor).max_entries
        page = mmap.PAGESIZE
        self._descriptor = os.dup(descriptor)
        try:
            self._own = mmap.mmap(self._descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._theirs = mmap.mmap(self._descriptor, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except (OSError, ValueError) as error:
            os.close(self._descriptor)
            raise UnavailableError(
                f"The ring buffer of events cannot be read: {error}.", operation="mmap", subject="events"
            ) from error
        self._size, self._data = size, page
        # One load or store of 64 bits each, as the kernel's smp_load_acquire and smp_store_release on the other side.
        self._consumer = memoryview(self._own).cast("Q")
        self._producer = memoryview(self._theirs)[:page].cast("Q")

    def fileno(self) -> int:
        """Becomes readable when an event comes and all before it have been read."""
        return self._descriptor

    @property
    def written(self) -> int:
        """Bytes that programs have ever written."""
        return self._producer[0]

    def read(self, at_most: int) -> list[Event]:
        """Up to so many events; they are taken out. Fewer: there are no more, or the next one is being written."""
        found: list[Event] = []
        position, end = self._consumer[0], self._producer[0]
        while position < end and len(found) < at_most:
            start = self._data + position % self._size
            length = int.from_bytes(self._theirs[start : start + 4], sys.byteorder)
            if length & _BUSY:
                break
            size = length & ~(_BUSY | _DISCARDED)
            if not length & _DISCARDED:
                found.append(Event.decode(self._theirs[start + _HEADER_BYTES : start + _HEADER_BYTES + EVENT.size]))
            position += (size + _HEADER_BYTES + 7) // 8 * 8
            self._consumer[0] = position
            if position == end:
                end = self._producer[0]
        return found

    def skip(self) -> None:
        """Takes everything out unread that is there: what came while nobody was reading."""
        while self.read(1024):
            pass

    def close(self) -> None:
        """Gives the memory and the descriptor back. Idempotent."""
        if self._descriptor >= 0:
            self._consumer.release()
            self._producer.release()
            self._own.close()
            self._theirs.close()
            os.close(self._descriptor)
            self._descriptor = -1


class Events:
    """The maps of events; from ``Datapath.events``."""

    def __init__(self, maps: Mapping[str, int]):
        self._maps = maps

    def open(self) -> Ring:
        """A reader."""
        return Ring(self._maps["events"])

    def is_current(self, ring: Ring) -> bool:
        """Whether programs write into this one: a swap may have made another."""
        return bpf.map_info(self._maps["events"]).id == ring.map_id

    def lost(self) -> int:
        """Events for which there was no room, ever."""
        raw = bpf.lookup(self._maps["events_lost"], layout.U32.pack(0), 8)
        return 0 if raw is None else int(layout.U64.unpack(raw)[0])
