"""One leased queue pair (RC): WRITE, READ, SEND and RECEIVE as coroutines.

It is made by a batch (rdmanet.verbs.batch); rdmanet.verbs.completions brings what it has completed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

from rdmanet.errors import InputError, LeaseRevokedError, RdmanetError, UnavailableError, VerbsError
from rdmanet.lease import lease_text, pod_text
from rdmanet.model import PodName
from rdmanet.verbs import compat, memory
from rdmanet.verbs.device import OpenDevice
from rdmanet.verbs.memory import MemoryRegion, Place, RemoteRegion
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from rdmanet.verbs.completions import CompletionQueue

_log = logging.getLogger(__name__)

#: Work request numbers from here on are receives; the rest of the number is the slot.
_RECEIVE = 1 << 62
#: Receives that a new queue pair has. The others follow when the first message has come: many queue pairs never see
#: one, and posting the receives costs more than the whole connection does.
FIRST_RECEIVES = 2

#: What a work completion's status means for a person (ibv_wc_status; InfiniBand 11.6.2).
_STATUS = {
    1: "a message did not fit: the peer sent more bytes than this end's Options.message_bytes",
    2: "the device could not carry out a request; on Soft-RoCE, where nothing else fits, the peer sent more bytes than "
    "this end's Options.message_bytes",
    4: "local memory was not registered for this use, or the range is outside its region",
    5: "the queue pair was shut down before the request was done",
    9: "the peer's queue pair refused the request as malformed: it does not take messages this long",
    10: "the peer refused access: key, range or rights of the remote region do not allow it",
    11: "the peer could not carry out the request",
    12: "the peer does not answer: its process or its pod is gone, or packets are dropped on the way",
    13: "the peer never had a receive posted",
}


class _Transfer:
    """Requests that belong together; ``done`` when all are."""

    __slots__ = ("all_posted", "done", "waiting")

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting = 0
        self.all_posted = False

    def fail(self, failure: Callable[[], RdmanetError] | None) -> None:
        if failure is not None and not self.done.done():
            self.done.set_exception(failure())
            self.done.exception()  # nobody may be waiting any more, and that is no mistake

    def settle(self) -> None:
        if self.all_posted and self.waiting == 0 and not self.done.done():
            self.done.set_result(None)


class QueuePair:
    """A leased queue pair, ready to send. Made by ``connect`` and ``Listener.accept``.

    Operations of one queue pair are carried out in the order in which they were begun. Any failure breaks the queue
    pair for good: later operations raise the same error. Messages that have arrived can still be received.
    """

    def __init__(self, completions: CompletionQueue, device: OpenDevice, options: Options, verbs_qp: Any):
        self.verbs_qp = verbs_qp
        self.qpn = int(verbs_qp.qp_num)
        self.mtu_bytes = 0
        self._completions = completions
        self._device = device
        self._options = options
        self._failure: Callable[[], RdmanetError] | None = None
        self._closed = self._destroyed = False
        self._numbers = 0
        self._places: list[Place] = []  # slot → where its receive goes
        self._receives_complete = False
        self._send: compat.SendRequest | None = None
        self._send_slots: MemoryRegion | None = None
        self.on_close: Callable[..., Awaitable[None]] | None = None
        #: The lease's id, the peer pod and its end; set when the lease is granted.
        self.lease = 0
        self.peer: PodName | None = None
        self.service = ""
        completions.add(self)

    # Made when they are needed first: most of what a queue pair needs to work it does not need to be leased.

    @functools.cached_property
    def _window(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self._options.window)

    @functools.cached_property
    def _transfers(self) -> dict[int, tuple[_Transfer, int | None]]:
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

    # The batch's and the session's side

    def add_receives(self, places: list[Place], sge: Any) -> None:
        """Post a receive into each of these places more; ``sge`` has their length. Raises PyverbsError."""
        for slot, place in enumerate(places, len(self._places)):
            if place.request is None:
                sge.addr, sge.lkey = place.address, place.lkey
                place.request = compat.RecvRequest(_RECEIVE | slot, sge)
            else:
                place.request.renumber(_RECEIVE | slot)
            place.request.post(self.verbs_qp)
        self._places += places

    def granted(self, lease: int, peer: PodName, service: str, on_close: Callable[..., Awaitable[None]]) -> None:
        """The broker has granted (or is about to grant) this lease; ``on_close`` gives it back."""
        self.lease, self.peer, self.service, self.on_close = lease, peer, service, on_close

    def revoke(self, sentence: str) -> None:
        """The lease is over: what waits, and whatever is asked later, raises LeaseRevokedError."""
        if self._closed:
            return
        lease = lease_text(self.lease)
        try:
            self._completions.poll()  # what has arrived by now has arrived
            with compat.call("the queue pair could not be stopped", "ibv_modify_qp", self._device.name):
                self.verbs_qp.modify(compat.to_error(), compat.enums.IBV_QP_STATE)
        except VerbsError as error:  # the device may be gone as well, and the lease is over all the same
            _log.warning("queue pair %d of a revoked lease: %s", self.qpn, error)
        self.fail(lambda: LeaseRevokedError(sentence, operation="lease", subject=lease))

    # The application's side

    @property
    def broken(self) -> bool:
        """Whether an operation has failed, the lease was revoked or the queue pair is closed."""
        return self._failure is not None

    @property
    def closed(self) -> bool:
        return self._closed

    def register(self, buffer: Any, *, remote_read: bool = False, remote_write: bool = False) -> MemoryRegion:
        """Let the device use ``buffer`` (writable, contiguous), and the peer as far as the flags say.

        Raises InputError for memory of another kind and VerbsError with a sentence when it cannot be locked. The
        region is closed with the queue pair at the latest.
        """
        self._check()
        region = self._device.register(buffer, remote_read=remote_read, remote_write=remote_write)
        self._regions.add(region)
        region.on_close = self._regions.discard
        return region

    def allocate(self, length: int, *, remote_read: bool = False, remote_write: bool = False) -> MemoryRegion:
        """``register`` of ``length`` new zero bytes."""
        return self.register(memory.allocate(length), remote_read=remote_read, remote_write=remote_write)

    async def write(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        length: int | None = None,
    ) -> None:
        """RDMA WRITE: copy ``length`` bytes (default: the rest of ``local``) into the peer's memory.

        Returns when the peer's device has acknowledged all of it; the peer's process is not told: ``send`` it
        something afterwards, which arrives after the data.
        """
        opcode = compat.enums.IBV_WR_RDMA_WRITE
        await self._move(opcode, local, remote, local_offset, remote_offset, length)

    async def read(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        length: int | None = None,
    ) -> None:
        """RDMA READ: copy ``length`` bytes (default: the rest of ``local``) from the peer's memory."""
        opcode = compat.enums.IBV_WR_RDMA_READ
        await self._move(opcode, local, remote, local_offset, remote_offset, length)

    async def send(self, message: bytes | bytearray | memoryview) -> None:
        """SEND one message, 1 to Options.message_bytes bytes; returns when the peer's device has it."""
        size = len(message)
        if not 1 <= size <= self._options.message_bytes:
            raise InputError(
                f"a message has 1 to {self._options.message_bytes} bytes (Options.message_bytes), not {size}; "
                "use write() for more"
            )
        transfer = _Transfer()
        async with self._order:
            await self._admitted()
            slots = self._send_slots or self._new_send_slots()
            slot = self._free_slots.popleft()
            offset = slot * self._options.message_bytes
            slots.buffer[offset : offset + size] = message
            place = (slots.address + offset, size, slots.lkey)
            self._post(transfer, compat.enums.IBV_WR_SEND, place, None, slot)
        transfer.all_posted = True
        transfer.settle()
        await transfer.done

    async def recv(self) -> bytes:
        """The next message that the peer sent, in order."""
        await self._arrivals.acquire()
        if not self._arrived:
            self._arrivals.release()  # for the others that wait
            self._check()
            raise AssertionError("woken without a message and without a failure")
        slot, size = self._arrived.popleft()
        place = self._places[slot]
        message = place.read(size)
        if self._failure is None and place.request is not None:
            with compat.call("no receive could be posted", "ibv_post_recv", self._device.name):
                place.request.post(self.verbs_qp)
        return message

    async def close(self) -> None:
        """Destroy the queue pair, deregister its memory and give the lease back. Idempotent."""
        if self._closed:
            return
        try:
            self.shut()
        finally:
            if self.on_close is not None:
                await self.on_close(self)

    def shut(self) -> None:
        """``close`` without giving the lease back: the session's part, which does so for many at once."""
        self._closed = True
        self.fail(lambda: UnavailableError("the queue pair has been closed", operation="close"))
        self.__dict__.pop("_arrived", None)
        self.destroy()

    async def __aenter__(self) -> QueuePair:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        peer = pod_text(self.peer) if self.peer else "nobody"
        return f"<QueuePair {self.qpn} to {peer}, lease {lease_text(self.lease)}>"

    # Inside

    async def _move(
        self,
        opcode: int,
        local: MemoryRegion,
        remote: RemoteRegion,
        local_offset: int,
        remote_offset: int,
        length: int | None,
    ) -> None:
        if length is None:
            length = local.length - local_offset
        if min(length, local_offset, remote_offset) < 0 or local_offset + length > local.length:
            raise InputError(f"bytes {local_offset} to {local_offset + length} are not in the {local.length} of local")
        if remote_offset + length > remote.length:
            raise InputError(
                f"bytes {remote_offset} to {remote_offset + length} are not in the {remote.length} of the remote region"
            )
        if local.closed:
            raise InputError("the local memory region is closed")
        self._check()
        transfer = _Transfer()
        chunk = self._options.chunk_bytes
        async with self._order:
            for done in range(0, length, chunk):
                await self._admitted()
                size = min(chunk, length - done)
                place = (local.address + local_offset + done, size, local.lkey)
                target = (remote.address + remote_offset + done, remote.rkey)
                self._post(transfer, opcode, place, target, None)
        transfer.all_posted = True
        transfer.settle()
        await transfer.done

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure()

    def _new_send_slots(self) -> MemoryRegion:
        """Registered with the first message: many queue pairs never send one."""
        window, size = self._options.window, self._options.message_bytes
        try:
            slots = self._device.register(memory.allocate(window * size), remote_read=False, remote_write=False)
        except VerbsError:
            self._window.release()
            raise
        self._send_slots = slots
        self._free_slots.extend(range(window))
        return slots

    def _complete_receives(self) -> None:
        """The rest of the receives, when messages come at all."""
        self._receives_complete = True
        count, size = self._options.messages - len(self._places), self._options.message_bytes
        if count <= 0:
            return
        try:
            region = self._device.register(memory.allocate(count * size), remote_read=False, remote_write=False)
            self._regions.add(region)
            with (
                compat.call("no receive could be posted", "ibv_post_recv", self._device.name),
                compat.element(size, region.lkey) as sge,
            ):
                self.add_receives(memory.places(region, size), sge)
        except VerbsError as error:  # it works with those it has
            have = len(self._places)
            _log.warning("queue pair %d goes on with %d receives: %s", self.qpn, have, error)

    async def _admitted(self) -> None:
        """Wait for room in the send queue."""
        self._check()
        await self._window.acquire()
        if self._failure is not None:
            self._window.release()  # for the others that wait
            self._check()

    def _post(
        self,
        transfer: _Transfer,
        opcode: int,
        local: tuple[int, int, int],
        remote: tuple[int, int] | None,
        slot: int | None,
    ) -> None:
        self._numbers += 1
        if self._send is None:
            self._send = compat.SendRequest()
        try:
            with compat.call("a request could not be posted", "ibv_post_send", self._device.name):
                self._send.post(self.verbs_qp, opcode, self._numbers, local, remote)
        except VerbsError as error:
            self.fail(again(error))
            raise
        transfer.waiting += 1
        self._transfers[self._numbers] = (transfer, slot)

    def completed(self, number: int, status: int, size: int) -> None:
        """A work completion has come: the batch's part."""
        transfer, slot = self._transfers.pop(number, (None, None))
        if transfer is not None:
            transfer.waiting -= 1
            self._window.release()
            if slot is not None:
                self._free_slots.append(slot)
        if status != 0:
            if self._failure is None:  # else flushed because of what failed first
                self.fail(again(_completion_error(status, self._device.name)))
            if transfer is not None:
                transfer.fail(self._failure)
        elif transfer is not None:
            transfer.settle()
        elif number & _RECEIVE:
            self._arrived.append((number & ~_RECEIVE, size))
            self._arrivals.release()
            if not self._receives_complete:
                self._complete_receives()

    def fail(self, failure: Callable[[], RdmanetError]) -> None:
        """The queue pair is broken; wake everybody who waits. Revocation replaces an earlier error: it is the cause."""
        made, first = self.__dict__, self._failure is None
        self._failure = failure
        if "_transfers" in made:
            for transfer, _ in self._transfers.values():
                transfer.fail(failure)
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
            with compat.call("the queue pair could not be destroyed", "ibv_destroy_qp", self._device.name):
                self.verbs_qp.close()
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


async def close_all(qps: Iterable[QueuePair]) -> None:
    """``close`` of many queue pairs; the leases of a session go back in one message for 64."""
    owners: dict[Callable[..., Awaitable[None]], list[QueuePair]] = {}
    try:
        for qp in qps:
            if not qp.closed:
                if qp.on_close is not None:
                    owners.setdefault(qp.on_close, []).append(qp)
                qp.shut()
    finally:
        for on_close, closed in owners.items():
            await on_close(*closed)


def _completion_error(status: int, device: str) -> VerbsError:
    sentence = _STATUS.get(status, "the device reports a failed request")
    return VerbsError(sentence, operation=f"work completion, status {status}", subject=device, status=status)


def again(error: VerbsError) -> Callable[[], RdmanetError]:
    """Makes equal errors: one instance raised in several places would collect all their tracebacks."""
    return lambda: VerbsError(
        error.sentence,
        operation=error.operation,
        subject=error.subject,
        errno=error.errno,
        status=error.status,
    )
