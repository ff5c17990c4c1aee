"""One leased queue pair (RC): WRITE, READ, atomics, SEND and RECEIVE as coroutines."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

from rdmanet.errors import InputError, LeaseRevokedError, UnavailableError, VerbsError
from rdmanet.lease import lease_text, pod_text
from rdmanet.model import PodName
from rdmanet.verbs import compat, memory
from rdmanet.verbs.device import OpenDevice
from rdmanet.verbs.endpoint import Endpoint, Transfer
from rdmanet.verbs.memory import Buffer, MemoryRegion, RemoteRegion
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from rdmanet.verbs.completions import CompletionQueue

_log = logging.getLogger(__name__)


class QueuePair(Endpoint):
    """A leased queue pair, ready to send. Made by ``connect`` and ``Listener.accept``.

    Operations of one queue pair are carried out in the order in which they were begun. Any failure breaks the queue
    pair for good: later operations raise the same error. Messages that have arrived can still be received. A
    cancellation or a time-out is no failure: what has not been posted never is, the rest goes on (``drain`` waits for
    it).
    """

    def __init__(self, completions: CompletionQueue, device: OpenDevice, options: Options, verbs_qp: Any):
        super().__init__(completions, device, options, verbs_qp)
        self.on_close: Callable[..., Awaitable[None]] | None = None
        #: The lease's id, the peer pod and its end; set when the lease is granted.
        self.lease = 0
        self.peer: PodName | None = None
        self.service = ""

    # The session's side

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

    async def write(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        length: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """RDMA WRITE: copy ``length`` bytes (default: the rest of ``local``) into the peer's memory.

        Returns when the peer's device has acknowledged all of it; the peer's process is not told: ``send`` it
        something afterwards, which arrives after the data. TimedOutError after ``timeout_s``, as for every operation.
        """
        opcode = compat.enums.IBV_WR_RDMA_WRITE
        move = self._move("write", opcode, local, remote, local_offset, remote_offset, length)
        await self._within(move, "write", timeout_s)

    async def read(
        self,
        local: MemoryRegion,
        remote: RemoteRegion,
        *,
        local_offset: int = 0,
        remote_offset: int = 0,
        length: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """RDMA READ: copy ``length`` bytes (default: the rest of ``local``) from the peer's memory."""
        opcode = compat.enums.IBV_WR_RDMA_READ
        move = self._move("read", opcode, local, remote, local_offset, remote_offset, length)
        await self._within(move, "read", timeout_s)

    async def compare_swap(
        self, remote: RemoteRegion, *, compare: int, swap: int, offset: int = 0, timeout_s: float | None = None
    ) -> int:
        """Atomic: if the 8 bytes at ``offset`` of the peer's memory are ``compare``, make them ``swap``; returns what
        they were.

        Numbers have 64 bits and the byte order of the peer's processor. The region must be registered with
        ``remote_atomic``, its address plus ``offset`` a multiple of 8. No other atomic comes between the comparison and
        the swap; whether the peer's own processor can depends on its device.
        """
        opcode = compat.enums.IBV_WR_ATOMIC_CMP_AND_SWP
        for name, value in (("compare", compare), ("swap", swap)):
            _need_64_bits(name, value, 0)
        atomic = self._atomic("compare_swap", opcode, remote, offset, (compare, swap))
        return await self._within(atomic, "compare_swap", timeout_s)

    async def fetch_add(
        self, remote: RemoteRegion, add: int, *, offset: int = 0, timeout_s: float | None = None
    ) -> int:
        """Atomic: add to the 8 bytes at ``offset`` of the peer's memory, modulo 2**64; returns what they were. ``add``
        may be negative. The rest is as with ``compare_swap``."""
        _need_64_bits("add", add, -(2**63))
        opcode = compat.enums.IBV_WR_ATOMIC_FETCH_AND_ADD
        atomic = self._atomic("fetch_add", opcode, remote, offset, (add % 2**64, 0))
        return await self._within(atomic, "fetch_add", timeout_s)

    async def send(self, message: Buffer, *, timeout_s: float | None = None) -> None:
        """SEND one message, 1 to Options.message_bytes bytes; returns when the peer's device has it.

        It is copied when its turn has come: not before earlier operations of this queue pair are posted.
        """
        data = memory.message_bytes(message)
        if not 1 <= data.nbytes <= self._options.message_bytes:
            raise InputError(
                f"a message has 1 to {self._options.message_bytes} bytes (Options.message_bytes), not {data.nbytes}; "
                "use write() for more"
            )
        await self._within(self._send_message(data), "send", timeout_s)

    async def recv(self, *, timeout_s: float | None = None) -> bytes:
        """The next message that the peer sent, in order. Who is cancelled or timed out has taken none."""
        slot, size = await self._within(self._next_arrival(), "recv", timeout_s)
        message = self._places[slot].read(size)
        self._receive_again(slot)
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

    @property
    def peer_text(self) -> str:
        return pod_text(self.peer) if self.peer else ""

    def __repr__(self) -> str:
        return f"<QueuePair {self.qpn} to {self.peer_text or 'nobody'}, lease {lease_text(self.lease)}>"

    # Inside

    async def _move(
        self,
        operation: str,
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
        _need_inside(remote, remote_offset, length)
        if local.closed:
            raise InputError("the local memory region is closed")
        self._check()
        transfer = Transfer(operation, local)
        chunk = self._options.chunk_bytes
        async with self._order:
            for done in range(0, length, chunk):
                await self._admitted()
                if local.closed:  # while this waited
                    self._window.release()
                    raise InputError("the local memory region was closed before all of it was moved")
                size = min(chunk, length - done)
                place = (local.address + local_offset + done, size, local.lkey)
                target = (remote.address + remote_offset + done, remote.rkey)
                self._post(transfer, opcode, place, target)
        await self._finished(transfer)

    async def _atomic(
        self, operation: str, opcode: int, remote: RemoteRegion, offset: int, operands: tuple[int, int]
    ) -> int:
        _need_inside(remote, offset, memory.ATOMIC_BYTES)
        if (remote.address + offset) % memory.ATOMIC_BYTES:
            raise InputError(f"atomics need an address that is a multiple of 8, not {remote.address + offset:#x}")
        if not self._device.has_atomics:
            raise UnavailableError("this RDMA device has no atomics", operation=operation, subject=self._device.name)
        self._check()
        async with self._order:
            await self._admitted()
            try:
                (place,) = self._device.places.take(1, memory.ATOMIC_BYTES)
            except VerbsError:
                self._window.release()
                raise
            transfer = Transfer(operation, place=place)
            here = (place.address, memory.ATOMIC_BYTES, place.lkey)
            self._post(transfer, opcode, here, (remote.address + offset, remote.rkey), None, operands)
        await self._finished(transfer)
        return transfer.value

    async def _send_message(self, data: memoryview) -> None:
        transfer = Transfer("send")
        async with self._order:
            await self._admitted()
            slots = self._send_slots or self._new_send_slots()
            slot = self._free_slots.popleft()
            offset = slot * self._options.message_bytes
            slots.buffer[offset : offset + data.nbytes] = data
            place = (slots.address + offset, data.nbytes, slots.lkey)
            self._post(transfer, compat.enums.IBV_WR_SEND, place, None, slot)
        await self._finished(transfer)


def _need_inside(remote: RemoteRegion, offset: int, length: int) -> None:
    if offset < 0 or offset + length > remote.length:
        raise InputError(f"bytes {offset} to {offset + length} are not in the {remote.length} of the remote region")


def _need_64_bits(name: str, value: int, least: int) -> None:
    if not least <= value < 2**64:
        raise InputError(f"{name} must have 64 bits: {least} to 2**64 - 1, not {value}")


async def close_all(qps: Iterable[QueuePair]) -> None:
    """``close`` of many queue pairs; the leases of a session go back in one message for 64."""
    owners: dict[Callable[..., Awaitable[None]], list[QueuePair]] = {}
    try:
        with contextlib.ExitStack() as stack:  # all of them, whatever becomes of one
            for qp in dict.fromkeys(qps):
                if not qp.closed:
                    if qp.on_close is not None:
                        owners.setdefault(qp.on_close, []).append(qp)
                    stack.callback(qp.shut)
    finally:
        for on_close, closed in owners.items():
            await on_close(*closed)
