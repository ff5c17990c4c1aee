"""The same library for programs without an event loop: every call waits until it is done.

::

    from rdmanet.verbs import sync

    with sync.connect("train-1:params") as qp:
        qp.write(qp.register(gradients), remote, timeout_s=5)
        qp.send(b"written")

Names, arguments and errors are those of rdmanet.verbs. One thread of the process, started with the first call, runs the
event loop; everything can be used from any thread. Interrupted calls (Ctrl-C) are cancelled. What a program leaves open
is closed when it exits. A child of os.fork() has a thread of its own, and cannot use what its parent opened.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, overload

from rdmanet import verbs
from rdmanet.model import IPAddress, PodName
from rdmanet.verbs.memory import Buffer, MemoryRegion, RemoteRegion
from rdmanet.verbs.options import Options
from rdmanet.verbs.pool import PoolStatistics
from rdmanet.verbs.shared import close_shared

if TYPE_CHECKING:
    from rdmanet.verbs import queue_pair, ud

__all__ = ["Datagram", "Listener", "Pool", "QueuePair", "Session", "close", "connect", "datagram", "listen"]

_T = TypeVar("_T")
#: How long the exit of a program waits for its leases to be given back.
_EXIT_S = 5.0


class _LoopThread:
    """The thread with the event loop, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work`` there; what it gives or raises."""
        future = asyncio.run_coroutine_threadsafe(work, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()  # nothing where it was the work that raised
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="rdmanet.verbs.sync", daemon=True)
                self._thread.start()
            elif threading.current_thread() is self._thread:
                raise RuntimeError("rdmanet.verbs.sync was called from its own event loop, which would wait for itself")
            return self._loop

    def end(self) -> None:
        """Close what is open, and end the thread."""
        with self._lock:
            loop, thread, self._loop = self._loop, self._thread, None
        if loop is None or thread is None:
            return
        future = asyncio.run_coroutine_threadsafe(_close_everything(), loop)
        with contextlib.suppress(TimeoutError):
            future.result(_EXIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_EXIT_S)


async def _close_everything() -> None:
    for session in list(_sessions):
        await session.close()
    await close_shared()


def _in_child() -> None:
    global _thread
    _thread = _LoopThread()
    _sessions.clear()


_thread = _LoopThread()
_sessions: set[verbs.Session] = set()
os.register_at_fork(after_in_child=_in_child)
atexit.register(lambda: _thread.end())


class QueuePair:
    """rdmanet.verbs.QueuePair, waiting."""

    def __init__(self, qp: queue_pair.QueuePair):
        self.asynchronous = qp

    @property
    def qpn(self) -> int:
        return self.asynchronous.qpn

    @property
    def lease(self) -> int:
        return self.asynchronous.lease

    @property
    def peer(self) -> PodName | None:
        return self.asynchronous.peer

    @property
    def service(self) -> str:
        return self.asynchronous.service

    @property
    def mtu_bytes(self) -> int:
        return self.asynchronous.mtu_bytes

    @property
    def broken(self) -> bool:
        return self.asynchronous.broken

    @property
    def closed(self) -> bool:
        return self.asynchronous.closed

    @property
    def idle(self) -> bool:
        return self.asynchronous.idle

    def register(
        self, buffer: Any, *, remote_read: bool = False, remote_write: bool = False, remote_atomic: bool = False
    ) -> MemoryRegion:
        rights = {"remote_read": remote_read, "remote_write": remote_write, "remote_atomic": remote_atomic}
        return self.asynchronous.register(buffer, **rights)

    def allocate(
        self, length: int, *, remote_read: bool = False, remote_write: bool = False, remote_atomic: bool = False
    ) -> MemoryRegion:
        rights = {"remote_read": remote_read, "remote_write": remote_write, "remote_atomic": remote_atomic}
        return self.asynchronous.allocate(length, **rights)

    def write(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        length: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        _thread.call(
            self.asynchronous.write(
                local,
                remote,
                local_offset=local_offset,
                remote_offset=remote_offset,
                length=length,
                timeout_s=timeout_s,
            )
        )

    def read(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        length: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        _thread.call(
            self.asynchronous.read(
                local,
                remote,
                local_offset=local_offset,
                remote_offset=remote_offset,
                length=length,
                timeout_s=timeout_s,
            )
        )

    def compare_swap(
        self, remote: RemoteRegion, *, compare: int, swap: int, offset: int = 0, timeout_s: float | None = None
    ) -> int:
        return _thread.call(
            self.asynchronous.compare_swap(remote, compare=compare, swap=swap, offset=offset, timeout_s=timeout_s)
        )

    def fetch_add(self, remote: RemoteRegion, add: int, *, offset: int = 0, timeout_s: float | None = None) -> int:
        return _thread.call(self.asynchronous.fetch_add(remote, add, offset=offset, timeout_s=timeout_s))

    def send(self, message: Buffer, *, timeout_s: float | None = None) -> None:
        _thread.call(self.asynchronous.send(message, timeout_s=timeout_s))

    def recv(self, *, timeout_s: float | None = None) -> bytes:
        return _thread.call(self.asynchronous.recv(timeout_s=timeout_s))

    def drain(self, *, timeout_s: float | None = None) -> None:
        _thread.call(self.asynchronous.drain(timeout_s=timeout_s))

    def close(self) -> None:
        _thread.call(self.asynchronous.close())

    def __enter__(self) -> QueuePair:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self.asynchronous)


class Listener:
    """rdmanet.verbs.Listener, waiting."""

    def __init__(self, listener: verbs.Listener):
        self._listener = listener

    @property
    def service(self) -> str:
        return self._listener.service

    def accept(self, *, timeout_s: float | None = None) -> QueuePair:
        return QueuePair(_thread.call(self._listener.accept(timeout_s=timeout_s)))

    def accept_batch(self, *, timeout_s: float | None = None) -> list[QueuePair]:
        return [*map(QueuePair, _thread.call(self._listener.accept_batch(timeout_s=timeout_s)))]

    def __iter__(self) -> Iterator[QueuePair]:
        each = self._listener.__aiter__()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield QueuePair(_thread.call(_next(each)))

    def close(self) -> None:
        _thread.call(self._listener.close())

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


async def _next(each: Any) -> queue_pair.QueuePair:
    found: queue_pair.QueuePair = await anext(each)
    return found


class Pool:
    """rdmanet.verbs.Pool, waiting."""

    def __init__(self, pool: verbs.Pool):
        self._pool = pool

    @property
    def statistics(self) -> PoolStatistics:
        return self._pool.statistics

    def acquire(self, *, timeout_s: float | None = 10.0) -> QueuePair:
        return QueuePair(_thread.call(self._pool.acquire(timeout_s=timeout_s)))

    def release(self, qp: QueuePair) -> None:
        _thread.call(self._pool.release(qp.asynchronous))

    @contextlib.contextmanager
    def queue_pair(self, *, timeout_s: float | None = 10.0) -> Iterator[QueuePair]:
        qp = self.acquire(timeout_s=timeout_s)
        try:
            yield qp
        except BaseException:
            qp.close()
            raise
        self.release(qp)

    def close(self) -> None:
        _thread.call(self._pool.close())

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Datagram:
    """rdmanet.verbs.Datagram, waiting. Its peers are those of the asynchronous one."""

    def __init__(self, datagram: ud.Datagram):
        self.asynchronous = datagram

    @property
    def peers(self) -> tuple[ud.Peer, ...]:
        return self.asynchronous.peers

    def connect(self, target: str, *, address: IPAddress | None = None, timeout_s: float | None = 10.0) -> ud.Peer:
        return _thread.call(self.asynchronous.connect(target, address=address, timeout_s=timeout_s))

    def send(self, message: Buffer, peer: ud.Peer, *, timeout_s: float | None = None) -> None:
        _thread.call(self.asynchronous.send(message, peer, timeout_s=timeout_s))

    def recv(self, *, timeout_s: float | None = None) -> tuple[bytes, ud.Peer]:
        return _thread.call(self.asynchronous.recv(timeout_s=timeout_s))

    def disconnect(self, peer: ud.Peer) -> None:
        """``await peer.close()``."""
        _thread.call(peer.close())

    def close(self) -> None:
        _thread.call(self.asynchronous.close())

    def __enter__(self) -> Datagram:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Session:
    """rdmanet.verbs.Session, waiting."""

    def __init__(self) -> None:
        self._session = _thread.call(_new_session())

    @property
    def pod(self) -> PodName | None:
        return self._session.pod

    def open(self, timeout_s: float | None = 10.0) -> None:
        _thread.call(self._session.open(timeout_s))

    def listen(self, service: str, *, options: Options | None = None, timeout_s: float | None = 10.0) -> Listener:
        return Listener(_thread.call(self._session.listen(service, options=options, timeout_s=timeout_s)))

    @overload
    def connect(
        self,
        target: str,
        *,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> QueuePair: ...

    @overload
    def connect(
        self,
        target: str,
        *,
        count: int,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> list[QueuePair]: ...

    def connect(self, target: str, *, count: int | None = None, **choices: Any) -> QueuePair | list[QueuePair]:
        return _connect(self._session.connect, target, count, choices)

    def datagram(
        self, service: str | None = None, *, options: Options | None = None, timeout_s: float | None = 10.0
    ) -> Datagram:
        return Datagram(_thread.call(self._session.datagram(service, options=options, timeout_s=timeout_s)))

    def pool(
        self,
        target: str,
        *,
        size: int = 16,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> Pool:
        made = self._session.pool(target, size=size, address=address, options=options, timeout_s=timeout_s)
        return Pool(_thread.call(made))

    def close(self) -> None:
        _sessions.discard(self._session)
        _thread.call(self._session.close())

    def __enter__(self) -> Session:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


async def _new_session() -> verbs.Session:
    session = verbs.Session()
    _sessions.add(session)
    return session


def _connect(connect: Any, target: str, count: int | None, choices: dict[str, Any]) -> QueuePair | list[QueuePair]:
    if count is None:
        return QueuePair(_thread.call(connect(target, **choices)))
    return [*map(QueuePair, _thread.call(connect(target, count=count, **choices)))]


def listen(service: str, *, options: Options | None = None, timeout_s: float | None = 10.0) -> Listener:
    """rdmanet.verbs.listen, waiting."""
    return Listener(_thread.call(verbs.listen(service, options=options, timeout_s=timeout_s)))


@overload
def connect(
    target: str,
    *,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> QueuePair: ...


@overload
def connect(
    target: str,
    *,
    count: int,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> list[QueuePair]: ...


def connect(target: str, *, count: int | None = None, **choices: Any) -> QueuePair | list[QueuePair]:
    """rdmanet.verbs.connect, waiting."""
    return _connect(verbs.connect, target, count, choices)


def datagram(service: str | None = None, *, options: Options | None = None, timeout_s: float | None = 10.0) -> Datagram:
    """rdmanet.verbs.datagram, waiting."""
    return Datagram(_thread.call(verbs.datagram(service, options=options, timeout_s=timeout_s)))


def close(*qps: QueuePair) -> None:
    """rdmanet.verbs.close, waiting."""
    _thread.call(verbs.close(*(qp.asynchronous for qp in qps)))
