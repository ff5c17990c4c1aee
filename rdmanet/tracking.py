"""Takes out of the table of flows what is idle, gone or left over, so that it never fills for good.

Programs enter flows and take over single ones; nothing in the kernel walks the table. What may be over is found here,
and bpf/collect.c decides and removes it. An agent that is away for a while costs nothing but room: the next one
collects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Protocol

from rdmanet import background
from rdmanet.datapath.flows import ALIAS, CLOSING_BOTH, NO_SLOT, REPLIED, TRANSLATED, Candidate, Flow, Glance
from rdmanet.datapath.tables import FLOW_TIMEOUTS_S
from rdmanet.errors import RdmanetError

log = logging.getLogger(__name__)

_TCP, _ICMPS = 6, (1, 58)
_NS_PER_S = 1_000_000_000
#: Outside's halves that are younger are not asked about: they may still be waiting for the other (COLLECT_HALF_S in
#: bpf/collect.c).
_HALF_NS = 5 * _NS_PER_S
_LEAST_NS = min(FLOW_TIMEOUTS_S.values()) * _NS_PER_S


class Flows(Protocol):
    """``rdmanet.datapath.flows.FlowMaps``."""

    @property
    def max_entries(self) -> int: ...
    def glances(self) -> Iterable[list[Glance]]: ...
    def collect(self, candidates: Sequence[Candidate]) -> list[bool]: ...
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
        self._worker = background.begin(self._work(), "collector of flows")

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
        known = {0, *self._attachments()}
        found = _Found(self._flows)
        strangers: list[Glance] = []
        for glances in self._flows.glances():
            found.entries += len(glances)
            candidates = []
            for one in glances:
                if one.flags & ALIAS:
                    if now_ns - one.created_ns > _HALF_NS:
                        candidates.append(one)
                    continue
                found.counted[one.slot] += 1
                if one.origin not in known or one.target not in known:
                    strangers.append(one)
                elif now_ns - one.last_seen_ns > _LEAST_NS:
                    candidates.append(one)
            found.collect(candidates, gone=False)
        # Asked again after the table was read: an attachment comes before its first flow.
        known = {0, *self._attachments()} if strangers else known
        found.collect([one for one in strangers if not {one.origin, one.target} <= known], gone=True)
        self._entries = found.entries - found.taken
        self._count(found.counted)
        return found.taken

    def _count(self, counted: Counter[int]) -> None:
        """Each pod's share is what is there: an agent or a program that ended in the middle may have miscounted."""
        del counted[NO_SLOT]
        said = self._flows.counts()
        wrong = {slot: counted[slot] for slot in said.keys() | counted.keys() if counted[slot] != said.get(slot, 0)}
        if wrong:
            self._flows.set_counts(wrong)


class _Found:
    """What one look through the table comes to."""

    def __init__(self, flows: Flows):
        self._flows = flows
        self.entries = 0
        self.taken = 0
        self.counted: Counter[int] = Counter()

    def collect(self, glances: Sequence[Glance], *, gone: bool) -> None:
        """Takes out those that are over."""
        candidates = [Candidate(one.key, (one.origin, one.target) if gone else None) for one in glances]
        for one, over in zip(glances, self._flows.collect(candidates), strict=True):
            if over:
                self.taken += 2 if one.flags & (TRANSLATED | ALIAS) == TRANSLATED else 1
                if not one.flags & ALIAS:
                    self.counted[one.slot] -= 1
