"""Listening and connecting: the part of the library that holds leases.

A session is one connection to the broker and one opened device. ``listen`` and ``connect`` share a session per event
loop, which closes with the last listener and queue pair; ``Session`` is for programs that want their own.

While the agent is away the queue pairs go on working; the session comes back by itself, claims its leases and listens
again on its services. Only a lease that the new agent does not give back is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, overload

from rdmanet import lease as wire
from rdmanet.errors import (
    InputError,
    LeaseRefusedError,
    RequestError,
    UnavailableError,
    VerbsError,
)
from rdmanet.lease import pod_text
from rdmanet.model import IPAddress, PodName, address_key, address_of
from rdmanet.verbs.accepting import Acceptor
from rdmanet.verbs.datagrams import Datagrams
from rdmanet.verbs.leases import Leases
from rdmanet.verbs.link import Link, LinkLostError
from rdmanet.verbs.listener import Listener
from rdmanet.verbs.options import Options
from rdmanet.verbs.pool import Pool

if TYPE_CHECKING:
    from types import TracebackType

    from rdmanet.verbs.batch import Batch
    from rdmanet.verbs.device import OpenDevice
    from rdmanet.verbs.queue_pair import QueuePair
    from rdmanet.verbs.ud import Datagram

_log = logging.getLogger(__name__)


class Session:
    """A connection to the broker with the leases and listeners that depend on it."""

    def __init__(self) -> None:
        self._link = Link(self._greeted, self._pushed, hello=lambda hello: self._device_state(hello.unhealthy))
        self._hello: wire.HelloReply | None = None
        self._device: OpenDevice | None = None
        self._lost_devices: list[OpenDevice] = []  # that some queue pairs still have to leave
        self._unhealthy: str | None = None  # why the device cannot be used now
        self._silent = False  # the agent that is there now has not been told of the listeners
        self._leases = Leases(self._link)
        self._listeners: dict[str, Listener] = {}
        self._acceptor = Acceptor(
            self._link,
            self._leases,
            self._listeners,
            make=self._listening_ends,
            hold=self._hold,
            close=self._close_all,
        )
        self._datagrams = Datagrams(self._link, self._leases, ask=self._persistent, spawn=self._spawn, left=self._left)
        self._qps: set[QueuePair] = set()
        self._pools: set[Pool] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._users = 0
        self._closed = False
        #: Called when the last listener, queue pair and attempt to connect is gone.
        self.on_idle: Callable[[], Coroutine[None, None, None]] | None = None

    @property
    def pod(self) -> PodName | None:
        """The pod as the agent knows it; None before the first contact."""
        return self._hello.pod if self._hello else None

    def start(self) -> None:
        """Begin to look for the agent; whatever needs it waits for it."""
        self._link.start()

    async def open(self, timeout_s: float | None = 10.0) -> None:
        """Reach the agent; UnavailableError when it does not answer within ``timeout_s``."""
        self.start()
        try:
            await self._link.up(timeout_s)
        except BaseException:
            await self.close()
            raise

    async def listen(self, service: str, *, options: Options | None = None, timeout_s: float | None = 10.0) -> Listener:
        """Let other pods connect to ``service`` of this pod.

        Raises RequestError for a malformed name; LeaseRefusedError when the pod has no device or another process
        listens there; UnavailableError when the agent does not answer within ``timeout_s``.
        """
        self._not_taken(service)
        listener = Listener(service, options or Options(), self._forget)
        self._users += 1
        self._listeners[service] = listener
        try:
            await self._link.up(timeout_s)
            self._opened_device()
            await self._persistent(lambda number: wire.Listen(number, service), timeout_s)
        except BaseException as error:
            del self._listeners[service]
            if isinstance(error, asyncio.CancelledError):  # the broker may have been asked
                await self._link.tell(lambda number: wire.Unlisten(number, service))
            await self._left()
            raise
        listener.established = True
        return listener

    @overload
    async def connect(
        self,
        target: str,
        *,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> QueuePair: ...

    @overload
    async def connect(
        self,
        target: str,
        *,
        count: int,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> list[QueuePair]: ...

    async def connect(
        self,
        target: str,
        *,
        count: int | None = None,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> QueuePair | list[QueuePair]:
        """Lease a queue pair to [namespace/]pod:service; returns it ready to send.

        With ``count`` (1 to 64) lease so many at once and return them as a list: all or none, for much less than as
        many single ones cost. Each is a queue pair like any other afterwards.

        ``address`` chooses among this pod's own addresses (default: the first, IPv4 where there is one). Raises
        RequestError for a malformed target, InputError for another count, LeaseRefusedError with the broker's sentence,
        UnavailableError when agent or device are not there, VerbsError when the device fails.
        """
        parsed = wire.Target.parse(target)
        if count is not None and not 1 <= count <= wire.MAX_BATCH:
            raise InputError(
                f"a batch has 1 to {wire.MAX_BATCH} queue pairs, not {count}; connect several times for more"
            )
        self._users += 1
        try:
            async with asyncio.timeout(timeout_s):
                qps = await self._connect(parsed, address, options or Options(), 1 if count is None else count)
        except TimeoutError as error:
            await self._link.up(0)  # else this is the reason
            raise LeaseRefusedError(
                f"{parsed} did not answer within {timeout_s:g} s", operation="timed_out", subject=str(parsed)
            ) from error
        finally:
            await self._left()
        return qps[0] if count is None else qps

    async def pool(
        self,
        target: str,
        *,
        size: int = 16,
        address: IPAddress | None = None,
        options: Options | None = None,
        timeout_s: float | None = 10.0,
    ) -> Pool:
        """``size`` queue pairs to [namespace/]pod:service, leased now and kept ready (rdmanet.verbs.pool). They count
        as leases, and arrive at the listener ahead of their use. Raises as ``connect``."""
        if size < 1:
            raise InputError(f"a pool has at least one queue pair, not {size}")

        async def lease(count: int) -> list[QueuePair]:
            return await self.connect(target, count=count, address=address, options=options, timeout_s=timeout_s)

        pool = Pool(target, size, lease, self._pool_closed)
        self._users += 1
        self._pools.add(pool)
        await pool.open()
        return pool

    async def _pool_closed(self, pool: Pool) -> None:
        self._pools.discard(pool)
        await self._left()

    async def datagram(
        self, service: str | None = None, *, options: Options | None = None, timeout_s: float | None = 10.0
    ) -> Datagram:
        """A queue pair for unreliable datagrams, to which other pods can connect by ``service``, if it has one.

        Raises as ``listen``.
        """
        from rdmanet.verbs.ud import DATAGRAM_OPTIONS, Datagram

        if service is not None:
            self._not_taken(service)
        self._users += 1
        try:
            await self._link.up(timeout_s)
            assert self._hello is not None
            datagram = Datagram(
                self._datagrams,
                self._opened_device(),
                self._hello.addresses,
                service,
                options or DATAGRAM_OPTIONS,
                traffic_class=self._hello.traffic_class,
                service_level=self._hello.service_level,
            )
        except BaseException:
            await self._left()
            raise
        await self._datagrams.begin(datagram, timeout_s)
        return datagram

    async def close(self) -> None:
        """Close every pool, listener and queue pair, the device and the connection. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # The last queue pair may have been closed by one of these.
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pool in list(self._pools):
            await pool.close()
        for listener in list(self._listeners.values()):
            await listener.close()
        await self._datagrams.close_all()
        await self._close_all(list(self._qps))
        for device in [*self._lost_devices, *([self._device] if self._device is not None else [])]:
            device.close()
        await self._link.close()

    async def __aenter__(self) -> Session:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Parts of connect and listen

    async def _connect(
        self, target: wire.Target, address: IPAddress | None, options: Options, count: int
    ) -> list[QueuePair]:
        await self._link.up(None)
        assert self._hello is not None
        own = self._hello.addresses
        device = self._opened_device()
        if address is None and own:
            address = own[0]
        if address is None or address not in own:
            listed = ", ".join(map(str, own)) or "none"
            raise RequestError(f"{address} is not an address of this pod, which has: {listed}")
        batch = self._batch(device, address, options, count)
        granted: list[wire.ConnectReply] = []

        def answered(values: wire.Json) -> None:
            # At once, so that a revocation that follows finds the queue pairs.
            reply = wire.ConnectReply.from_json(values)
            granted.append(reply)
            self._hold(batch, reply.lease, reply.peer, target.service)

        def too_late(values: wire.Json) -> None:
            first = wire.ConnectReply.from_json(values).lease
            self._spawn(self._leases.give_back(range(first, first + count)))

        try:
            await self._persistent(
                lambda number: wire.Connect(number, target, batch.ends), None, answered=answered, too_late=too_late
            )
            batch.ready(granted[0].ends)
        except BaseException:
            if granted:
                await self._close_all(batch.qps)
            else:
                batch.destroy()
            raise
        return batch.qps

    async def _persistent(
        self,
        make: Callable[[int], wire.Request],
        timeout_s: float | None,
        *,
        answered: Callable[[wire.Json], None] | None = None,
        too_late: Callable[[wire.Json], None] | None = None,
    ) -> None:
        """A request that is made again when the agent goes away before it has answered."""
        while True:
            await self._link.up(timeout_s)
            try:
                await self._link.request(make, answered=answered, too_late=too_late)
                return
            except LinkLostError:
                continue

    def _not_taken(self, service: str) -> None:
        wire.service_name(service)
        if service in self._listeners or self._datagrams.serves(service):
            raise LeaseRefusedError("this process listens there already", operation="listen", subject=service)

    def _opened_device(self) -> OpenDevice:
        assert self._hello is not None
        if self._hello.device is None:
            raise LeaseRefusedError(wire.no_device(self._hello.pod), operation="no_device")
        if self._unhealthy is not None:
            raise LeaseRefusedError(self._unhealthy, operation="no_device")
        if self._device is None:
            from rdmanet.verbs.device import OpenDevice

            self._tidy_devices()

            self._device = OpenDevice(self._hello.device)
        return self._device

    def _tidy_devices(self) -> None:
        """Close lost devices that nothing uses any more."""
        for device in [lost for lost in self._lost_devices if lost.idle]:
            self._lost_devices.remove(device)
            device.close()

    def _batch(self, device: OpenDevice, address: IPAddress, options: Options, count: int) -> Batch:
        from rdmanet.verbs.batch import Batch

        assert self._hello is not None
        return Batch(
            device,
            address_key(address),
            options,
            count,
            traffic_class=self._hello.traffic_class,
            service_level=self._hello.service_level,
        )

    def _hold(self, batch: Batch, first: int, peer: PodName, service: str) -> None:
        for number, qp in enumerate(batch.qps, first):
            qp.granted(number, peer, service, self._qp_closed)
        self._leases.hold(batch.qps)
        self._qps.update(batch.qps)
        self._users += len(batch.qps)

    async def _qp_closed(self, *qps: QueuePair) -> None:
        self._qps.difference_update(qps)
        self._tidy_devices()
        try:
            await self._leases.end(qps)
        finally:  # also when this is cancelled
            await self._left(len(qps))

    async def _close_all(self, qps: Iterable[QueuePair]) -> None:
        from rdmanet.verbs.queue_pair import close_all

        await close_all(qps)

    async def _forget(self, listener: Listener) -> None:
        """The listener's part of closing."""
        if self._listeners.get(listener.service) is listener:
            del self._listeners[listener.service]
            await self._link.tell(lambda number: wire.Unlisten(number, listener.service))
        await self._left()

    async def _left(self, users: int = 1) -> None:
        self._users -= users
        if self._users == 0 and self.on_idle is not None:
            await self.on_idle()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What the broker sends

    def _pushed(self, message: wire.Pushed) -> None:
        if isinstance(message, wire.Incoming):
            answering = self._datagrams if self._datagrams.serves(message.service) else self._acceptor
            self._spawn(answering.answer(message))
            return
        if isinstance(message, wire.DeviceState):
            self._device_state(message.sentence)
            return
        self._leases.revoked(message.leases, message.sentence)

    def _device_state(self, sentence: str | None) -> None:
        """The device can (None) or cannot be used any more; it is opened anew when it is back."""
        self._unhealthy = sentence
        for listener in self._listeners.values():
            listener.device_state(sentence)
        if sentence is None:
            if self._silent:
                self._spawn(self._listen_now())
            return
        self._leases.fail_all(lambda: UnavailableError(sentence, operation="device"))
        self._datagrams.fail_all(lambda: UnavailableError(sentence, operation="device"))
        if self._device is not None:
            self._lost_devices.append(self._device)
            self._device = None
            # Before Linux 7 the removal of an rxe device waits for everybody who has it open.
            self._tidy_devices()

    def _listening_ends(self, incoming: wire.Incoming, options: Options) -> Batch:
        assert self._hello is not None
        family = address_of(incoming.ends.gid).version
        address = next((a for a in self._hello.addresses if a.version == family), None)
        if address is None:
            raise UnavailableError(f"{pod_text(self._hello.pod)} has no IPv{family} address")
        batch = self._batch(self._opened_device(), address, options, len(incoming.ends.qpns))
        try:
            # Receives are posted by now: the connector may send as soon as it is told.
            batch.ready(incoming.ends)
        except VerbsError:
            batch.destroy()
            raise
        return batch

    async def _greeted(self, hello: wire.HelloReply) -> None:
        """The broker is there (again): claim what this process holds, listen where it listened."""
        returning, self._hello = self._hello is not None, hello
        if not returning:
            return
        await self._leases.claim_all()
        self._silent = self._unhealthy is not None  # it would refuse
        if not self._silent:
            await self._listen_again()

    async def _listen_now(self) -> None:
        with contextlib.suppress(LinkLostError):  # greeted again, it listens again
            await self._listen_again()

    async def _listen_again(self) -> None:
        """The agent is back: what others could connect to before they can connect to again."""
        self._silent = False
        await self._datagrams.listen_again()
        for service, listener in list(self._listeners.items()):
            if not listener.established:
                continue  # listen() is still asking
            try:
                await self._link.request(functools.partial(wire.Listen, service=service))
            except LeaseRefusedError as error:
                _log.error("%s does not listen any more: %s", service, error.sentence)
                listener.fail(error)
