"""A service that other pods connect to, and the queue pairs that wait there to be accepted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from rdmanet.errors import LeaseRefusedError, TimedOutError, UnavailableError
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from types import TracebackType

    from rdmanet.verbs.queue_pair import QueuePair

#: Connects that may wait to be accepted, whatever their batches' sizes; more are rejected.
BACKLOG = 16


class Listener:
    """``accept`` gives one queue pair after another, as ``async for`` does; ``accept_batch`` those of one connect."""

    def __init__(self, service: str, options: Options, on_close: Callable[[Listener], Awaitable[None]]):
        self.service = service
        self.options = options
        self.established = False
        self._on_close = on_close
        self._waiting: deque[list[QueuePair]] = deque()
        self._arrivals = asyncio.Semaphore(0)  # of queue pairs, and one more for all when there is an end
        self._failure: LeaseRefusedError | None = None
        self._unhealthy: str | None = None  # why the pod's device cannot be used now
        self._closed = False

    async def accept(self, *, timeout_s: float | None = None) -> QueuePair:
        """The next queue pair, connected and ready; of a batch one after another, in the connector's order.

        It may have failed or been closed by its peer already: then ``recv`` gives what has arrived, and every operation
        the reason. Raises UnavailableError once the listener is closed and while the pod's device cannot be used,
        TimedOutError after ``timeout_s``.
        """
        await self._arrival(timeout_s)
        first = self._waiting[0]
        qp = first.pop(0)
        if first:
            self._arrivals.release()
        else:
            self._waiting.popleft()
        return qp

    async def accept_batch(self, *, timeout_s: float | None = None) -> list[QueuePair]:
        """All queue pairs of the next connect, in the connector's order (those that ``accept`` has not taken yet); one
        where it asked for one. Raises as ``accept``."""
        await self._arrival(timeout_s)
        return self._waiting.popleft()

    async def _arrival(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._arrivals.acquire()
                while not (self._waiting or self._failure or self._unhealthy or self._closed):
                    await self._arrivals.acquire()  # the device is back since somebody was told that it is gone
        except TimeoutError as error:
            raise TimedOutError(
                f"nobody connected within {timeout_s:g} s", operation="accept", subject=self.service
            ) from error
        if self._waiting:
            return
        self._arrivals.release()  # for the others that wait
        if self._failure is not None:
            raise LeaseRefusedError(self._failure.sentence, operation="listen", subject=self.service)
        if self._unhealthy is not None and not self._closed:
            raise UnavailableError(self._unhealthy, operation="device", subject=self.service)
        raise UnavailableError("the listener has been closed", operation="accept", subject=self.service)

    async def __aiter__(self) -> AsyncIterator[QueuePair]:
        while not self._closed:
            try:
                qp = await self.accept()
            except (UnavailableError, LeaseRefusedError):
                if self._unhealthy is not None and not self._closed:
                    raise
                break
            yield qp

    @property
    def full(self) -> bool:
        return len(self._waiting) >= BACKLOG

    def deliver(self, qps: list[QueuePair]) -> bool:
        """Hand queue pairs to ``accept``; False when the listener is closed."""
        if not self._closed:
            self._waiting.append(list(qps))
            self._arrivals.release()
        return not self._closed

    def fail(self, failure: LeaseRefusedError) -> None:
        """The agent came back and does not let this service listen again."""
        self._failure = failure
        self._arrivals.release()

    def device_state(self, sentence: str | None) -> None:
        """The pod's device cannot be used any more, and why; or, without a sentence, it can be used again."""
        self._unhealthy = sentence
        if sentence is not None:
            self._arrivals.release()

    async def close(self) -> None:
        """Stop listening; queue pairs that nobody accepted are closed, accepted ones live on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        waiting = [qp for qps in self._waiting for qp in qps]
        self._waiting.clear()
        self._arrivals.release()
        try:
            if waiting:
                from rdmanet.verbs.queue_pair import close_all

                await close_all(waiting)
        finally:
            await self._on_close(self)

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
