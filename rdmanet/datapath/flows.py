"""The table of tracked flows as the programs keep it (bpf/flow.h): read whole, and what is over taken out."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rdmanet.datapath import bpf, loader, programs
from rdmanet.datapath.layout import ATTACHMENT, DIRECTIONS, U32, U64, attachment_slot
from rdmanet.datapath.tables import BEGUN, CANDIDATE, FLOW, FLOW_KEY

ORIGIN_IS_HIGH, REPLIED, TRANSLATED, SERVICE, ALIAS = 1, 2, 4, 8, 16  # FLOW_*
CLOSING_BOTH = 3
NO_SLOT = 0xFFFFFFFF
_KEY = struct.Struct("=16s16s2s2sB3x")
_WHOLE_KEY = struct.Struct(f"={_KEY.size}s")
# Times are signed here, as a difference of two is in the programs: below 0 is before the machine was up.
_ENTRY = struct.Struct("=qq16sIIII2sBB4x")
_GLANCE = struct.Struct("=qq16xIII4x2xBx4x")
#: COLLECT_AT_ONCE in bpf/collect.c.
_AT_ONCE = 16
_FRAME_HEADER = bytes(14)


class Flow(NamedTuple):
    """One entry, key and value; addresses as address keys, ports as in packets."""

    key: bytes
    low: bytes
    high: bytes
    low_port: bytes
    high_port: bytes
    protocol: int
    created_ns: int  # of CLOCK_MONOTONIC
    last_seen_ns: int
    translated: bytes
    origin: int
    target: int
    slot: int
    epoch: int
    translated_port: bytes
    flags: int
    closing: int

    @property
    def is_alias(self) -> bool:
        """Whether it is outside's half of a translated flow, which lives as long as the other one."""
        return bool(self.flags & ALIAS)

    @property
    def begun_by(self) -> tuple[bytes, bytes]:
        """Address and port of the end that began."""
        return (self.high, self.high_port) if self.flags & ORIGIN_IS_HIGH else (self.low, self.low_port)

    @property
    def aimed_at(self) -> tuple[bytes, bytes]:
        """Address and port of the other one."""
        return (self.low, self.low_port) if self.flags & ORIGIN_IS_HIGH else (self.high, self.high_port)


class Glance(NamedTuple):
    """Of an entry what says how old it is and whose; the names are ``Flow``'s."""

    key: bytes
    created_ns: int
    last_seen_ns: int
    origin: int
    target: int
    slot: int
    flags: int


class Candidate(NamedTuple):
    """An entry that may be over. ``ends``: an attachment of these, origin and target, has gone; None: it is over if
    it is stale, or outside's half that has lost the other one."""

    key: bytes
    ends: tuple[int, int] | None


def echo_answerer(identifier: bytes) -> bytes:
    """The port of the end that answers an ICMP echo (bpf/packet.h)."""
    return {0: 1, 1: 2}.get(int.from_bytes(identifier, "big"), 0).to_bytes(2, "big")


def key_of(one: tuple[bytes, bytes], other: tuple[bytes, bytes], protocol: int) -> bytes:
    """struct flow_key of two ends, each an address key and a port: the lesser one comes first."""
    low, high = sorted((one, other))
    return _KEY.pack(low[0], high[0], low[1], high[1], protocol)


def entries(descriptor: int) -> Iterator[Flow]:
    """Every entry of the table ``flows``; those that come or go meanwhile may be missed or come twice."""
    for keys, values in bpf.batches(descriptor, FLOW_KEY.size, FLOW.size):
        whole, parts, entries = _WHOLE_KEY.iter_unpack(keys), _KEY.iter_unpack(keys), _ENTRY.iter_unpack(values)
        for key, ends, entry in zip(whole, parts, entries, strict=True):
            yield Flow._make(key + ends + entry)


class FlowMaps:
    """The table, and how much of it each pod has. Synchronous; descriptors stay the caller's."""

    def __init__(self, pinned: loader.Pinned):
        self._pinned = pinned

    @property
    def max_entries(self) -> int:
        """How many entries there can be: two for each flow that is translated."""
        return self._pinned.artifact.maps["flows"].max_entries

    def all(self) -> Iterator[Flow]:
        """Every entry, as ``entries`` gives them."""
        return entries(self._pinned.maps["flows"])

    def attachments(self) -> set[int]:
        """Ids of all attachments that flows speak of."""
        found: set[int] = set()
        for flow in self.all():
            # Outside's half of a service's flow has the service's id as its origin.
            if not (flow.is_alias and flow.flags & SERVICE):
                found |= {flow.origin, flow.target}
        return found

    def glances(self) -> Iterator[list[Glance]]:
        """All entries, some thousands at a time; those that come or go meanwhile may be missed or come twice."""
        for keys, values in bpf.batches(self._pinned.maps["flows"], FLOW_KEY.size, FLOW.size):
            whole, entries = _WHOLE_KEY.iter_unpack(keys), _GLANCE.iter_unpack(values)
            yield [Glance._make(key + entry) for key, entry in zip(whole, entries, strict=True)]

    def collect(self, candidates: Sequence[Candidate]) -> list[bool]:
        """Which of them were over and are out of the table, with their other halves and their part of a pod's share.

        The program that does it looks at each again: what a packet has touched meanwhile stays. None are, while it is
        in no slot.
        """
        with programs.reached(self._pinned.maps[programs.ARRAY], "collect") as program:
            if program is None:
                return [False] * len(candidates)
            return [
                over
                for at in range(0, len(candidates), _AT_ONCE)
                for over in _run(program, candidates[at : at + _AT_ONCE])
            ]

    def counts(self) -> dict[int, int]:
        """Flows of each slot that has some."""
        found = {}
        for key, value in bpf.items(self._pinned.maps["flow_counts"], U32.size, U64.size):
            number = int(U64.unpack(value)[0])
            if number:
                found[int(U32.unpack(key)[0])] = number
        return found

    def shares(self) -> dict[int, int]:
        """Flows of each attachment that has some."""
        counts = self.counts()
        return {attachment: counts[slot] for attachment, slot in self._slots() if slot in counts}

    def begun(self) -> dict[tuple[int, str], int]:
        """Flows that were ever entered, by (attachment id, ``from_pod``: it began them, or ``to_pod``)."""
        descriptor = self._pinned.maps["flows_begun"]
        found = {}
        for attachment, slot in self._slots():
            raw = bpf.lookup(descriptor, U32.pack(slot), BEGUN.size * bpf.possible_cpus())
            assert raw is not None, "an array has all its elements"
            counts = [BEGUN.unpack(raw[at : at + BEGUN.size]) for at in range(0, len(raw), BEGUN.size)]
            for place, direction in enumerate(DIRECTIONS):
                number = sum(int(count[place]) for count in counts)
                if number:
                    found[attachment, direction] = number
        return found

    def _slots(self) -> Iterator[tuple[int, int]]:
        """Attachments' ids with their slots."""
        for _, raw in bpf.items(self._pinned.maps["attachments"], U32.size, ATTACHMENT.size):
            yield attachment_slot(raw)

    def set_counts(self, counts: Mapping[int, int]) -> None:
        """Says how many flows slots have. What programs count in the same moment is lost until the next time."""
        keys = b"".join(U32.pack(slot) for slot in counts)
        bpf.update_batch(self._pinned.maps["flow_counts"], keys, b"".join(map(U64.pack, counts.values())), len(counts))


def _run(program: int, candidates: Sequence[Candidate]) -> list[bool]:
    packed = [CANDIDATE.pack(one.key, *(one.ends or (0, 0)), one.ends is not None) for one in candidates]
    bits = bpf.run_program(program, _FRAME_HEADER + b"".join(packed)).verdict
    return [bool(bits & 1 << place) for place in range(len(candidates))]
