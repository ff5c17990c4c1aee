"""Queue pairs to one service, leased ahead of demand: handing one out costs microseconds, leasing it milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdmanet import lease as wire
from rdmanet.errors import LeaseRefusedError, RdmanetError, UnavailableError

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair

_log = logging.getLogger(__name__)

#: Between attempts to lease from a peer that is away: from the first, twice as long each time, to the longest.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """How a pool is and what it has done: now, and since it was made."""

    size: int  # queue pairs that it should have, handed out or not
    ready: int  # now, to be handed out
    acquired: int  # now, handed out
    waiting: int  # now, callers of acquire()
    leased: int  # queue pairs so far
    handed_out: int  # so far
    at_once: int  # of those, without waiting
    lost: int  # broken or closed in the pool or in use, and not returned
    failures: int  # attempts to lease that failed


class Pool:
    """``size`` queue pairs to one service; made by ``Session.pool``.

    ``acquire`` gives a queue pair at once where one is ready, ``release`` takes it back for the next. Both sides should
    be done with each other by then: what the peer sends later goes to the next user. One that broke, was closed, or has
    unread messages is not used again; the pool leases another behind, trying again with growing pauses while the peer
    is away.
    """

    def __init__(
        self,
        target: str,
        size: int,
        lease: Callable[[int], Awaitable[list[QueuePair]]],
        on_close: Callable[[Pool], Awaitable[None]],
    ):
        self.target = target
        self.size = size
        self._lease = lease
        self._on_close = on_close
        self._ready: deque[QueuePair] = deque()
        self._acquired: set[QueuePair] = set()
        self._waiting: deque[asyncio.Future[QueuePair]] = deque()
        self._short = asyncio.Event()
        self._last_error: RdmanetError | None = None
        self._refilling: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._leased = self._handed_out = self._at_once = self._lost = self._failures = 0

    @property
    def statistics(self) -> PoolStatistics:
        """As it is now."""
        return PoolStatistics(
            size=self.size,
            ready=len(self._ready),
            acquired=len(self._acquired),
            waiting=sum(not waiting.done() for waiting in self._waiting),
            leased=self._leased,
            handed_out=self._handed_out,
            at_once=self._at_once,
            lost=self._lost,
            failures=self._failures,
        )

    async def open(self) -> None:
        """Lease all of it; raises what leasing does."""
        try:
            while self._missing > 0:
                await self._lease_some(min(self._missing, wire.MAX_BATCH))
        except BaseException:
            await self.close()
            raise
        self._refilling = asyncio.get_running_loop().create_task(self._refill(), name=f"rdmanet pool {self.target}")

    async def acquire(self, *, timeout_s: float | None = 10.0) -> QueuePair:
        """A queue pair that is ready; give it back with ``release``, or close it.

        Waits while all are in use or the peer is away: LeaseRefusedError after ``timeout_s``, with the last reason.
        UnavailableError when the pool is closed.
        """
        self._check()
        if self._ready:
            self._at_once += 1
            self._handed_out += 1
            qp = self._ready.pop()  # the one that was used last is the warmest
            self._acquired.add(qp)
            return qp
        waiting: asyncio.Future[QueuePair] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(timeout_s):
                qp = await asyncio.shield(waiting)
        except TimeoutError as error:
            self._take_back(waiting)
            raise LeaseRefusedError(
                f"no queue pair to {self.target} was ready within {timeout_s:g} s: {self._why_none()}",
                operation="timed_out",
                subject=self.target,
            ) from error
        except asyncio.CancelledError:
            self._take_back(waiting)
            raise
        self._handed_out += 1
        return qp

    async def release(self, qp: QueuePair) -> None:
        """Take a queue pair back; one that cannot be used again is closed and replaced."""
        if qp not in self._acquired:  # broken or closed: it is not the pool's any more
            await qp.close()
            return
        self._acquired.discard(qp)
        qp.look()
        if qp.broken or not qp.idle:
            await self._lose(qp)
        else:
            self._offer(qp)

    @contextlib.asynccontextmanager
    async def queue_pair(self, *, timeout_s: float | None = 10.0) -> AsyncIterator[QueuePair]:
        """``acquire`` and ``release``; after an exception it is closed instead, since nobody knows how far the
        conversation was."""
        qp = await self.acquire(timeout_s=timeout_s)
        try:
            yield qp
        except BaseException:
            await qp.close()
            raise
        await self.release(qp)

    async def close(self) -> None:
        """Close every queue pair, also those in use, and give their leases back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        tasks = [*self._closing, *([self._refilling] if self._refilling is not None else [])]
        if self._refilling is not None:
            self._refilling.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(self._closed_error())
        qps = [*self._ready, *self._acquired]
        self._ready.clear()
        self._acquired.clear()
        for qp in qps:
            qp.on_broken = None
        try:
            from rdmanet.verbs.queue_pair import close_all

            await close_all(qps)
        finally:
            await self._on_close(self)

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # Inside

    def _closed_error(self) -> UnavailableError:
        return UnavailableError("the pool has been closed", operation="acquire", subject=self.target)

    def _check(self) -> None:
        if self._closed:
            raise self._closed_error()

    @property
    def _missing(self) -> int:
        return self.size - len(self._ready) - len(self._acquired)

    def _why_none(self) -> str:
        if self._last_error is not None:
            return self._last_error.sentence
        return f"all {self.size} are in use"

    def _offer(self, qp: QueuePair) -> None:
        """A queue pair that is free: for who waits longest, else for later."""
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                self._acquired.add(qp)
                waiting.set_result(qp)
                return
        self._ready.append(qp)

    def _take_back(self, waiting: asyncio.Future[QueuePair]) -> None:
        """Whoever waited does not any more; what it was given before it could take it is the next one's."""
        if not waiting.done():
            waiting.cancel()
        elif not waiting.cancelled() and waiting.exception() is None:
            qp = waiting.result()
            if qp in self._acquired:
                self._acquired.discard(qp)
                self._offer(qp)
            else:  # broken meanwhile
                self._close_behind(qp)

    async def _lease_some(self, count: int) -> None:
        qps = await self._lease(count)
        self._last_error = None
        self._leased += len(qps)
        for qp in qps:
            qp.on_broken = lambda qp=qp: self._broke(qp)
            if qp.broken:  # between being granted and here
                self._broke(qp)
            else:
                self._offer(qp)

    def _broke(self, qp: QueuePair) -> None:
        """It failed, was revoked or closed, wherever it is: another is leased in its place."""
        qp.on_broken = None
        if qp in self._ready:
            self._ready.remove(qp)
            self._close_behind(qp)
        self._acquired.discard(qp)  # whoever has it finds out, and closes it
        self._lost += 1
        self._short.set()

    def _close_behind(self, qp: QueuePair) -> None:
        task = asyncio.get_running_loop().create_task(qp.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _lose(self, qp: QueuePair) -> None:
        if qp.on_broken is not None:
            self._broke(qp)
        await qp.close()

    async def _refill(self) -> None:
        """Lease what is missing, for as long as the pool is open."""
        pause_s, most = _FIRST_PAUSE_S, wire.MAX_BATCH
        while True:
            await self._short.wait()
            self._short.clear()
            while (count := min(self._missing, most)) > 0:
                try:
                    await self._lease_some(count)
                    pause_s, most = _FIRST_PAUSE_S, wire.MAX_BATCH
                except RdmanetError as error:
                    self._failures += 1
                    self._last_error = error
                    _log.info("the pool of %s is short of %d queue pairs: %s", self.target, self._missing, error)
                    most = max(1, count // 2)  # what is too much at once, for a limit, may fit in part
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
