"""Listening and connecting: the part of the library that holds leases.

A session is one connection to the broker and one opened device. ``listen`` and ``connect`` share a session per event
loop, which closes with the last listener and queue pair; ``Session`` is for programs that want their own.

While the agent is away the queue pairs go on working; the session comes back by itself, claims its leases and listens
again on its services. Only a lease that the new agent does not give back is lost.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, overload

from rdmanet import lease as wire
from rdmanet.errors import (
    InputError,
    LeaseRefusedError,
    RdmanetError,
    RequestError,
    UnavailableError,
    VerbsError,
)
from rdmanet.lease import pod_text
from rdmanet.model import IPAddress, PodName, address_key, address_of
from rdmanet.verbs.link import Link, LinkLostError
from rdmanet.verbs.listener import BACKLOG, Listener
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from types import TracebackType

    from rdmanet.verbs.batch import Batch
    from rdmanet.verbs.device import OpenDevice
    from rdmanet.verbs.queue_pair import QueuePair

_log = logging.getLogger(__name__)

#: Between claims when the agent could not read the kernel's queue pairs.
_CLAIM_AGAIN_S = 0.5
#: How long a farewell may take.
_COURTESY_S = 5.0


class Session:
    """A connection to the broker with the leases and listeners that depend on it."""

    def __init__(self) -> None:
        self._link = Link(self._greeted, self._pushed)
        self._hello: wire.HelloReply | None = None
        self._device: OpenDevice | None = None
        self._leases: dict[int, list[QueuePair]] = {}  # two of them where a process leases to itself
        self._listeners: dict[str, Listener] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._users = 0
        self._closed = False
        self._returned: list[int] = []  # leases to release
        self._returning: asyncio.Future[None] | None = None
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
        wire.service_name(service)
        if service in self._listeners:
            raise LeaseRefusedError("this process listens there already", operation="listen", subject=service)
        listener = Listener(service, options or Options(), self._forget)
        self._users += 1
        self._listeners[service] = listener
        try:
            await self._link.up(timeout_s)
            self._opened_device()
            await self._persistent(lambda number: wire.Listen(number, service), timeout_s)
        except BaseException:
            del self._listeners[service]
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

    async def close(self) -> None:
        """Close every listener and queue pair, the device and the connection. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # The last queue pair may have been closed by one of these.
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in list(self._listeners.values()):
            await listener.close()
        await self._close_all([qp for qps in self._leases.values() for qp in qps])
        if self._device is not None:
            self._device.close()
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
        from rdmanet.verbs.batch import Batch

        batch = Batch(device, address_key(address), options, count)
        granted: list[wire.ConnectReply] = []

        def answered(values: wire.Json) -> None:
            # At once, so that a revocation that follows finds the queue pairs.
            reply = wire.ConnectReply.from_json(values)
            granted.append(reply)
            self._hold(batch, reply.lease, reply.peer, target.service)

        def too_late(values: wire.Json) -> None:
            first = wire.ConnectReply.from_json(values).lease
            self._spawn(self._give_back(*range(first, first + count)))

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

    def _opened_device(self) -> OpenDevice:
        assert self._hello is not None
        if self._hello.device is None:
            raise LeaseRefusedError(wire.no_device(self._hello.pod), operation="no_device")
        if self._device is None:
            from rdmanet.verbs.device import OpenDevice

            self._device = OpenDevice(self._hello.device)
        return self._device

    def _hold(self, batch: Batch, first: int, peer: PodName, service: str) -> None:
        for number, qp in enumerate(batch.qps, first):
            qp.granted(number, peer, service, self._qp_closed)
            self._leases.setdefault(number, []).append(qp)
        self._users += len(batch.qps)

    def _is_held(self, qp: QueuePair) -> bool:
        return qp in self._leases.get(qp.lease, [])

    def _let_go(self, qp: QueuePair) -> bool:
        """Forget a queue pair; False when its lease has ended already."""
        held = self._leases.get(qp.lease, [])
        if qp not in held:
            return False
        held.remove(qp)
        if not held:
            del self._leases[qp.lease]
        return True

    async def _qp_closed(self, *qps: QueuePair) -> None:
        numbers = [qp.lease for qp in qps if self._let_go(qp)]
        if numbers:
            await self._give_back(*numbers)
        await self._left(len(qps))

    async def _close_all(self, qps: Iterable[QueuePair]) -> None:
        from rdmanet.verbs.queue_pair import close_all

        await close_all(qps)

    async def _give_back(self, *numbers: int) -> None:
        """Release leases; those that are given back in the same turn of the loop go together."""
        self._returned += numbers
        if self._returning is None:
            self._returning = asyncio.ensure_future(self._release())
        await asyncio.shield(self._returning)

    async def _release(self) -> None:
        await asyncio.sleep(0)
        numbers, self._returned, self._returning = self._returned, [], None
        for first in range(0, len(numbers), wire.MAX_BATCH):
            some = tuple(numbers[first : first + wire.MAX_BATCH])
            await self._tell(functools.partial(wire.Release, leases=some))

    async def _tell(self, make: Callable[[int], wire.Request]) -> None:
        """A request that is a courtesy: the lease or the listener may have ended by itself, and the agent may be away,
        in which case nobody will claim it."""
        try:
            async with asyncio.timeout(_COURTESY_S):
                await self._link.request(make)
        except (LeaseRefusedError, LinkLostError, TimeoutError) as error:
            _log.debug("not needed any more: %s", error)

    async def _forget(self, listener: Listener) -> None:
        """The listener's part of closing."""
        if self._listeners.get(listener.service) is listener:
            del self._listeners[listener.service]
            await self._tell(lambda number: wire.Unlisten(number, listener.service))
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

    def _pushed(self, message: wire.Incoming | wire.Revoked) -> None:
        if isinstance(message, wire.Incoming):
            self._spawn(self._answer(message))
            return
        for number in message.leases:
            for qp in self._leases.pop(number, []):
                qp.revoke(message.sentence)

    async def _answer(self, incoming: wire.Incoming) -> None:
        """Make the listening end and accept; whatever goes wrong is told to the connector."""
        listener = self._listeners.get(incoming.service)
        if listener is None or listener.full:
            why = "nobody listens any more" if listener is None else f"{BACKLOG} connections wait to be accepted"
            await self._reject(incoming, why)
            return
        try:
            batch = self._listening_ends(incoming, listener.options)
        except RdmanetError as error:
            _log.error("%s could not be accepted: %s", pod_text(incoming.peer), error)
            await self._reject(incoming, error.sentence)
            return
        # Held before they are accepted: should the agent go away now, these ends can be claimed.
        self._hold(batch, incoming.lease, incoming.peer, incoming.service)
        qps = batch.qps
        try:
            await self._link.request(lambda number: wire.Accept(number, incoming.lease, batch.ends))
        except LinkLostError:
            await self._link.up(None)  # claims first
            if not all(map(self._is_held, qps)):  # the new agent does not know them; the connector was hardly told
                await self._close_all(qps)
                return
        except LeaseRefusedError as error:
            _log.info("%s gave up: %s", pod_text(incoming.peer), error.sentence)
            await self._drop(qps)
            return
        except BaseException:
            await self._drop(qps)
            raise
        # Delivered even when they are broken by now: the connector may have sent, failed and closed before this task's
        # turn came. Whoever accepts them receives what has arrived, and then the reason.
        if not listener.deliver(qps):
            await self._close_all(qps)

    async def _drop(self, qps: list[QueuePair]) -> None:
        """Close queue pairs whose leases never were: there is nothing to give back."""
        for qp in qps:
            self._let_go(qp)
        await self._close_all(qps)

    def _listening_ends(self, incoming: wire.Incoming, options: Options) -> Batch:
        from rdmanet.verbs.batch import Batch

        assert self._hello is not None
        family = address_of(incoming.ends.gid).version
        address = next((a for a in self._hello.addresses if a.version == family), None)
        if address is None:
            raise UnavailableError(f"{pod_text(self._hello.pod)} has no IPv{family} address")
        batch = Batch(self._opened_device(), address_key(address), options, len(incoming.ends.qpns))
        try:
            # Receives are posted by now: the connector may send as soon as it is told.
            batch.ready(incoming.ends)
        except VerbsError:
            batch.destroy()
            raise
        return batch

    async def _reject(self, incoming: wire.Incoming, sentence: str) -> None:
        await self._tell(lambda number: wire.Reject(number, incoming.lease, sentence))

    async def _greeted(self, hello: wire.HelloReply) -> None:
        """The broker is there (again): claim what this process holds, listen where it listened."""
        returning, self._hello = self._hello is not None, hello
        if not returning:
            return
        await self._claim_all()
        for service, listener in list(self._listeners.items()):
            if not listener.established:
                continue  # listen() is still asking
            try:
                await self._link.request(functools.partial(wire.Listen, service=service))
            except LeaseRefusedError as error:
                _log.error("%s does not listen any more: %s", service, error.sentence)
                listener.fail(error)

    async def _claim_all(self) -> None:
        items = [wire.ClaimItem(number, qp.qpn) for number, qps in self._leases.items() for qp in qps]
        for first in range(0, len(items), wire.MAX_BATCH):
            batch = tuple(items[first : first + wire.MAX_BATCH])
            while True:
                try:
                    values = await self._link.request(functools.partial(wire.Claim, leases=batch))
                    break
                except LeaseRefusedError as error:
                    if error.operation != "unavailable":
                        raise
                    _log.warning("leases could not be claimed yet: %s", error)
                    await asyncio.sleep(_CLAIM_AGAIN_S)
            for number in wire.ClaimReply.from_json(values).lost:
                for qp in self._leases.pop(number, []):
                    qp.revoke("the agent came back and does not know the lease any more")


_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = weakref.WeakKeyDictionary()


def _shared_session() -> Session:
    """The loop's session, opened if need be."""
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None:
        session = Session()
        _sessions[loop] = session

        async def close_when_idle(session: Session = session) -> None:
            if _sessions.get(loop) is session:
                del _sessions[loop]
            await session.close()

        session.on_idle = close_when_idle
        session.start()
    return session


async def listen(service: str, *, options: Options | None = None, timeout_s: float | None = 10.0) -> Listener:
    """Session.listen of the event loop's shared session."""
    session = _shared_session()
    return await session.listen(service, options=options, timeout_s=timeout_s)


@overload
async def connect(
    target: str,
    *,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> QueuePair: ...


@overload
async def connect(
    target: str,
    *,
    count: int,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> list[QueuePair]: ...


async def connect(
    target: str,
    *,
    count: int | None = None,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> QueuePair | list[QueuePair]:
    """Session.connect of the event loop's shared session."""
    session = _shared_session()
    if count is None:
        return await session.connect(target, address=address, options=options, timeout_s=timeout_s)
    return await session.connect(target, count=count, address=address, options=options, timeout_s=timeout_s)
