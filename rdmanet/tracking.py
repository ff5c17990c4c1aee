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
    def take(self, key: bytes) -> Flow | None: ...
    def put_back(self, flow: Flow) -> None: ...
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
        over = [flow for flow in inside.values() if _is_over(flow, known, now_ns)]
        aliases, gone = self._take_out(over, known)
        orphans = self._take_orphans(
            alias for alias in there if alias.is_alias and alias.key not in aliases and _may_be_orphan(alias, inside)
        )
        taken = len(aliases) + len(gone) + orphans
        self._entries = len(there) - taken
        self._count(flow for flow in inside.values() if flow.key not in gone)
        return taken

    def _take_out(self, over: Iterable[Flow], known: Collection[int]) -> tuple[set[bytes], set[bytes]]:
        """Those that are still over: the keys of outside's halves and of the others. Its ends may begin a flow anew at
        any time, under the same key and often behind the same port: what is found to live when it is taken is put
        back."""
        aliases: set[bytes] = set()
        gone: set[bytes] = set()
        for old in over:
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            flow = self._flows.find(old.key)
            if flow is None or not _is_over(flow, known, now_ns):
                continue
            # Outside's first: else a port search could give it to another flow in between.
            alias = self._take_half(flow)
            taken = self._flows.take(flow.key)
            if taken is None:
                # A program has taken it. It enters outside's half before the other.
                if alias is not None and now_ns - alias.created_ns < _HALF_NS:
                    self._flows.put_back(alias)
                continue
            if not _is_over(taken, known, now_ns):
                if alias is not None and alias_key(taken) == alias.key:
                    self._flows.put_back(alias)
                self._flows.put_back(taken)
                continue
            gone.add(taken.key)
            if alias is not None:
                aliases.add(alias.key)
        return aliases, gone

    def _take_half(self, flow: Flow) -> Flow | None:
        """Outside's half of the flow, which is out of the table then; None where there is none."""
        key = alias_key(flow)
        alias = None if key is None else self._flows.take(key)
        if alias is None or (alias.is_alias and inside_key(alias) == flow.key):
            return alias
        self._flows.put_back(alias)
        return None

    def _take_orphans(self, aliases: Iterable[Flow]) -> int:
        """Outside's halves without the other; how many there were."""
        count = 0
        for old in aliases:
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            alias = self._flows.find(old.key)
            if alias is None or not alias.is_alias or now_ns - alias.created_ns < _HALF_NS:
                continue
            # While it is out of the table an answer finds nothing: only what has no other half by now is taken.
            if self._has_half(alias):
                continue
            taken = self._flows.take(old.key)
            if taken is None:
                continue
            if not taken.is_alias or taken.created_ns != alias.created_ns or self._has_half(taken):
                self._flows.put_back(taken)
                continue
            count += 1
        return count

    def _has_half(self, alias: Flow) -> bool:
        flow = self._flows.find(inside_key(alias))
        return flow is not None and alias_key(flow) == alias.key

    def _count(self, flows: Iterable[Flow]) -> None:
        """Each pod's share is what is there: an agent or a program that ended in the middle may have miscounted."""
        counted = Counter(flow.slot for flow in flows if flow.slot != NO_SLOT)
        said = self._flows.counts()
        self._flows.set_counts(
            {slot: counted[slot] for slot in said.keys() | counted.keys() if counted[slot] != said.get(slot, 0)}
        )


def _is_over(flow: Flow, known: Collection[int], now_ns: int) -> bool:
    return flow.origin not in known or flow.target not in known or is_stale(flow, now_ns)


def _may_be_orphan(alias: Flow, inside: Mapping[bytes, Flow]) -> bool:
    """By what was read of the table."""
    flow = inside.get(inside_key(alias))
    return flow is None or alias_key(flow) != alias.key
