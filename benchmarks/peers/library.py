"""`rdmanet.verbs` inside a pod, timed where it runs: a program for `testbed.peer`.

Requests: ``hello``, answered when all is imported; ``serve`` {service}; ``send`` {target, bytes, rounds} and ``write``
{target, bytes, rounds} → {each_us}: half of a message there and back, and one RDMA WRITE that is waited for.
Each of their connections begins with a message that says what it is for.

``hold`` {service, small} accepts and keeps what is accepted; ``lease`` {target, count, fresh, small} → {each_us} leases
`count` queue pairs in one connect (None: one by itself) and takes the time from asking until they are ready to send,
divided by their number; in the session that is open or, if `fresh`, in one that is opened for it; `small`: with the
smallest queues. ``drop`` gives back what either of them holds.

``pool`` {target, size} opens a pool; ``warm`` {count} → {each_us} takes so many queue pairs from it, one after another,
and gives them back: what each took to be handed out; ``ask`` {within_s} → {took_s} takes one, has a message answered
by ``serve``, and lets it go; ``statistics`` → the pool's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Coroutine
from typing import Any

from rdmanet import verbs
from rdmanet.verbs import RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from testbed.answering import Requests, answer_requests

TIMEOUT_S = 60.0
#: As small as the queues that cmtime asks for.
SMALL = verbs.Options(window=1, messages=1, message_bytes=64)


async def answer_messages(qp: QueuePair, rounds: int) -> None:
    """The listener's side of ``send``: every message goes back."""
    for _ in range(rounds):
        await qp.send(await qp.recv())


async def serve_connection(qp: QueuePair) -> None:
    """The listener's side of any connection."""
    async with qp:
        wish = json.loads(await qp.recv())
        if wish["do"] == "send":
            await answer_messages(qp, wish["rounds"])
        else:
            await qp.send(qp.allocate(wish["bytes"], remote_write=True).remote.to_bytes())
        await qp.recv()  # the connector is done: now the queue pair may go


class Program:
    """Carries out requests, one at a time."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[verbs.Listener] = []
        self._session: verbs.Session | None = None
        self._fresh: list[verbs.Session] = []
        self._held: list[QueuePair] = []
        self._pool: verbs.Pool | None = None

    async def hello(self) -> dict[str, Any]:
        return {}

    async def serve(self, service: str) -> dict[str, Any]:
        listener = await verbs.listen(service, timeout_s=TIMEOUT_S)
        self._listeners.append(listener)
        self._spawn(self._accept(listener))
        return {}

    async def _accept(self, listener: verbs.Listener) -> None:
        async for qp in listener:
            self._spawn(serve_connection(qp))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            print(f"{type(task.exception()).__name__}: {task.exception()}", file=sys.stderr, flush=True)

    async def send(self, target: str, bytes: int, rounds: int) -> dict[str, Any]:
        message = b"x" * bytes
        async with await verbs.connect(target, timeout_s=TIMEOUT_S) as qp:
            await qp.send(json.dumps({"do": "send", "rounds": rounds}).encode())
            began = time.monotonic_ns()
            for _ in range(rounds):
                await qp.send(message)
                await qp.recv()
            elapsed_ns = time.monotonic_ns() - began
            await qp.send(b"done")
        return {"each_us": elapsed_ns / 1000 / rounds / 2}

    async def write(self, target: str, bytes: int, rounds: int) -> dict[str, Any]:
        async with await verbs.connect(target, timeout_s=TIMEOUT_S) as qp:
            await qp.send(json.dumps({"do": "write", "bytes": bytes}).encode())
            remote = RemoteRegion.from_bytes(await qp.recv())
            region = qp.allocate(bytes)
            began = time.monotonic_ns()
            for _ in range(rounds):
                await qp.write(region, remote)
            elapsed_ns = time.monotonic_ns() - began
            await qp.send(b"done")
        return {"each_us": elapsed_ns / 1000 / rounds}

    async def hold(self, service: str, small: bool) -> dict[str, Any]:
        listener = await verbs.listen(service, options=SMALL if small else None, timeout_s=TIMEOUT_S)
        self._listeners.append(listener)
        self._spawn(self._keep(listener))
        return {}

    async def _keep(self, listener: verbs.Listener) -> None:
        while True:
            self._held += await listener.accept_batch()

    async def _opened(self) -> verbs.Session:
        if self._session is None:
            self._session = verbs.Session()
            await self._session.open(TIMEOUT_S)
        return self._session

    async def lease(self, target: str, count: int | None, fresh: bool, small: bool) -> dict[str, Any]:
        session = await self._opened()
        options = SMALL if small else None
        began = time.monotonic_ns()
        if fresh:
            session = verbs.Session()
            await session.open(TIMEOUT_S)
            self._fresh.append(session)
        if count is None:
            self._held.append(await session.connect(target, options=options, timeout_s=TIMEOUT_S))
        else:
            self._held += await session.connect(target, count=count, options=options, timeout_s=TIMEOUT_S)
        elapsed_ns = time.monotonic_ns() - began
        return {"each_us": elapsed_ns / 1000 / (count or 1)}

    async def drop(self) -> dict[str, Any]:
        await asyncio.gather(*(qp.close() for qp in self._held))
        self._held.clear()
        for session in self._fresh:
            await session.close()
        self._fresh.clear()
        return {}

    async def pool(self, target: str, size: int) -> dict[str, Any]:
        if self._pool is not None:
            await self._pool.close()
        self._pool = await (await self._opened()).pool(target, size=size, timeout_s=TIMEOUT_S)
        return {}

    async def warm(self, count: int) -> dict[str, Any]:
        assert self._pool is not None, "no pool has been opened"
        taken, each_us = [], []
        for _ in range(count):
            began = time.monotonic_ns()
            taken.append(await self._pool.acquire())
            each_us.append((time.monotonic_ns() - began) / 1000)
        for qp in taken:
            await self._pool.release(qp)
        return {"each_us": each_us}

    async def ask(self, within_s: float) -> dict[str, Any]:
        assert self._pool is not None, "no pool has been opened"
        began = time.monotonic()
        while True:
            try:
                async with self._pool.queue_pair(timeout_s=within_s) as qp:
                    await qp.send(json.dumps({"do": "send", "rounds": 1}).encode(), timeout_s=within_s)
                    await qp.send(b"still there?", timeout_s=within_s)
                    assert await qp.recv(timeout_s=within_s) == b"still there?"
                    await qp.send(b"done", timeout_s=within_s)
                    return {"took_s": time.monotonic() - began}
            except (verbs.LeaseRevokedError, verbs.VerbsError):  # of the peer that was: the next one may be new
                if time.monotonic() - began > within_s:
                    raise

    async def statistics(self) -> dict[str, Any]:
        assert self._pool is not None, "no pool has been opened"
        return dataclasses.asdict(self._pool.statistics)

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        return {
            "hello": self.hello,
            "serve": self.serve,
            "send": self.send,
            "write": self.write,
            "hold": self.hold,
            "lease": self.lease,
            "drop": self.drop,
            "pool": self.pool,
            "warm": self.warm,
            "ask": self.ask,
            "statistics": self.statistics,
        }


if __name__ == "__main__":
    asyncio.run(answer_requests(Program().requests))
