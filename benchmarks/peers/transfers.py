"""Leased transfers that account for every byte, and can be disturbed: a program for `testbed.peer`, one in each pod.

Requests: ``hello``; ``serve`` {service}; ``begin`` {target, kinds, size, within_s, address}, which starts a stream of
each kind ("write", "send" or "pool"), from this own address; ``reach`` {rounds, within_s} → {kind: rounds}, when every
stream that still runs is so many further; ``end`` {within_s} → {kind: outcome}, once the streams have stopped;
``broken`` {within_s} → the same, after waiting until all have failed; ``connect`` {target, count, address} → {sentence,
leased}, leasing until that is refused; ``received`` {within_s} → {kind: what arrived}, when every connection has ended.

A round of "write" is an RDMA WRITE of `size` random bytes and a message with their SHA-256, which the listener compares
with its memory and answers; "pool" does the same on a queue pair of a pool each time. A round of "send" is one message
with its number and digest, which nobody answers: what the sender was told has arrived must be found by the listener,
in order and whole. Each operation has `within_s` seconds; after that it counts as one that was told of.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rdmanet import verbs
from rdmanet.errors import RdmanetError
from rdmanet.model import IPAddress
from testbed.answering import Requests, answer_requests

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair

#: Emulated machines take seconds to import pyverbs and open the device, which the first connection includes.
CONNECT_TIMEOUT_S = 90.0
DIGEST_BYTES = 32
NUMBER_BYTES = 8
MESSAGE_BYTES = 1024
POOL_SIZE = 2
#: Between rounds: streams that never rest starve everybody else on two emulated processors.
PAUSE_S = 0.02
_FAILURES = (RdmanetError, TimeoutError)


@dataclass
class Outcome:
    """The sender's side of a stream."""

    rounds: int = 0
    bytes: int = 0  # that the library said have arrived
    unequal_bytes: int = 0  # of those, what the listener found otherwise
    error: str = ""  # what the caller was told in the end; empty: it was not disturbed
    waited_s: float = 0.0  # how long the operation that failed took


@dataclass
class Received:
    """The listener's side."""

    messages: int = 0
    bytes: int = 0
    corrupt: int = 0
    out_of_order: int = 0


@dataclass
class Stream:
    """One stream of the connector; `work` is its round, and returns the bytes it moved and those found unequal."""

    outcome: Outcome = field(default_factory=Outcome)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    ending: bool = False
    task: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[int], Awaitable[tuple[int, int]]], within_s: float) -> None:
        """Rounds until one fails or the end."""
        while not self.ending and not self.outcome.error:
            started = time.monotonic()
            try:
                async with asyncio.timeout(within_s):
                    moved, unequal = await work(self.outcome.rounds)
            except _FAILURES as error:
                self.outcome.error = f"{type(error).__name__}: {error}"
                self.outcome.waited_s = round(time.monotonic() - started, 3)
            else:
                self.outcome.rounds += 1
                self.outcome.bytes += moved
                self.outcome.unequal_bytes += unequal
            async with self.changed:
                self.changed.notify_all()
            await asyncio.sleep(PAUSE_S)  # the pace of the load, nothing waits on it

    async def reach(self, rounds: int) -> None:
        """Return when so many are done, or one has failed."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.outcome.rounds >= rounds or bool(self.outcome.error))


def _parsed(address: str | None) -> IPAddress | None:
    return None if address is None else ipaddress.ip_address(address)


def _message(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


class Peer:
    """What the requests work on."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[verbs.Listener] = []
        self._received: dict[str, Received] = {}
        self._serving = 0
        self._served = asyncio.Condition()
        self._streams: dict[str, Stream] = {}

    async def hello(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            print(f"{type(task.exception()).__name__}: {task.exception()}", file=sys.stderr, flush=True)

    # The listener's side

    async def serve(self, service: str) -> dict[str, Any]:
        listener = await verbs.listen(service, timeout_s=CONNECT_TIMEOUT_S)
        self._listeners.append(listener)
        self._spawn(self._accept(listener))
        return {}

    async def _accept(self, listener: verbs.Listener) -> None:
        try:
            async for qp in listener:
                self._serving += 1
                self._spawn(self._take(qp))
        except _FAILURES as error:
            print(f"listening ended: {error}", file=sys.stderr, flush=True)

    async def _take(self, qp: QueuePair) -> None:
        """One connection until it ends, whatever way it does."""
        try:
            async with qp:
                first = json.loads(await qp.recv())
                received = self._received.setdefault(first["kind"], Received())
                await (self._take_sends if first["kind"] == "send" else self._take_writes)(qp, first["size"], received)
        except _FAILURES as error:
            print(f"{qp}: {error}", file=sys.stderr, flush=True)
        finally:
            self._serving -= 1
            async with self._served:
                self._served.notify_all()

    async def _take_writes(self, qp: QueuePair, size: int, received: Received) -> None:
        region = qp.allocate(size, remote_write=True)
        await qp.send(region.remote.to_bytes())
        while True:
            said = json.loads(await qp.recv())
            equal = hashlib.sha256(region.buffer).hexdigest() == said["sha256"]
            received.messages += 1
            received.bytes += size
            received.corrupt += not equal
            await qp.send(_message({"equal": equal}))

    async def _take_sends(self, qp: QueuePair, size: int, received: Received) -> None:
        while True:
            message = await qp.recv()
            digest, rest = message[:DIGEST_BYTES], message[DIGEST_BYTES:]
            received.corrupt += hashlib.sha256(rest).digest() != digest
            received.out_of_order += int.from_bytes(rest[:NUMBER_BYTES]) != received.messages
            received.messages += 1
            received.bytes += len(message)

    async def received(self, within_s: float) -> dict[str, Any]:
        async with asyncio.timeout(within_s), self._served:
            await self._served.wait_for(lambda: self._serving == 0)
        return {kind: asdict(received) for kind, received in self._received.items()}

    # The connector's side

    async def begin(
        self, target: str, kinds: list[str], size: int, within_s: float, address: str | None = None
    ) -> dict[str, Any]:
        own = _parsed(address)
        for kind in kinds:
            stream = self._streams[kind] = Stream()
            start = {"write": self._write, "send": self._send, "pool": self._pool}[kind]
            stream.task = self._spawn(start(stream, target, own, size, within_s))
        return {}

    async def _write(self, stream: Stream, target: str, own: IPAddress | None, size: int, within_s: float) -> None:
        async with await verbs.connect(target, address=own, timeout_s=CONNECT_TIMEOUT_S) as qp:
            await stream.run(await self._writing(qp, "write", size), within_s)

    async def _writing(self, qp: QueuePair, kind: str, size: int) -> Callable[[int], Awaitable[tuple[int, int]]]:
        await qp.send(_message({"kind": kind, "size": size}))
        remote = verbs.RemoteRegion.from_bytes(await qp.recv())
        region = qp.allocate(size)

        async def work(number: int) -> tuple[int, int]:
            region.buffer[:] = os.urandom(size)
            await qp.write(region, remote)
            await qp.send(_message({"round": number, "sha256": hashlib.sha256(region.buffer).hexdigest()}))
            equal = json.loads(await qp.recv())["equal"]
            return size, 0 if equal else size

        return work

    async def _send(self, stream: Stream, target: str, own: IPAddress | None, size: int, within_s: float) -> None:
        async with await verbs.connect(target, address=own, timeout_s=CONNECT_TIMEOUT_S) as qp:
            await qp.send(_message({"kind": "send", "size": size}))

            async def work(number: int) -> tuple[int, int]:
                rest = number.to_bytes(NUMBER_BYTES) + os.urandom(MESSAGE_BYTES - DIGEST_BYTES - NUMBER_BYTES)
                await qp.send(hashlib.sha256(rest).digest() + rest)
                return MESSAGE_BYTES, 0

            await stream.run(work, within_s)

    async def _pool(self, stream: Stream, target: str, own: IPAddress | None, size: int, within_s: float) -> None:
        ready: dict[QueuePair, Callable[[int], Awaitable[tuple[int, int]]]] = {}
        async with verbs.Session() as session:
            pool = await session.pool(target, size=POOL_SIZE, address=own, timeout_s=CONNECT_TIMEOUT_S)

            async def work(number: int) -> tuple[int, int]:
                async with pool.queue_pair() as qp:
                    if qp not in ready:
                        ready[qp] = await self._writing(qp, "pool", size)
                    return await ready[qp](number)

            async with pool:
                await stream.run(work, within_s)

    async def reach(self, rounds: int, within_s: float) -> dict[str, Any]:
        wanted = {kind: stream.outcome.rounds + rounds for kind, stream in self._streams.items()}
        async with asyncio.timeout(within_s):
            for kind, stream in self._streams.items():
                await stream.reach(wanted[kind])
        return {kind: stream.outcome.rounds for kind, stream in self._streams.items()}

    async def end(self, within_s: float) -> dict[str, Any]:
        for stream in self._streams.values():
            stream.ending = True
        return await self.broken(within_s)

    async def broken(self, within_s: float) -> dict[str, Any]:
        streams, self._streams = self._streams, {}
        tasks = [stream.task for stream in streams.values() if stream.task is not None]
        _, waiting = await asyncio.wait(tasks, timeout=within_s)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if waiting:
            raise TimeoutError
        for task, stream in zip(tasks, streams.values(), strict=True):
            failure = task.exception()
            if failure is not None and not stream.outcome.error:  # it never began, or could not be closed
                stream.outcome.error = f"{type(failure).__name__}: {failure}"
        return {kind: asdict(stream.outcome) for kind, stream in streams.items()}

    async def connect(self, target: str, count: int, address: str | None = None) -> dict[str, Any]:
        """Lease until one is refused; gives all back."""
        own = _parsed(address)
        qps: list[QueuePair] = []
        sentence = ""
        try:
            while not sentence and len(qps) < count:
                try:
                    qps.append(await verbs.connect(target, address=own, timeout_s=CONNECT_TIMEOUT_S))
                except verbs.LeaseRefusedError as error:
                    sentence = str(error)
        finally:
            await verbs.close(*qps)
        return {"sentence": sentence, "leased": len(qps)}

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        return {
            name: getattr(self, name)
            for name in ("hello", "serve", "begin", "reach", "end", "broken", "connect", "received")
        }


if __name__ == "__main__":
    asyncio.run(answer_requests(Peer().requests))
