"""Every operation of `rdmanet.verbs` inside a pod, each with its result checked: a program for `testbed.peer`.

``serve`` {service, polling} offers memory and answers messages; ``gossip`` {service} answers datagrams. ``exercise``
{target, address, seed, rounds, polling, way} → {operations, bytes} carries out so many rounds of write, read, messages
and atomics, drawn from the seed, and compares what both sides have: `way` is `asyncio`, `numpy` (memory is NumPy's) or
`sync` (the façade, in a thread). ``datagrams`` {target, address, count} → {sent, answered}.

The connector keeps a copy of the peer's memory and does to it what it asks the device to do; at the end the peer says
the SHA-256 of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import random
import sys
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from rdmanet import verbs
from rdmanet.errors import RdmanetError
from rdmanet.model import IPAddress
from rdmanet.verbs import Options, RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from testbed.answering import Requests, answer_requests

TIMEOUT_S = 60.0
MEMORY_BYTES = 1 << 20
#: Of it, at its end, what only atomics touch.
WORDS = 64
WORDS_BEGIN = MEMORY_BYTES - 8 * WORDS
LONGEST_MOVE = 64 << 10
LONGEST_MESSAGE = 4096
RIGHTS = {"remote_read": True, "remote_write": True, "remote_atomic": True}


class WrongError(RdmanetError):
    """An operation did something else than was asked."""


def check(right: bool, what: str) -> None:
    """WrongError unless it is `right`."""
    if not right:
        raise WrongError(f"{what} is not what it should be")


async def offer(qp: QueuePair) -> None:
    """The listener's side: memory, and for every message its digest; ``end`` asks for the memory's."""
    with contextlib.suppress(verbs.LeaseRevokedError):
        async with qp:
            region = qp.allocate(MEMORY_BYTES, **RIGHTS)
            await qp.send(region.remote.to_bytes())
            while (message := await qp.recv()) != b"end":
                await qp.send(hashlib.sha256(message).digest())
            await qp.send(hashlib.sha256(region.buffer).digest())
            await qp.recv()


class Threaded:
    """A façade's queue pair, called as the asynchronous one is; it blocks the loop of the thread that it has."""

    def __init__(self, qp: Any):
        self._qp = qp
        self.register = qp.register

    def __getattr__(self, name: str) -> Any:
        async def operation(*arguments: Any, **options: Any) -> Any:
            return getattr(self._qp, name)(*arguments, **options)

        return operation


class Exercise:
    """The connector's side of one queue pair."""

    def __init__(self, qp: Any, seed: int, own: Any):
        self.done: Counter[str] = Counter()
        self.moved_bytes = 0
        self._qp = qp
        self._random = random.Random(seed)
        self._local = qp.register(own)
        self._own = memoryview(own).cast("B")
        self._there = bytearray(MEMORY_BYTES)

    async def run(self, rounds: int) -> None:
        """So many of each, in an order that the seed says."""
        self._remote = RemoteRegion.from_bytes(await self._qp.recv(timeout_s=TIMEOUT_S))
        kinds = [self.write, self.read, self.message, self.fetch_add, self.compare_swap] * rounds
        self._random.shuffle(kinds)
        for kind in kinds:
            await kind()
            self.done[kind.__name__] += 1
        await self._qp.send(b"end", timeout_s=TIMEOUT_S)
        digest = await self._qp.recv(timeout_s=TIMEOUT_S)
        check(digest == hashlib.sha256(self._there).digest(), "the peer's memory")
        await self._qp.send(b"bye", timeout_s=TIMEOUT_S)

    def _range(self) -> tuple[int, int, int]:
        """Where here, where there, how long."""
        length = self._random.randint(1, LONGEST_MOVE)
        return self._random.randrange(len(self._own) - length), self._random.randrange(WORDS_BEGIN - length), length

    def _options(self, here: int, there: int, length: int) -> dict[str, Any]:
        return {"local_offset": here, "remote_offset": there, "length": length, "timeout_s": TIMEOUT_S}

    async def write(self) -> None:
        here, there, length = self._range()
        data = self._random.randbytes(length)
        self._own[here : here + length] = data
        await self._qp.write(self._local, self._remote, **self._options(here, there, length))
        self._there[there : there + length] = data
        self.moved_bytes += length

    async def read(self) -> None:
        here, there, length = self._range()
        await self._qp.read(self._local, self._remote, **self._options(here, there, length))
        check(self._own[here : here + length] == self._there[there : there + length], "what was read")
        self.moved_bytes += length

    async def message(self) -> None:
        message = self._random.randbytes(self._random.randint(1, LONGEST_MESSAGE))
        await self._qp.send(message, timeout_s=TIMEOUT_S)
        check(await self._qp.recv(timeout_s=TIMEOUT_S) == hashlib.sha256(message).digest(), "a message")
        self.moved_bytes += len(message)

    def _word(self) -> tuple[int, int]:
        """Offset and value of one of the words."""
        offset = WORDS_BEGIN + 8 * self._random.randrange(WORDS)
        return offset, int.from_bytes(self._there[offset : offset + 8], sys.byteorder)

    def _set_word(self, offset: int, value: int) -> None:
        self._there[offset : offset + 8] = value.to_bytes(8, sys.byteorder)

    async def fetch_add(self) -> None:
        (offset, before), add = self._word(), self._random.randrange(2**64)
        check(await self._qp.fetch_add(self._remote, add, offset=offset, timeout_s=TIMEOUT_S) == before, "a sum")
        self._set_word(offset, (before + add) % 2**64)

    async def compare_swap(self) -> None:
        (offset, before), swap = self._word(), self._random.randrange(2**64)
        hits = self._random.random() < 0.5
        compare = before if hits else before ^ 1
        found = await self._qp.compare_swap(
            self._remote, compare=compare, swap=swap, offset=offset, timeout_s=TIMEOUT_S
        )
        check(found == before, "what was compared")
        if hits:
            self._set_word(offset, swap)


class Program:
    """Carries out requests, one at a time."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: list[Any] = []

    async def hello(self) -> dict[str, Any]:
        return {}

    async def serve(self, service: str, polling: bool) -> dict[str, Any]:
        listener = await verbs.listen(service, options=Options(polling=polling), timeout_s=TIMEOUT_S)
        self._open.append(listener)
        self._spawn(self._accept(listener))
        return {}

    async def _accept(self, listener: verbs.Listener) -> None:
        async for qp in listener:
            self._spawn(offer(qp))

    async def gossip(self, service: str) -> dict[str, Any]:
        datagram = await verbs.datagram(service, timeout_s=TIMEOUT_S)
        self._open.append(datagram)
        self._spawn(self._answer(datagram))
        return {}

    async def _answer(self, datagram: Any) -> None:
        while True:
            message, peer = await datagram.recv()
            with contextlib.suppress(verbs.LeaseRevokedError):  # it has left meanwhile
                await datagram.send(hashlib.sha256(message).digest(), peer)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            print(f"{type(task.exception()).__name__}: {task.exception()}", file=sys.stderr, flush=True)

    async def exercise(
        self, target: str, address: str, seed: int, rounds: int, polling: bool, way: str
    ) -> dict[str, Any]:
        own, options = ipaddress.ip_address(address), Options(polling=polling)
        if way == "sync":
            exercise = await asyncio.to_thread(_exercise_in_thread, target, own, options, seed, rounds)
        else:
            async with await verbs.connect(target, address=own, options=options, timeout_s=TIMEOUT_S) as qp:
                exercise = Exercise(qp, seed, _memory(way))
                await exercise.run(rounds)
        return {"operations": dict(exercise.done), "bytes": exercise.moved_bytes}

    async def datagrams(self, target: str, address: str, count: int) -> dict[str, Any]:
        answered = 0
        async with await verbs.datagram(timeout_s=TIMEOUT_S) as datagram:
            peer = await datagram.connect(target, address=ipaddress.ip_address(address), timeout_s=TIMEOUT_S)
            for number in range(count):
                message = random.Random(number).randbytes(1 + number * 37 % peer.mtu_bytes)
                await datagram.send(message, peer, timeout_s=TIMEOUT_S)
                answer, sender = await datagram.recv(timeout_s=TIMEOUT_S)
                check(answer == hashlib.sha256(message).digest() and sender is peer, "a datagram's answer")
                answered += 1
        return {"sent": count, "answered": answered}

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        return {
            "hello": self.hello,
            "serve": self.serve,
            "gossip": self.gossip,
            "exercise": self.exercise,
            "datagrams": self.datagrams,
        }


def _memory(way: str) -> Any:
    """What is registered: NumPy's, or plain."""
    if way != "numpy":
        return bytearray(4 * LONGEST_MOVE)
    import numpy

    return numpy.zeros((4, LONGEST_MOVE), "u1")


def _exercise_in_thread(target: str, own: IPAddress, options: Options, seed: int, rounds: int) -> Exercise:
    from rdmanet.verbs import sync

    with sync.connect(target, address=own, options=options, timeout_s=TIMEOUT_S) as qp:
        exercise = Exercise(Threaded(qp), seed, _memory("sync"))
        asyncio.run(exercise.run(rounds))
    return exercise


if __name__ == "__main__":
    asyncio.run(answer_requests(Program().requests))
