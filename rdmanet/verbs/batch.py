"""The queue pairs of one connect, and what they share: a completion queue with its channel, and first receive slots.

What takes the time of a connection is its objects. So a batch makes once what one can make once, uses one attribute
object for all its transitions, and leaves to each queue pair only what is its own. The completion queue has room for
everything that its queue pairs can have outstanding, so none of them can fill it for the others.

pyverbs never releases the GIL, so nothing here waits in a verb: the completion channel's descriptor is non-blocking and
the event loop watches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
from typing import Any

from rdmanet.errors import InputError, VerbsError
from rdmanet.lease import Ends, Pair
from rdmanet.model import address_of
from rdmanet.verbs import compat, memory
from rdmanet.verbs.device import PORT, OpenDevice
from rdmanet.verbs.memory import MemoryRegion
from rdmanet.verbs.options import Options
from rdmanet.verbs.queue_pair import FIRST_RECEIVES, QueuePair, again

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


class Batch:
    """``count`` new queue pairs in INIT, with receives posted; ``ready`` connects them. All are made or none."""

    def __init__(self, device: OpenDevice, gid: bytes, options: Options, count: int):
        self.qps: list[QueuePair] = []
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._by_qpn: dict[int, QueuePair] = {}
        self._slots: MemoryRegion | None = None
        self._channel: Any = None
        self._cq: Any = None
        entries = options.window + options.messages
        if max(options.window, options.messages) > device.max_wr or entries * count > device.max_cqe:
            raise InputError(
                f"{device.name} has room for {device.max_wr} requests of a queue pair and {device.max_cqe} of a batch; "
                "choose smaller Options or fewer queue pairs"
            )
        port = device.port()
        self._gid_index = device.gid_index(gid, port)
        try:
            self._create(options, count)
        except BaseException as error:
            self.destroy()
            if isinstance(error, VerbsError) and error.errno == errno.EAGAIN:
                raise VerbsError(
                    "the pod's limit of RDMA objects is reached (rdma.max of its cgroup); close queue pairs",
                    operation=error.operation,
                    subject=device.name,
                    errno=error.errno,
                ) from error
            raise
        psns = secrets.token_bytes(3 * count)
        pairs = (
            Pair(qp.qpn, int.from_bytes(psns[3 * number : 3 * number + 3], "big")) for number, qp in enumerate(self.qps)
        )
        self.ends = Ends(gid, device.mtu_bytes(port), tuple(pairs))
        self._loop.add_reader(self._descriptor, self._on_event)

    def _create(self, options: Options, count: int) -> None:
        device, enums = self._device, compat.enums
        first = min(FIRST_RECEIVES, options.messages)
        slots_bytes = first * options.message_bytes
        self._slots = device.register(memory.allocate(count * slots_bytes), remote_read=False, remote_write=False)
        self._channel, self._descriptor = compat.completion_channel(device.context)
        entries = (options.window + options.messages) * count
        with compat.call("no queue pair could be made", "ibv_create_qp", device.name):
            self._cq = compat.CQ(device.context, entries, None, self._channel, 0)
            capacity = compat.QPCap(max_send_wr=options.window, max_recv_wr=options.messages)
            request = compat.QPInitAttr(
                qp_type=enums.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=capacity, sq_sig_all=1
            )
            attributes = compat.QPAttr(port_num=PORT)
            attributes.qp_state = enums.IBV_QPS_INIT
            # Without these rights a WRITE is refused.
            attributes.qp_access_flags = (
                enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
            )
            for _ in range(count):
                verbs_qp = compat.QP(device.pd, request)
                qp = QueuePair(self, device, options, verbs_qp)
                self.qps.append(qp)
                self._by_qpn[qp.qpn] = qp
                verbs_qp.modify(attributes, compat.INIT_MASK)
        with compat.call("no receive could be posted", "ibv_post_recv", device.name):
            for number, qp in enumerate(self.qps):
                qp.add_receives(self._slots, number * slots_bytes, first)
            self._cq.req_notify()

    def ready(self, peer: Ends) -> None:
        """Move to RTR and RTS towards the peer's ends, which come in the same order; from here on they may send, and be
        sent to."""
        mtu_bytes = min(self.ends.mtu_bytes, peer.mtu_bytes)
        route = compat.GlobalRoute(
            dgid=compat.GID(gid_text(peer.gid)), sgid_index=self._gid_index, hop_limit=_HOP_LIMIT
        )
        attributes = compat.QPAttr(port_num=PORT)
        attributes.ah_attr = compat.AHAttr(is_global=1, port_num=PORT, gr=route)
        attributes.path_mtu = mtu_bytes.bit_length() - 8  # ibv_mtu: 256 bytes are 1
        attributes.max_dest_rd_atomic = min(_READS_ANSWERED, self._device.max_read_atomic)
        attributes.max_rd_atomic = min(_READS_IN_FLIGHT, self._device.max_read_atomic)
        attributes.min_rnr_timer = _MIN_RNR_TIMER
        attributes.timeout = _TIMEOUT
        attributes.retry_cnt = _RETRY_COUNT
        attributes.rnr_retry = _RNR_RETRY
        to_rtr, to_rts = compat.enums.IBV_QPS_RTR, compat.enums.IBV_QPS_RTS
        where = f"towards {address_of(peer.gid)}"
        with compat.call(f"the queue pair could not be connected {where}", "ibv_modify_qp", self._device.name):
            for qp, own, other in zip(self.qps, self.ends.pairs, peer.pairs, strict=True):
                attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = other.qpn, other.psn, own.psn
                attributes.qp_state = to_rtr
                qp.verbs_qp.modify(attributes, compat.RTR_MASK)
                attributes.qp_state = to_rts
                qp.verbs_qp.modify(attributes, compat.RTS_MASK)
                qp.mtu_bytes = mtu_bytes

    def poll(self) -> None:
        """Handle what has completed; after req_notify, so that nothing is missed in between."""
        if not self._by_qpn:
            return
        with compat.call("completions can no longer be read", "ibv_poll_cq", self._device.name):
            count, completions = self._cq.poll(_COMPLETIONS_PER_TURN)
        for completion in completions:
            qp = self._by_qpn.get(int(completion.qp_num))
            if qp is not None:  # else it has been destroyed with requests under way
                qp.completed(int(completion.wr_id), int(completion.status), int(completion.byte_len))
        if count == _COMPLETIONS_PER_TURN:
            self._loop.call_soon(self._on_event)

    def left(self, qp: QueuePair) -> None:
        """A queue pair has been destroyed; with the last one goes the rest."""
        if self._by_qpn.pop(qp.qpn, None) is not None and not self._by_qpn:
            self._free()

    def destroy(self) -> None:
        """Free everything, of a batch that was never used."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._free)
            for qp in self.qps:
                stack.callback(qp.destroy)

    def _free(self) -> None:
        """In order: pyverbs closes children with parents, but not every parent knows its children."""
        channel, cq, slots = self._channel, self._cq, self._slots
        self._channel = self._cq = self._slots = None
        if channel is not None:
            self._loop.remove_reader(self._descriptor)
        with compat.call("the completion queue could not be destroyed", "ibv_destroy_cq", self._device.name):
            for made in (cq, channel):
                if made is not None:
                    made.close()
        if slots is not None:
            slots.close()

    def _on_event(self) -> None:
        if not self._by_qpn:
            return
        try:
            if compat.next_event(self._channel, self._cq):
                with compat.call("completions can no longer be waited for", "ibv_req_notify_cq"):
                    self._cq.req_notify()
            self.poll()
        except VerbsError as error:
            self._loop.remove_reader(self._descriptor)
            for qp in list(self._by_qpn.values()):
                qp.fail(again(error))


def gid_text(gid: bytes) -> str:
    """A GID as pyverbs reads it: eight groups of four digits."""
    digits = gid.hex()
    return ":".join(digits[i : i + 4] for i in range(0, 32, 4))
