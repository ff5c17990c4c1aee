"""What every queue pair of the library is made of: requests posted in order, receives, completions, and one failure.

A batch makes it (rdmanet.verbs.batch), rdmanet.verbs.completions brings what it has completed, and what applications
do with it is in rdmanet.verbs.queue_pair.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rdmanet.errors import TimedOutError, VerbsError
from rdmanet.verbs import compat, forked, memory
from rdmanet.verbs.device import OpenDevice
from rdmanet.verbs.failure import Failure, again, completion_error
from rdmanet.verbs.memory import MemoryRegion, Place
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from rdmanet.verbs.completions import CompletionQueue

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

#: Work request numbers from here on are receives; the rest of the number is the slot.
RECEIVE = 1 << 62
#: Receives that a new queue pair has. The others follow when the first message has come: many queue pairs never see
#: one, and posting the receives costs more than the whole connection does.
FIRST_RECEIVES = 2


class Used(Protocol):
    """What requests need until they are completed."""

    def use(self) -> None:
        """A request that needs it is under way."""

    def unuse(self) -> None:
        """A request that needed it has been completed, or its queue pair is gone."""


class Transfer:
    """Requests of one operation; ``done`` when all are completed. ``region`` is what they need until then: memory of
    the application's, or a datagram's peer; ``place`` is where an atomic's result goes, which becomes ``value``."""

    __slots__ = ("all_posted", "done", "operation", "place", "region", "value", "waiting")

    def __init__(self, operation: str, region: Used | None = None, place: Place | None = None) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.operation = operation
        self.region = region
        self.place = place
        self.value = 0
        self.waiting = 0
        self.all_posted = False

    def fail(self, failure: Failure | None) -> None:
        if failure is not None and not self.done.done():
            self.done.set_exception(failure())
            self.done.exception()  # nobody may be waiting any more, and that is no mistake

    def settle(self) -> None:
        if self.all_posted and self.waiting == 0 and not self.done.done():
            self.done.set_result(None)


class Endpoint:
    """A verbs queue pair with its queues. Any failure breaks it for good.

    Whoever waits may be cancelled at any time. What has not been posted then never is; what has been posted goes on
    and keeps its memory until it is completed, and the queue pair can be used.
    """

    def __init__(self, completions: CompletionQueue, device: OpenDevice, options: Options, verbs_qp: Any):
        self.verbs_qp = verbs_qp
        self.qpn = int(verbs_qp.qp_num)
        self.mtu_bytes = 0
        #: Called when it breaks, before those who wait know.
        self.on_broken: Callable[[], None] | None = None
        self._completions = completions
        self._device = device
        self._options = options
        self._failure: Failure | None = None
        self._closed = self._destroyed = False
        self._numbers = 0
        self._places: list[Place] = []  # slot → where its receive goes
        self._receives_complete = False
        self._send: compat.SendRequest | None = None
        self._send_slots: MemoryRegion | None = None
        completions.add(self)

    # Made when they are needed first: most of what a queue pair needs to work it does not need to be leased.

    @functools.cached_property
    def _window(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self._options.window)

    @functools.cached_property
    def _transfers(self) -> dict[int, tuple[Transfer, int | None]]:
        """Request → transfer, send slot."""
        return {}

    @functools.cached_property
    def _free_slots(self) -> deque[int]:
        return deque()

    @functools.cached_property
    def _regions(self) -> set[MemoryRegion]:
        return set()

    @functools.cached_property
    def _arrived(self) -> deque[tuple[int, int]]:
        """Slot, bytes."""
        return deque()

    @functools.cached_property
    def _arrivals(self) -> asyncio.Semaphore:
        """Of messages, and one more for all once it has failed."""
        return asyncio.Semaphore(0 if self._failure is None else 1)

    @functools.cached_property
    def _order(self) -> asyncio.Lock:
        return asyncio.Lock()

    @functools.cached_property
    def _drains(self) -> deque[tuple[int, asyncio.Future[None]]]:
        """Request, and who waits until it is completed."""
        return deque()

    @property
    def broken(self) -> bool:
        """Whether an operation has failed, the lease was revoked or the queue pair is closed."""
        return self._failure is not None

    @property
    def closed(self) -> bool:
        return self._closed

    # Memory

    def register(
        self, buffer: Any, *, remote_read: bool = False, remote_write: bool = False, remote_atomic: bool = False
    ) -> MemoryRegion:
        """Let the device use ``buffer`` (writable, contiguous), and the peer as far as the flags say.

        Raises InputError for memory of another kind and VerbsError with a sentence when it cannot be locked. The
        region is closed with the queue pair at the latest.
        """
        self._check()
        region = self._device.register(
            buffer, remote_read=remote_read, remote_write=remote_write, remote_atomic=remote_atomic
        )
        self._regions.add(region)
        region.on_close = self._regions.discard
        return region

    def allocate(
        self, length: int, *, remote_read: bool = False, remote_write: bool = False, remote_atomic: bool = False
    ) -> MemoryRegion:
        """``register`` of ``length`` new zero bytes."""
        buffer = memory.allocate(length)
        return self.register(buffer, remote_read=remote_read, remote_write=remote_write, remote_atomic=remote_atomic)

    # Requests

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure()

    @property
    def peer_text(self) -> str:
        """Who is at the other end, for errors."""
        return ""

    @property
    def idle(self) -> bool:
        """Whether nothing that this end has begun is under way, and no message waits to be received."""
        made = self.__dict__
        return not made.get("_transfers") and not made.get("_arrived")

    def look(self) -> None:
        """Handle what has completed by now, before the loop would."""
        if self._failure is None:
            self._completions.poll()

    def forked(self) -> None:
        """In a child of its process: nothing of it is touched any more."""
        self._failure, self._closed, self._destroyed = forked.error, True, True
        self.on_broken = None

    async def drain(self, *, timeout_s: float | None = None) -> None:
        """Wait until everything that was begun is completed: also what nobody waits for, being cancelled or timed out.
        Raises what the operations do, TimedOutError after ``timeout_s``."""
        await self._within(self._drain(), "drain", timeout_s)

    async def _drain(self) -> None:
        async with self._order:  # behind what waits to be posted
            self._check()
            if not self._transfers:
                return
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._drains.append((self._numbers, done))
        await self._completion(done)
        self._check()

    async def _within(self, work: Awaitable[_T], operation: str, timeout_s: float | None) -> _T:
        """What an operation gives, or TimedOutError when it takes longer."""
        if timeout_s is None:
            return await work
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            raise TimedOutError(
                f"{operation} was not done within {timeout_s:g} s; what is under way goes on",
                operation=operation,
                subject=self._device.name,
                peer=self.peer_text,
            ) from error

    async def _completion(self, done: asyncio.Future[None]) -> None:
        if not done.done():
            with self._completions:
                await done
        else:
            done.result()

    async def _admitted(self) -> None:
        """Wait for room in the send queue."""
        self._check()
        if self._window.locked():
            with self._completions:
                await self._window.acquire()
        else:
            await self._window.acquire()
        if self._failure is not None:
            self._window.release()  # for the others that wait
            self._check()

    def _post(
        self,
        transfer: Transfer,
        opcode: int,
        local: tuple[int, int, int],
        remote: tuple[int, int] | None,
        slot: int | None = None,
        operands: tuple[int, int] | None = None,
    ) -> None:
        self._numbers += 1
        if self._send is None:
            self._send = compat.SendRequest()
        try:
            with compat.call("a request could not be posted", transfer.operation, self._device.name):
                self._send.post(self.verbs_qp, opcode, self._numbers, local, remote, operands)
        except VerbsError as error:
            self._window.release()
            self.fail(again(error))
            raise
        transfer.waiting += 1
        if transfer.region is not None:
            transfer.region.use()
        self._transfers[self._numbers] = (transfer, slot)

    async def _finished(self, transfer: Transfer) -> None:
        """Everything of it is posted; wait until it is done."""
        transfer.all_posted = True
        transfer.settle()
        await self._completion(transfer.done)

    def _new_send_slots(self) -> MemoryRegion:
        """Registered with the first message: many queue pairs never send one."""
        window, size = self._options.window, self._options.message_bytes
        try:
            slots = self._device.register(memory.allocate(window * size))
        except VerbsError:
            self._window.release()
            raise
        self._send_slots = slots
        self._free_slots.extend(range(window))
        return slots

    # Receives

    def add_receives(self, places: list[Place], sge: Any) -> None:
        """Post a receive into each of these places more; ``sge`` has their length. Raises PyverbsError."""
        for slot, place in enumerate(places, len(self._places)):
            if place.request is None:
                sge.addr, sge.lkey = place.address, place.lkey
                place.request = compat.RecvRequest(RECEIVE | slot, sge)
            else:
                place.request.renumber(RECEIVE | slot)
            place.request.post(self.verbs_qp)
        self._places += places

    def _complete_receives(self) -> None:
        """The rest of the receives, when messages come at all."""
        self._receives_complete = True
        count, size = self._options.messages - len(self._places), self._options.message_bytes
        if count <= 0:
            return
        try:
            region = self._device.register(memory.allocate(count * size))
            self._regions.add(region)
            with (
                compat.call("no receive could be posted", "ibv_post_recv", self._device.name),
                compat.element(size, region.lkey) as sge,
            ):
                self.add_receives(memory.places(region, size), sge)
        except VerbsError as error:  # it works with those it has
            have = len(self._places)
            _log.warning("queue pair %d goes on with %d receives: %s", self.qpn, have, error)

    async def _next_arrival(self) -> tuple[int, int]:
        """Slot and bytes of the next message, whose receive is not posted again yet."""
        if self._arrivals.locked():
            with self._completions:
                await self._arrivals.acquire()
        else:
            await self._arrivals.acquire()
        if not self._arrived:
            self._arrivals.release()  # for the others that wait
            self._check()
            raise AssertionError("woken without a message and without a failure")
        return self._arrived.popleft()

    def _receive_again(self, slot: int) -> None:
        """Post a slot's receive again, when its message has been read."""
        request = self._places[slot].request
        if self._failure is None and request is not None:
            with compat.call("no receive could be posted", "ibv_post_recv", self._device.name):
                request.post(self.verbs_qp)

    def _released(self, transfer: Transfer) -> None:
        """A request of it needs its memory no more."""
        if transfer.region is not None:
            transfer.region.unuse()
        if transfer.place is not None:
            # Read at once: the place is the next one's from here on. Atomics are in the processor's byte order.
            transfer.value = int.from_bytes(transfer.place.read(memory.ATOMIC_BYTES), sys.byteorder)
            self._device.places.give(memory.ATOMIC_BYTES, [transfer.place])
            transfer.place = None

    # Completions and the end

    def completed(self, number: int, status: int, size: int, source: int = 0) -> None:
        """A work completion has come: the completion queue's part. ``source`` is a datagram's source QPN."""
        transfer, slot = self._transfers.pop(number, (None, None))
        if transfer is not None:
            transfer.waiting -= 1
            self._window.release()
            self._released(transfer)
            drains = self.__dict__.get("_drains")
            while drains and drains[0][0] <= number:
                _wake(drains.popleft()[1])
            if slot is not None:
                self._free_slots.append(slot)
        if status != 0:
            if self._failure is None:  # else flushed because of what failed first
                operation = "recv" if transfer is None else transfer.operation
                self.fail(again(completion_error(status, self._device.name, operation, self.peer_text)))
            if transfer is not None:
                transfer.fail(self._failure)
        elif transfer is not None:
            transfer.settle()
        elif number & RECEIVE:
            self._arrived.append((number & ~RECEIVE, size))
            self._arrivals.release()
            if not self._receives_complete:
                self._complete_receives()

    def fail(self, failure: Failure) -> None:
        """The queue pair is broken; wake everybody who waits. Revocation replaces an earlier error: it is the cause."""
        made, first = self.__dict__, self._failure is None
        self._failure = failure
        if first and self.on_broken is not None:
            self.on_broken()
        if "_transfers" in made:
            for transfer, _ in self._transfers.values():
                transfer.fail(failure)
        for _, done in made.pop("_drains", ()):
            _wake(done)
        for name in ("_window", "_arrivals"):
            if first and name in made:
                made[name].release()

    def fail_with(self, error: VerbsError) -> None:
        """Completions do not come any more."""
        self.fail(again(error))

    def destroy(self) -> None:
        """Free everything that is its own. Idempotent."""
        self._closed = True
        if self._destroyed:
            return
        self._destroyed = True
        try:
            with compat.destroyed("the queue pair could not be destroyed", "ibv_destroy_qp", self._device.name):
                self.verbs_qp.close()
            for transfer, _ in self.__dict__.pop("_transfers", {}).values():  # never completed
                self._released(transfer)
            self._device.places.give(self._options.message_bytes, self._places[:FIRST_RECEIVES])
            for place in self._places[FIRST_RECEIVES:]:
                if place.request is not None:
                    place.request.close()
            self._places.clear()
        finally:
            self._completions.remove(self)
            self._device.completions.left(self._completions, self._options.window + self._options.messages)
        if self._send is not None:
            self._send.close()
            self._send = None
        if "_regions" in self.__dict__:
            for region in list(self._regions):
                region.close()
        if self._send_slots is not None:
            self._send_slots.close()


def _wake(done: asyncio.Future[None]) -> None:
    """Whoever waits may have been cancelled."""
    if not done.done():
        done.set_result(None)
