"""One leased queue pair (RC): WRITE, READ, SEND and RECEIVE as coroutines.

pyverbs never releases the GIL, so nothing here waits in a verb: the completion channel's descriptor is non-blocking and
the event loop watches it. Every queue pair has its own completion queue and channel, so one that overflows or breaks
harms no other.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from rdmanet.errors import InputError, LeaseRevokedError, RdmanetError, UnavailableError, VerbsError
from rdmanet.lease import End, lease_text, pod_text
from rdmanet.model import PodName, address_of
from rdmanet.verbs import compat, memory
from rdmanet.verbs.device import PORT, OpenDevice
from rdmanet.verbs.memory import MemoryRegion, RemoteRegion
from rdmanet.verbs.options import Options

_log = logging.getLogger(__name__)

#: Work request numbers from here on are receives; the rest of the number is the slot.
_RECEIVE = 1 << 62
#: Completions handled in one turn of the loop, so that others get theirs.
_COMPLETIONS_PER_TURN = 256
#: 4.096 us * 2**16 = 0.27 s until a retry. rxe takes a retry count of 7 as endless; 6 fails after about 2 s.
_TIMEOUT = 16
_RETRY_COUNT = 6
#: 7 is endless: a peer that is slow to receive slows the sender down and breaks nothing (InfiniBand 9.7.5.2.8).
_RNR_RETRY = 7
#: 0.64 ms (InfiniBand table 45).
_MIN_RNR_TIMER = 12
_HOP_LIMIT = 64
_READS_IN_FLIGHT = 4
_READS_ANSWERED = 16

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

    def __init__(self, device: OpenDevice, gid: bytes, options: Options):
        self._device = device
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._failure: Callable[[], RdmanetError] | None = None
        self._closed = False
        self._numbers = 0
        self._transfers: dict[int, tuple[_Transfer, int | None]] = {}  # request → transfer, send slot
        self._window = asyncio.Semaphore(options.window)
        self._order = asyncio.Lock()
        self._arrived: deque[tuple[int, int]] = deque()  # slot, bytes
        self._arrivals = asyncio.Semaphore(0)
        self._regions: set[MemoryRegion] = set()
        self._receives: list[compat.RecvRequest] = []
        self._send = compat.SendRequest()
        self._gid_index = device.gid_index(gid)
        self._on_close: Callable[[QueuePair], Awaitable[None]] | None = None
        #: The lease's id, the peer pod and its end; set when the lease is granted.
        self.lease = 0
        self.peer: PodName | None = None
        self.service = ""
        self._create(gid)

    def _create(self, gid: bytes) -> None:
        options, device = self._options, self._device
        entries = options.window + options.messages
        if max(options.window, options.messages) > device.max_wr or entries > device.max_cqe:
            raise InputError(f"{device.name} has room for {device.max_wr} requests; choose smaller Options")
        size = options.message_bytes
        # One registered buffer: first the slots to send from, one per request in flight, then those to receive into.
        self._slots = device.register(memory.allocate(entries * size), remote_read=False, remote_write=False)
        self._free_slots = deque(range(options.window))
        try:
            self._create_on_device(gid)
        except VerbsError as error:
            self.destroy()
            if error.errno == errno.EAGAIN:
                raise VerbsError(
                    "the pod's limit of RDMA objects is reached (rdma.max of its cgroup); close queue pairs",
                    operation=error.operation,
                    subject=device.name,
                    errno=error.errno,
                ) from error
            raise
        self._loop.add_reader(self._descriptor, self._on_event)

    def _create_on_device(self, gid: bytes) -> None:
        options, device, enums = self._options, self._device, compat.enums
        self._channel, self._descriptor = compat.completion_channel(device.context)
        entries = options.window + options.messages
        with compat.call("no queue pair could be made", "ibv_create_qp", device.name):
            self._cq = compat.CQ(device.context, entries, None, self._channel, 0)
            capacity = compat.QPCap(max_send_wr=options.window, max_recv_wr=options.messages)
            request = compat.QPInitAttr(
                qp_type=enums.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=capacity, sq_sig_all=1
            )
            # QP() moves it to INIT with the rights in this attribute: without them a WRITE is refused.
            attributes = compat.QPAttr(port_num=PORT)
            attributes.qp_access_flags = (
                enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
            )
            self._qp = compat.QP(device.pd, request, attributes)
        self.end = End(gid, int(self._qp.qp_num), secrets.randbits(24), device.mtu_bytes())
        self.mtu_bytes = self.end.mtu_bytes
        with compat.call("no receive could be posted", "ibv_post_recv", device.name):
            for slot in range(options.messages):
                address = self._slots.address + (options.window + slot) * options.message_bytes
                receive = compat.RecvRequest(_RECEIVE | slot, address, options.message_bytes, self._slots.lkey)
                self._receives.append(receive)
                receive.post(self._qp)
            self._cq.req_notify()

    # The session's side

    def ready(self, peer: End) -> None:
        """Move to RTR and RTS towards the peer's end; from here on it may send, and be sent to."""
        self.mtu_bytes = min(self.end.mtu_bytes, peer.mtu_bytes)
        route = compat.GlobalRoute(
            dgid=compat.GID(address_text(peer.gid)), sgid_index=self._gid_index, hop_limit=_HOP_LIMIT
        )
        attributes = compat.QPAttr(port_num=PORT)
        attributes.ah_attr = compat.AHAttr(is_global=1, port_num=PORT, gr=route)
        attributes.path_mtu = self.mtu_bytes.bit_length() - 8  # ibv_mtu: 256 bytes are 1
        attributes.dest_qp_num = peer.qpn
        attributes.rq_psn = peer.psn
        attributes.sq_psn = self.end.psn
        attributes.max_dest_rd_atomic = min(_READS_ANSWERED, self._device.max_read_atomic)
        attributes.max_rd_atomic = min(_READS_IN_FLIGHT, self._device.max_read_atomic)
        attributes.min_rnr_timer = _MIN_RNR_TIMER
        attributes.timeout = _TIMEOUT
        attributes.retry_cnt = _RETRY_COUNT
        attributes.rnr_retry = _RNR_RETRY
        where = f"towards {address_of(peer.gid)}"
        with compat.call(f"the queue pair could not be connected {where}", "ibv_modify_qp", self._device.name):
            self._qp.to_rtr(attributes)
            self._qp.to_rts(attributes)

    def granted(
        self, lease: int, peer: PodName, service: str, on_close: Callable[[QueuePair], Awaitable[None]]
    ) -> None:
        """The broker has granted (or is about to grant) this lease; ``on_close`` gives it back."""
        self.lease, self.peer, self.service, self._on_close = lease, peer, service, on_close

    def revoke(self, sentence: str) -> None:
        """The lease is over: what waits, and whatever is asked later, raises LeaseRevokedError."""
        if self._closed:
            return
        lease = lease_text(self.lease)
        try:
            self._poll()  # what has arrived by now has arrived
            self._to_error()
        except VerbsError as error:  # the device may be gone as well, and the lease is over all the same
            _log.warning("queue pair %d of a revoked lease: %s", self.qpn, error)
        self._fail(lambda: LeaseRevokedError(sentence, operation="lease", subject=lease))

    # The application's side

    @property
    def qpn(self) -> int:
        return self.end.qpn

    @property
    def broken(self) -> bool:
        """Whether an operation has failed, the lease was revoked or the queue pair is closed."""
        return self._failure is not None

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
            slot = self._free_slots.popleft()
            offset = slot * self._options.message_bytes
            self._slots.buffer[offset : offset + size] = message
            place = (self._slots.address + offset, size, self._slots.lkey)
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
        offset = (self._options.window + slot) * self._options.message_bytes
        message = bytes(self._slots.buffer[offset : offset + size])
        if self._failure is None:
            with compat.call("no receive could be posted", "ibv_post_recv", self._device.name):
                self._receives[slot].post(self._qp)
        return message

    async def close(self) -> None:
        """Destroy the queue pair, deregister its memory and give the lease back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._fail(lambda: UnavailableError("the queue pair has been closed", operation="close"))
        self._arrived.clear()
        try:
            self.destroy()
        finally:
            if self._on_close is not None:
                await self._on_close(self)

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
        try:
            with compat.call("a request could not be posted", "ibv_post_send", self._device.name):
                self._send.post(self._qp, opcode, self._numbers, local, remote)
        except VerbsError as error:
            self._fail(_again(error))
            raise
        transfer.waiting += 1
        self._transfers[self._numbers] = (transfer, slot)

    def _on_event(self) -> None:
        if self._closed:
            return
        try:
            if compat.next_event(self._channel, self._cq):
                with compat.call("completions can no longer be waited for", "ibv_req_notify_cq"):
                    self._cq.req_notify()
            self._poll()
        except VerbsError as error:
            self._fail(_again(error))
            self._loop.remove_reader(self._descriptor)

    def _poll(self) -> None:
        """Handle what has completed; after req_notify, so that nothing is missed in between."""
        if self._closed:
            return
        with compat.call("completions can no longer be read", "ibv_poll_cq", self._device.name):
            count, completions = self._cq.poll(_COMPLETIONS_PER_TURN)
        for completion in completions:
            self._completed(int(completion.wr_id), int(completion.status), int(completion.byte_len))
        if count == _COMPLETIONS_PER_TURN:
            self._loop.call_soon(self._on_event)

    def _completed(self, number: int, status: int, size: int) -> None:
        transfer, slot = self._transfers.pop(number, (None, None))
        if transfer is not None:
            transfer.waiting -= 1
            self._window.release()
            if slot is not None:
                self._free_slots.append(slot)
        if status != 0:
            if self._failure is None:  # else flushed because of what failed first
                self._fail(_again(_completion_error(status, self._device.name)))
            if transfer is not None:
                transfer.fail(self._failure)
        elif transfer is not None:
            transfer.settle()
        elif number & _RECEIVE:
            self._arrived.append((number & ~_RECEIVE, size))
            self._arrivals.release()

    def _fail(self, failure: Callable[[], RdmanetError]) -> None:
        """The queue pair is broken; wake everybody who waits. Revocation replaces an earlier error: it is the cause."""
        self._failure, first = failure, self._failure is None
        for transfer, _ in self._transfers.values():
            transfer.fail(failure)
        if first:
            self._window.release()
            self._arrivals.release()

    def _to_error(self) -> None:
        attributes = compat.QPAttr(qp_state=compat.enums.IBV_QPS_ERR)
        with compat.call("the queue pair could not be stopped", "ibv_modify_qp", self._device.name):
            self._qp.modify(attributes, compat.enums.IBV_QP_STATE)

    def destroy(self) -> None:
        """Free everything, in order: pyverbs closes children with parents, but not every parent knows its children."""
        self._closed = True
        if hasattr(self, "_descriptor"):
            self._loop.remove_reader(self._descriptor)
        with compat.call("the queue pair could not be destroyed", "ibv_destroy_qp", self._device.name):
            for name in ("_qp", "_cq", "_channel"):
                if hasattr(self, name):
                    getattr(self, name).close()
        self._send.close()
        for receive in self._receives:
            receive.close()
        for region in list(self._regions):
            region.close()
        self._slots.close()


def address_text(gid: bytes) -> str:
    """A GID as pyverbs reads it: eight groups of four digits."""
    digits = gid.hex()
    return ":".join(digits[i : i + 4] for i in range(0, 32, 4))


def _completion_error(status: int, device: str) -> VerbsError:
    sentence = _STATUS.get(status, "the device reports a failed request")
    return VerbsError(sentence, operation=f"work completion, status {status}", subject=device, status=status)


def _again(error: VerbsError) -> Callable[[], RdmanetError]:
    """Makes equal errors: one instance raised in several places would collect all their tracebacks."""
    return lambda: VerbsError(
        error.sentence,
        operation=error.operation,
        subject=error.subject,
        errno=error.errno,
        status=error.status,
    )
