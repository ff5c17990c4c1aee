"""The broker on the event loop: abstract unix sockets in, guard entries out.

Pods reach it by a WebSocket on an abstract socket inside their own network namespace. Which pod is speaking is the
accepted socket's network namespace (SO_NETNS_COOKIE), which process is SO_PEERCRED: nothing that a pod sends is
believed about either.

The core's effects go through one queue and are done one after another, guard writes in a thread of their own. So a
message that depends on a guard entry leaves after the entry is in the map, and the loop is never blocked.

There is no heartbeat: the kernel closes a unix socket with its process, and a job that computes for minutes without
turning its event loop must not lose its leases for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import WSCloseCode, WSMsgType, web

from rdmanet import background
from rdmanet import lease as wire
from rdmanet.broker import rules
from rdmanet.broker.core import BrokerCore
from rdmanet.broker.judging import Permits
from rdmanet.broker.shown import lease_status
from rdmanet.broker.speakers import netns_cookie, peer_pid, processes_of
from rdmanet.broker.turns import MAX_EFFECTS, Turns, pace_of_connections
from rdmanet.broker.values import (
    Close,
    Counts,
    DatagramKey,
    DeleteGuard,
    Directory,
    Effect,
    FindHolders,
    Granted,
    Greeted,
    Key,
    LeaseView,
    Limits,
    Send,
    SetGuard,
)
from rdmanet.errors import ConflictError, RdmanetError, UnavailableError
from rdmanet.model import DatagramEntry, Device, GuardEntry, PodName

_log = logging.getLogger(__name__)

#: Connections that have not become WebSockets yet, on top of Limits.connections_per_pod.
_SPARE_CONNECTIONS = 16
#: Rounds of what follows from what: a lease that could not be written is revoked, and no more comes of that.
_MAX_ROUNDS = 4
#: Messages that may wait for a pod to read them before it is dropped.
_MAX_OUTGOING = 256
#: RFC 6455 5.5: a control frame's payload is at most 125 bytes, two of them the code.
_MAX_CLOSE_BYTES = 123
#: How long a pod may take to answer the end of its connection.
_FAREWELL_S = 1.0
#: How long to stop accepting when the process has no descriptors left.
_ACCEPT_PAUSE_S = 1.0


class Guard(Protocol):
    """The guard map (rdmanet.datapath); synchronous, called from a thread."""

    def set_guards(self, entries: Sequence[tuple[Key, GuardEntry]]) -> None:
        """Writes them in order; what comes before the one that fails has been written."""

    def set_guard(self, address: bytes, qpn: int, entry: GuardEntry) -> None: ...

    def delete_guards(self, keys: Sequence[Key]) -> None:
        """Those that are not there are passed over."""

    def guards(self) -> Mapping[Key, GuardEntry]: ...

    def set_datagrams(self, entries: Sequence[tuple[DatagramKey, DatagramEntry]]) -> None:
        """As ``set_guards``."""

    def delete_datagrams(self, keys: Sequence[DatagramKey]) -> None:
        """As ``delete_guards``."""

    def datagrams(self) -> Mapping[DatagramKey, DatagramEntry]: ...


class QueuePairs(Protocol):
    """The kernel's list of queue pairs (rdmanet.netlink.nldev)."""

    async def holders(self, device: Device) -> Mapping[int, int]:
        """Of each queue pair of the device, by QPN, the pid, as the agent sees pids, of the thread that created it; 0
        where the kernel does not say whose it is (the thread has ended)."""


@dataclass(slots=True, eq=False)
class _Connection:
    cookie: int
    pid: int
    socket: web.WebSocketResponse
    transport: asyncio.Transport
    writer: asyncio.Task[None] = field(init=False)
    outgoing: asyncio.Queue[str | None] = field(default_factory=lambda: asyncio.Queue(_MAX_OUTGOING))
    farewell: str = ""


@dataclass(slots=True, eq=False)
class _Listener:
    socket: socket.socket
    task: asyncio.Task[None]
    transports: list[asyncio.BaseTransport]


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Not the core's: everything queued before it has been done."""

    reached: asyncio.Future[None]


class BrokerServer:
    """Serves every pod's lease socket.

    ``start``, then the listeners of the pods that are known, then ``adopt``: connections wait until then, because what
    an earlier agent left can only be adopted when its pods are known, and only then be claimed. ``stop`` leaves the
    leases to the next agent.
    """

    def __init__(
        self,
        directory: Directory,
        guard: Guard,
        queue_pairs: QueuePairs,
        *,
        grace_s: float = Limits().grace_s,
        permits: Permits = rules.permits_all,
        observe_granted: Callable[[float], None] = lambda seconds: None,
        on_first_contact: Callable[[int, int], None] = lambda cookie, pid: None,
    ):
        """``on_first_contact`` is called on the event loop each time a process has said hello: with its network
        namespace's cookie and its pid."""
        self._limits = Limits(grace_s=grace_s)
        self._core = BrokerCore(directory, limits=self._limits, permits=permits)
        self._guard = guard
        self._queue_pairs = queue_pairs
        self._observe_granted = observe_granted
        self._on_first_contact = on_first_contact
        self._numbers = itertools.count(1)
        self._connections: dict[int, _Connection] = {}
        self._listeners: dict[int, _Listener] = {}
        self._effects: asyncio.Queue[Effect | _Barrier] = asyncio.Queue()
        self._lookups: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._adopted = asyncio.Event()
        self._stopping = False
        self._guard_failures = 0
        # One thread: guard writes stay in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guard")
        self._turns = Turns(lambda: self._effects.qsize() > MAX_EFFECTS)
        self._dropped: Counter[str] = Counter()
        application = web.Application(middlewares=[self._one_request])
        application.router.add_get(wire.HTTP_PATH, self._serve)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1)
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Be ready for listeners."""
        await self._runner.setup()
        self._worker = background.begin(self._work(), "broker of leases")

    async def adopt(self) -> None:
        """Take over the leases in the guard's maps and begin to serve. Raises what ``guards()`` raises."""
        loop = asyncio.get_running_loop()
        guards, datagrams = await loop.run_in_executor(self._thread, self._entries)
        self._apply(self._core.adopt(guards, datagrams, loop.time()))
        self._apply(self._core.policy_changed(loop.time()))
        self._adopted.set()

    async def stop(self) -> None:
        """Close every connection without ending a lease: the entries stay in the map and can be claimed."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for cookie in list(self._listeners):
            await self.remove_listener(cookie)
        for connection in self._connections.values():
            self._put(connection, None, "the agent stops; leases live on and can be claimed from the next one")
        farewells = [connection.writer for connection in self._connections.values()]
        if farewells:
            await asyncio.wait(farewells, timeout=_FAREWELL_S)
        await self._runner.cleanup()
        if self._worker is not None:
            if not self._worker.done():
                await self._settled()
            self._worker.cancel()
            await asyncio.gather(self._worker, *self._lookups, return_exceptions=True)
        self._thread.shutdown()

    async def add_listener(self, sock: socket.socket, cookie: int) -> None:
        """Serve a listening socket, non-blocking, of a pod's namespace with this cookie; the server closes it."""
        if cookie in self._listeners:
            raise ConflictError("this network namespace has a lease listener already", subject=str(cookie))
        transports: list[asyncio.BaseTransport] = []
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._accept(sock, cookie, transports), name=f"lease listener {cookie}")
        self._listeners[cookie] = _Listener(sock, task, transports)

    async def remove_listener(self, cookie: int) -> None:
        """Stop listening in a network namespace; unknown cookies are fine. Connections stay until ``pod_gone``."""
        listener = self._listeners.pop(cookie, None)
        if listener is not None:
            listener.task.cancel()
            await asyncio.gather(listener.task, return_exceptions=True)
            listener.socket.close()

    async def pod_gone(self, name: PodName, addresses: Collection[bytes], cookie: int | None) -> None:
        """A pod loses these addresses (address keys) and, with a cookie, its network namespace: ends the leases and
        connections; returns when no guard entry of the addresses is left, so that others can have them."""
        self._apply(self._core.pod_gone(name, addresses, cookie, asyncio.get_running_loop().time()))
        await self._settled()

    def device_gone(self, cookie: int, sentence: str) -> None:
        """The device of the pod in this network namespace cannot be used any more: ends its leases and tells its
        processes and their peers why. Its view must say so already (``PodView.unhealthy``)."""
        self._apply(self._core.device_gone(cookie, sentence, asyncio.get_running_loop().time()))

    def device_back(self, cookie: int) -> None:
        """It can be used again, and its view says so."""
        self._apply(self._core.device_back(cookie))

    def policy_changed(self) -> None:
        """Asks ``permits`` again for every lease, and revokes those that it refuses."""
        self._apply(self._core.policy_changed(asyncio.get_running_loop().time()))

    def snapshot(self) -> list[LeaseView]:
        """All leases, oldest first."""
        return self._core.snapshot(asyncio.get_running_loop().time())

    async def status(self) -> list[dict[str, object]]:
        """All leases, oldest first, with the packets and bytes that reached their ends (for JSON)."""
        guards, datagrams = await asyncio.get_running_loop().run_in_executor(self._thread, self._entries)
        return [lease_status(view, guards, datagrams) for view in self.snapshot()]

    def _entries(self) -> tuple[Mapping[Key, GuardEntry], Mapping[DatagramKey, DatagramEntry]]:
        return self._guard.guards(), self._guard.datagrams()

    def services(self) -> list[tuple[PodName, str]]:
        """What can be connected to: pods and their services."""
        return self._core.services()

    def states(self) -> dict[str, int]:
        """How many leases are pending, granted and unclaimed; what a gauge shows. Safe from any thread."""
        found = Counter(view.state for view in self._core.snapshot(0.0))
        return {state: found[state] for state in ("pending", "granted", "unclaimed")}

    @property
    def counts(self) -> Counts:
        """Leases granted, refused, revoked, claimed and adopted since the start."""
        return self._core.counts

    @property
    def guard_failures(self) -> int:
        """Guard writes that the kernel refused."""
        return self._guard_failures

    @property
    def dropped_connections(self) -> Mapping[str, int]:
        """Connections of pods that the server has closed by itself: ``too_many``, ``unread`` (it does not read its
        messages), ``protocol`` (it speaks none of ours)."""
        return self._dropped

    # Connections

    async def _accept(self, sock: socket.socket, cookie: int, transports: list[asyncio.BaseTransport]) -> None:
        loop = asyncio.get_running_loop()
        pace = pace_of_connections(loop.time)
        while True:
            try:
                accepted, _ = await loop.sock_accept(sock)
            except OSError as error:
                # As asyncio's own servers do: out of descriptors or memory, somebody else must let go first.
                _log.error("lease connections cannot be accepted for a while: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            transports[:] = [t for t in transports if not t.is_closing()]
            if len(transports) >= self._limits.connections_per_pod + _SPARE_CONNECTIONS:
                self._dropped["too_many"] += 1
                accepted.close()
                await asyncio.sleep(pace.wait_s())
                continue
            factory = self._runner.server
            assert factory is not None
            transport, _ = await loop.connect_accepted_socket(factory, accepted)
            # Of what a pod sends, so much is parsed before it is somebody else's turn.
            transport.max_size = wire.MAX_MESSAGE_BYTES  # type: ignore[attr-defined]
            transports.append(transport)
            # The next one waits in the socket's own queue.
            await asyncio.sleep(pace.wait_s())

    @web.middleware
    async def _one_request(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """A connection is for one WebSocket. Whoever asks for anything else is answered once."""
        try:
            return await handler(request)
        except web.HTTPException as refusal:
            self._dropped["protocol"] += 1
            refusal.force_close()
            raise

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        size = wire.MAX_MESSAGE_BYTES + 1  # aiohttp refuses messages of this size and longer
        # Pings are not ours, and would be answered out of turn.
        response = web.WebSocketResponse(timeout=_FAREWELL_S, compress=False, max_msg_size=size, autoping=False)
        transport = request.transport
        assert transport is not None
        sock = transport.get_extra_info("socket")
        cookie, pid = netns_cookie(sock), peer_pid(sock)
        await self._adopted.wait()
        try:
            await response.prepare(request)
        except ConnectionError:
            return web.Response()  # it has gone already, and will not see this
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        connection = _Connection(cookie, pid, response, transport)
        self._connections[number] = connection
        connection.writer = loop.create_task(self._write(connection), name=f"lease connection {number}")
        try:
            self._apply(self._core.connected(number, cookie, pid, loop.time()))
            async for message in response:
                if message.type is not WSMsgType.TEXT:
                    # Without the closing handshake, which would go on reading out of turn.
                    self._dropped["protocol"] += 1
                    transport.abort()
                    break
                await self._turns.take(cookie)
                self._apply(self._core.receive(number, message.data, loop.time()))
        finally:
            del self._connections[number]
            if not self._stopping:
                self._apply(self._core.disconnected(number, loop.time()))
            if connection.farewell:
                # Closing ends the loop above before it has said why.
                await asyncio.wait({connection.writer}, timeout=_FAREWELL_S)
            connection.writer.cancel()
            await asyncio.gather(connection.writer, return_exceptions=True)
        return response

    async def _write(self, connection: _Connection) -> None:
        with contextlib.suppress(ConnectionError):  # the reader notices as well, and cleans up
            while (text := await connection.outgoing.get()) is not None:
                await connection.socket.send_str(text)
            farewell = connection.farewell.encode()[:_MAX_CLOSE_BYTES].decode(errors="ignore")
            await connection.socket.close(code=WSCloseCode.GOING_AWAY, message=farewell.encode())

    def _put(self, connection: _Connection, text: str | None, farewell: str = "") -> None:
        """Queue a message for a pod, or with None the end of the connection; drop a pod that does not read."""
        if text is None:
            connection.farewell = farewell
        try:
            connection.outgoing.put_nowait(text)
        except asyncio.QueueFull:
            _log.info("pid %d does not read its lease messages: its connection is dropped", connection.pid)
            self._dropped["unread"] += 1
            connection.transport.abort()

    # Effects

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._effects.put_nowait(effect)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = self._core.next_deadline_s()
        if deadline_s is not None and not self._stopping:
            self._timer = asyncio.get_running_loop().call_at(deadline_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._apply(self._core.tick(asyncio.get_running_loop().time()))

    async def _settled(self) -> None:
        """Everything that is queued now, and what follows from it, has been done. Raises UnavailableError where nothing
        is done any more."""
        assert self._worker is not None
        for _ in range(_MAX_ROUNDS):
            barrier = _Barrier(asyncio.get_running_loop().create_future())
            self._effects.put_nowait(barrier)
            await asyncio.wait({barrier.reached, self._worker}, return_when=asyncio.FIRST_COMPLETED)
            if not barrier.reached.done():
                raise UnavailableError("The broker of leases has ended, and the agent ends with it; ask the next one.")
            if self._effects.empty():
                return

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            match await self._effects.get():
                case Send(number, message):
                    connection = self._connections.get(number)
                    if connection is not None:
                        self._put(connection, wire.dump(message))
                case SetGuard(lease, entries, datagrams):
                    failure = await loop.run_in_executor(self._thread, self._set_guards, entries, datagrams)
                    self._apply(self._core.guard_written(lease, failure, loop.time()))
                case DeleteGuard(keys, datagram_keys):
                    await loop.run_in_executor(self._thread, self._delete_guards, keys, datagram_keys)
                case FindHolders(device, queries):
                    lookup = background.begin(self._find_holders(device, queries), "look for queue pairs' holders")
                    self._lookups.add(lookup)
                    lookup.add_done_callback(self._lookups.discard)
                case Close(number, sentence):
                    connection = self._connections.get(number)
                    if connection is not None:
                        self._put(connection, None, sentence)
                case Granted(seconds):
                    self._observe_granted(seconds)
                case Greeted(cookie, pid):
                    self._on_first_contact(cookie, pid)
                case _Barrier(reached):
                    reached.set_result(None)
            self._turns.go_on()

    def _set_guards(
        self,
        entries: tuple[tuple[Key, GuardEntry], ...],
        datagrams: tuple[tuple[DatagramKey, DatagramEntry], ...],
    ) -> str | None:
        try:
            self._guard.set_guards(entries)
            if datagrams:
                self._guard.set_datagrams(datagrams)
            return None
        except RdmanetError as error:
            if datagrams:
                self._guard_failures += 1
                _log.error("guard entries of lease %s: %s", wire.lease_text(datagrams[0][1].lease), error)
                return str(error)
            _log.warning("guard entries are written one by one: %s", error)
        failure = None
        for key, entry in entries:
            try:
                self._guard.set_guard(*key, entry)
            except RdmanetError as error:
                # The others are written all the same: when leases are to be revoked, some are better than none.
                self._guard_failures += 1
                _log.error("guard entry of lease %s: %s", wire.lease_text(entry.lease), error)
                failure = str(error)
        return failure

    def _delete_guards(self, keys: tuple[Key, ...], datagrams: tuple[DatagramKey, ...]) -> None:
        try:
            if datagrams:
                self._guard.delete_datagrams(datagrams)
            if keys:
                self._guard.delete_guards(keys)
        except RdmanetError as error:
            self._guard_failures += 1
            qpns = [qpn for _, qpn in (*keys, *(own for own, _ in datagrams))]
            _log.error("guard entries of queue pairs %s could not be deleted: %s", qpns, error)

    async def _find_holders(self, device: Device, queries: tuple[tuple[int, int], ...]) -> None:
        loop = asyncio.get_running_loop()
        try:
            threads = await self._queue_pairs.holders(device)
            holders = await asyncio.to_thread(processes_of, {query: threads.get(qpn) for query, qpn in queries})
        except RdmanetError as error:
            _log.warning("the holders of queue pairs of %s are not known: %s", device.name, error)
            self._apply(self._core.holders_unknown([query for query, _ in queries], loop.time()))
        else:
            self._apply(self._core.holders_found(holders, loop.time()))
