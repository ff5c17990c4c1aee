"""RDMA inside a pod, through the library `rdmanet.verbs` and nothing else: a program for `testbed.peer`.

Requests: ``hello``, answered when all is imported; ``serve`` {service}; ``connect`` {target} → {ready_ms}; ``write``
{target, bytes, address} → {ready_ms, write_s, equal}, from this pod's `address` or its first; ``stream_begin`` {target,
pause_s}, ``stream_reach`` {rounds, within_s} → {rounds}, ``stream_end`` → {rounds, bytes, equal}.

On a connection the listener sends its memory region, the connector writes into it by RDMA and says so in a message: a
JSON object with ``bytes`` (where the bytes are in the region, and how many) or ``end``. The listener answers the latter
with the SHA-256 of everything that arrived.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import sys
import time
from typing import Any

from rdmanet import verbs
from rdmanet.model import IPAddress
from rdmanet.verbs.queue_pair import QueuePair
from testbed.answering import Requests, answer_requests

ROUND_BYTES = 1 << 16
TIMEOUT_S = 60.0
#: Emulated machines take seconds to import pyverbs and open the device, which the first connection includes.
CONNECT_TIMEOUT_S = 60.0


async def offer(qp: QueuePair) -> None:
    """The listener's side of one connection."""
    async with qp:
        size = int(json.loads(await qp.recv())["region_bytes"])
        region = qp.allocate(size, remote_write=True)
        await qp.send(region.remote.to_bytes())
        digest = hashlib.sha256()
        received = 0
        while "end" not in (said := json.loads(await qp.recv())):
            data = region.buffer[: said["bytes"]]
            digest.update(data)
            received += len(data)
            await qp.send(b"ok")
        await qp.send(json.dumps({"bytes": received, "sha256": digest.hexdigest()}).encode())
        await qp.recv()  # the connector has read it: now the queue pair may go


class Writer:
    """The connector's side of one connection: memory to write from, and what was written."""

    def __init__(self, qp: QueuePair, local: verbs.MemoryRegion, remote: verbs.RemoteRegion):
        self.qp = qp
        self.local = local
        self._remote = remote
        self._digest = hashlib.sha256()
        self._bytes = 0

    @classmethod
    async def begin(cls, target: str, size: int, address: IPAddress | None = None) -> tuple[Writer, float]:
        """Connect and learn the peer's region; also returns the milliseconds from asking to ready to send."""
        started = time.monotonic()
        qp = await verbs.connect(target, address=address, timeout_s=CONNECT_TIMEOUT_S)
        ready_ms = (time.monotonic() - started) * 1000
        await qp.send(json.dumps({"region_bytes": size}).encode())
        remote = verbs.RemoteRegion.from_bytes(await qp.recv())
        return cls(qp, qp.allocate(size), remote), ready_ms

    async def write(self) -> float:
        """RDMA WRITE of the whole region; returns the seconds until the peer's device had acknowledged all."""
        started = time.monotonic()
        await self.qp.write(self.local, self._remote)
        elapsed_s = time.monotonic() - started
        self._digest.update(self.local.buffer)
        self._bytes += self.local.length
        await self.qp.send(json.dumps({"bytes": self.local.length}).encode())
        await self.qp.recv()
        return elapsed_s

    async def end(self) -> dict[str, Any]:
        """Finish; how much was written, and whether the peer's memory had the same bytes each time."""
        await self.qp.send(b'{"end": true}')
        answer = json.loads(await self.qp.recv())
        await self.qp.send(b"done")
        await self.qp.close()
        return {"bytes": self._bytes, "equal": answer == {"bytes": self._bytes, "sha256": self._digest.hexdigest()}}


class Stream:
    """A paced stream of RDMA WRITEs, each with other bytes and confirmed by the peer, until told to end."""

    def __init__(self, writer: Writer, pause_s: float):
        self.rounds = 0
        self._writer = writer
        self._pause_s = pause_s
        self._ending = asyncio.Event()
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        self._writer.local.buffer[:] = os.urandom(ROUND_BYTES)
        try:
            while not self._ending.is_set():
                self._writer.local.buffer[:8] = self.rounds.to_bytes(8, "big")
                await self._writer.write()
                async with self._changed:
                    self.rounds += 1
                    self._changed.notify_all()
                await asyncio.sleep(self._pause_s)  # the pace of the load, nothing waits on it
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def reach(self, rounds: int, within_s: float) -> int:
        """Wait until so many rounds are done; returns how many are."""
        async with asyncio.timeout(within_s), self._changed:
            await self._changed.wait_for(lambda: self.rounds >= rounds or self._task.done())
        if self._task.done():
            self._task.result()
        return self.rounds

    async def end(self) -> dict[str, Any]:
        """Finish; what was written, and whether the peer has the same."""
        self._ending.set()
        await self._task
        return {"rounds": self.rounds, **await self._writer.end()}


class Peer:
    """Carries out requests, one at a time."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[verbs.Listener] = []
        self._stream: Stream | None = None

    async def hello(self) -> dict[str, Any]:
        return {}

    async def serve(self, service: str) -> dict[str, Any]:
        listener = await verbs.listen(service, timeout_s=CONNECT_TIMEOUT_S)
        self._listeners.append(listener)
        self._spawn(self._accept(listener))
        return {}

    async def _accept(self, listener: verbs.Listener) -> None:
        async for qp in listener:
            self._spawn(offer(qp))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            print(f"{type(task.exception()).__name__}: {task.exception()}", file=sys.stderr, flush=True)

    async def connect(self, target: str) -> dict[str, Any]:
        writer, ready_ms = await Writer.begin(target, 4096)
        await writer.end()
        return {"ready_ms": ready_ms}

    async def write(self, target: str, bytes: int, address: str | None = None) -> dict[str, Any]:
        writer, ready_ms = await Writer.begin(target, bytes, ipaddress.ip_address(address) if address else None)
        step = 1 << 20
        for offset in range(0, bytes, step):
            writer.local.buffer[offset : offset + step] = os.urandom(min(step, bytes - offset))
        write_s = await writer.write()
        return {"ready_ms": ready_ms, "write_s": write_s, **await writer.end()}

    async def stream_begin(self, target: str, pause_s: float) -> dict[str, Any]:
        writer, ready_ms = await Writer.begin(target, ROUND_BYTES)
        self._stream = Stream(writer, pause_s)
        return {"ready_ms": ready_ms}

    async def stream_reach(self, rounds: int, within_s: float) -> dict[str, Any]:
        assert self._stream is not None, "no stream has begun"
        return {"rounds": await self._stream.reach(rounds, within_s)}

    async def stream_end(self) -> dict[str, Any]:
        assert self._stream is not None, "no stream has begun"
        stream, self._stream = self._stream, None
        return await stream.end()

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        return {
            "hello": self.hello,
            "serve": self.serve,
            "connect": self.connect,
            "write": self.write,
            "stream_begin": self.stream_begin,
            "stream_reach": self.stream_reach,
            "stream_end": self.stream_end,
        }


if __name__ == "__main__":
    asyncio.run(answer_requests(Peer().requests))
