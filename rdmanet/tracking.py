"""Takes out of the table of flows what is idle, gone or left over, so that it never fills for good.

Programs enter flows and take over single ones; nothing in the kernel walks the table. An agent that is away for a while
costs nothing but room: the next one collects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from typing import Protocol

from rdmanet.datapath.flows import CLOSING_BOTH, NO_SLOT, REPLIED, SERVICE, TRANSLATED, Flow, echo_answerer, key_of
from rdmanet.datapath.tables import FLOW_TIMEOUTS_S
from rdmanet.errors import RdmanetError

log = logging.getLogger(__name__)

_TCP, _ICMPS = 6, (1, 58)
_NS_PER_S = 1_000_000_000
#: Halves are entered one after the other: a younger one may still be waiting for the other.
_HALF_NS = 5 * _NS_PER_S


class Flows(Protocol):
    """``rdmanet.datapath.flows.FlowMaps``."""

    @property
    def max_entries(self) -> int: ...
    def all(self) -> Iterable[Flow]: ...
    def find(self, key: bytes) -> Flow | None: ...
    def delete(self, keys: Collection[bytes]) -> None: ...
    def counts(self) -> dict[int, int]: ...
    def set_counts(self, counts: Mapping[int, int]) -> None: ...


def timeout_s(flow: Flow) -> int:
    """After so many seconds without a packet the flow is worth nothing (flow_timeout_s in bpf/flow.h)."""
    if flow.protocol == _TCP:
        if flow.closing == CLOSING_BOTH:
            return FLOW_TIMEOUTS_S["tcp_closing"]
        return FLOW_TIMEOUTS_S["tcp_established" if flow.flags & REPLIED else "tcp_opening"]
    if flow.protocol in _ICMPS:
        return FLOW_TIMEOUTS_S["icmp"]
    return FLOW_TIMEOUTS_S["udp_replied" if flow.flags & REPLIED else "udp_opening"]


def is_stale(flow: Flow, now_ns: int) -> bool:
    """Whether it has been idle for longer than that."""
    return now_ns - flow.last_seen_ns > timeout_s(flow) * _NS_PER_S


def alias_key(flow: Flow) -> bytes | None:
    """The key of outside's half of a translated flow; None where it is not translated."""
    if not flow.flags & TRANSLATED:
        return None
    return _other_half(flow, (flow.translated, flow.translated_port), _pods_end(flow))


def inside_key(alias: Flow) -> bytes:
    """The key of the pod's half."""
    return _other_half(alias, (alias.translated, alias.translated_port), _own_end(alias))


def _other_half(flow: Flow, end: tuple[bytes, bytes], instead_of: tuple[bytes, bytes]) -> bytes:
    ends = [(flow.low, flow.low_port), (flow.high, flow.high_port)]
    ends.remove(instead_of)
    address, port = ends[0]
    # Who answers an echo has a port that follows from the identifier.
    return key_of(end, (address, echo_answerer(end[1]) if flow.protocol in _ICMPS else port), flow.protocol)


def _pods_end(flow: Flow) -> tuple[bytes, bytes]:
    return flow.aimed_at if flow.flags & SERVICE else flow.begun_by


def _own_end(alias: Flow) -> tuple[bytes, bytes]:
    """What outside sees of the pod: the end that began, or, of a service's flow, the one that it was aimed at."""
    return alias.aimed_at if alias.flags & SERVICE else alias.begun_by


class Tracking:
    """Looks through the table every now and then; ``start``, then ``stop``."""

    def __init__(self, flows: Flows, attachments: Callable[[], Collection[int]], executor: Executor, interval_s: float):
        """``attachments``: ids of all that there are, asked in a thread of the executor."""
        self._flows = flows
        self._attachments = attachments
        self._executor = executor
        self._interval_s = interval_s
        self._worker: asyncio.Task[None] | None = None
        self._entries = 0

    @property
    def entries(self) -> int:
        """Of the table, after it was last looked through."""
        return self._entries

    def start(self) -> None:
        """Begins to collect."""
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="collector of flows")

    async def stop(self) -> None:
        """Ends it; the table stays. Idempotent."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    async def _work(self) -> None:
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, self.collect)
            except RdmanetError as error:
                log.error("idle flows could not be collected: %s", error)
            await asyncio.sleep(self._interval_s)

    def collect(self) -> int:
        """Goes through the table once; returns how many entries were taken out. Raises BpfError."""
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        there = list(self._flows.all())
        self._entries = len(there)
        if not there and not self._flows.counts():
            return 0
        # After the table was read: an attachment comes before its first flow.
        known = {0, *self._attachments()}
        inside = {flow.key: flow for flow in there if not flow.is_alias}
        gone: set[bytes] = set()
        for flow in inside.values():
            if flow.origin not in known or flow.target not in known:
                gone.add(flow.key)
            elif is_stale(flow, now_ns):
                # A packet may have come meanwhile.
                latest = self._flows.find(flow.key)
                if latest is not None and is_stale(latest, now_ns):
                    gone.add(flow.key)
        # Outside's halves first: else a port search could give one to another flow in between.
        aliases = {key for number in gone if (key := alias_key(inside[number])) is not None}
        aliases &= {flow.key for flow in there if flow.is_alias}
        aliases |= {flow.key for flow in there if flow.is_alias and self._is_orphan(flow, inside, now_ns)}
        self._flows.delete(aliases)
        self._flows.delete(gone)
        self._entries = len(there) - len(aliases) - len(gone)
        self._count(flow for flow in inside.values() if flow.key not in gone)
        return len(aliases) + len(gone)

    def _is_orphan(self, alias: Flow, inside: Mapping[bytes, Flow], now_ns: int) -> bool:
        if now_ns - alias.created_ns < _HALF_NS:
            return False
        key = inside_key(alias)
        flow = inside.get(key) or self._flows.find(key)
        return flow is None or alias_key(flow) != alias.key

    def _count(self, flows: Iterable[Flow]) -> None:
        """Each pod's share is what is there: an agent or a program that ended in the middle may have miscounted."""
        counted = Counter(flow.slot for flow in flows if flow.slot != NO_SLOT)
        said = self._flows.counts()
        self._flows.set_counts(
            {slot: counted[slot] for slot in said.keys() | counted.keys() if counted[slot] != said.get(slot, 0)}
        )
