"""Leases opened and closed again and again: a program for `testbed.peer`, one in each pod.

Requests: ``hello``; ``serve`` {service}; ``churn`` {target, times, count, used} → {leases, elapsed_s}: `count` queue
pairs by one connect (None: one by itself), a message through the first one if `used`, all closed, so many times;
``state`` {ended} → {rss_bytes, descriptors, tasks, ended}, once so many of the listener's queue pairs have ended.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING, Any

from rdmanet import verbs
from rdmanet.errors import LeaseRevokedError, VerbsError
from testbed.answering import Requests, answer_requests
from testbed.process import descriptors, rss_bytes

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair

TIMEOUT_S = 90.0


class Program:
    """Carries out requests, one at a time."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: verbs.Session | None = None
        self._ended = 0
        self._changed = asyncio.Condition()

    async def hello(self) -> dict[str, Any]:
        return {}

    async def _opened(self) -> verbs.Session:
        if self._session is None:
            self._session = verbs.Session()
            await self._session.open(TIMEOUT_S)
        return self._session

    async def serve(self, service: str) -> dict[str, Any]:
        listener = await (await self._opened()).listen(service, timeout_s=TIMEOUT_S)
        self._spawn(self._accept(listener))
        return {}

    async def _accept(self, listener: verbs.Listener) -> None:
        while True:
            for qp in await listener.accept_batch():
                self._spawn(self._answer(qp))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, qp: QueuePair) -> None:
        try:
            async with qp:
                while True:
                    await qp.send(await qp.recv())
        except (LeaseRevokedError, VerbsError):  # the connector closed its end: that is how these end
            pass
        finally:
            async with self._changed:
                self._ended += 1
                self._changed.notify_all()

    async def churn(self, target: str, times: int, count: int | None, used: bool) -> dict[str, Any]:
        session = await self._opened()
        began = time.monotonic()
        for _ in range(times):
            if count is None:
                qps = [await session.connect(target, timeout_s=TIMEOUT_S)]
            else:
                qps = await session.connect(target, count=count, timeout_s=TIMEOUT_S)
            if used:
                await qps[0].send(b"still there?")
                await qps[0].recv()
            await verbs.close(*qps)
        return {"leases": times * (count or 1), "elapsed_s": time.monotonic() - began}

    async def state(self, ended: int) -> dict[str, Any]:
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(lambda: self._ended >= ended)
        gc.collect()
        return {
            "rss_bytes": rss_bytes(),
            "descriptors": descriptors(),
            "tasks": len(asyncio.all_tasks()),
            "ended": self._ended,
        }

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        return {"hello": self.hello, "serve": self.serve, "churn": self.churn, "state": self.state}


if __name__ == "__main__":
    asyncio.run(answer_requests(Program().requests))
