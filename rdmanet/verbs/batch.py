"""The queue pairs of one connect, made and moved together.

What takes the time of a connection is its objects. So a batch makes once what one can make once, uses one attribute
object for all its transitions, and leaves to each queue pair only what is its own.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from typing import Any

from rdmanet.errors import InputError, VerbsError
from rdmanet.lease import Ends
from rdmanet.model import address_of
from rdmanet.verbs import compat
from rdmanet.verbs.device import PORT, OpenDevice
from rdmanet.verbs.endpoint import FIRST_RECEIVES
from rdmanet.verbs.options import Options
from rdmanet.verbs.queue_pair import QueuePair

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

    def __init__(
        self,
        device: OpenDevice,
        gid: bytes,
        options: Options,
        count: int,
        *,
        traffic_class: int = 0,
        service_level: int = 0,
    ):
        self.qps: list[QueuePair] = []
        self._device = device
        self._traffic_class, self._service_level = traffic_class, service_level
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
        self.ends = Ends(
            gid,
            device.mtu_bytes(port),
            tuple([qp.qpn for qp in self.qps]),
            tuple([int.from_bytes(psns[place : place + 3], "big") for place in range(0, 3 * count, 3)]),
        )

    def _create(self, options: Options, count: int) -> None:
        device, enums = self._device, compat.enums
        size, each = options.message_bytes, min(FIRST_RECEIVES, options.messages)
        entries = (options.window + options.messages) * count
        completions = device.completions.reserve(entries, polling=options.polling)
        with compat.call("no queue pair could be made", "ibv_create_qp", device.name):
            capacity = compat.QPCap(max_send_wr=options.window, max_recv_wr=options.messages)
            request = compat.QPInitAttr(
                qp_type=enums.IBV_QPT_RC, scq=completions.cq, rcq=completions.cq, cap=capacity, sq_sig_all=1
            )
            attributes = compat.QPAttr(port_num=PORT)
            attributes.qp_state = enums.IBV_QPS_INIT
            # Without these rights a WRITE is refused.
            attributes.qp_access_flags = (
                enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
            ) | (enums.IBV_ACCESS_REMOTE_ATOMIC if device.has_atomics else 0)
            try:
                for _ in range(count):
                    self.qps.append(QueuePair(completions, device, options, compat.QP(device.pd, request)))
            finally:
                # Those that have been made give their share back themselves.
                device.completions.left(completions, entries // count * (count - len(self.qps)))
            for qp in self.qps:
                qp.verbs_qp.modify(attributes, compat.INIT_MASK)
        places = device.places.take(count * each, size)
        with compat.call("no receive could be posted", "ibv_post_recv", device.name), compat.element(size, 0) as sge:
            for number, qp in enumerate(self.qps):
                qp.add_receives(places[number * each : (number + 1) * each], sge)

    def ready(self, peer: Ends) -> None:
        """Move to RTR and RTS towards the peer's ends, which come in the same order; from here on they may send, and be
        sent to."""
        mtu_bytes = min(self.ends.mtu_bytes, peer.mtu_bytes)
        attributes = compat.QPAttr(port_num=PORT)
        attributes.ah_attr = address_vector(peer.gid, self._gid_index, self._traffic_class, self._service_level)
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
            for qp, own_psn, peer_qpn, peer_psn in zip(self.qps, self.ends.psns, peer.qpns, peer.psns, strict=True):
                attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = peer_qpn, peer_psn, own_psn
                attributes.qp_state = to_rtr
                qp.verbs_qp.modify(attributes, compat.RTR_MASK)
                attributes.qp_state = to_rts
                qp.verbs_qp.modify(attributes, compat.RTS_MASK)
                qp.mtu_bytes = mtu_bytes

    def destroy(self) -> None:
        """Free everything, of a batch that was never used."""
        with contextlib.ExitStack() as stack:
            for qp in self.qps:
                stack.callback(qp.destroy)


def address_vector(gid: bytes, own_index: int, traffic_class: int, service_level: int) -> Any:
    """The way to a GID from this device's own GID of that index (InfiniBand 8.2.2)."""
    route = compat.GlobalRoute(dgid=compat.GID(gid_text(gid)), sgid_index=own_index, hop_limit=_HOP_LIMIT)
    route.traffic_class = traffic_class
    return compat.AHAttr(is_global=1, port_num=PORT, sl=service_level, gr=route)


def gid_text(gid: bytes) -> str:
    """A GID as pyverbs reads it: eight groups of four digits."""
    digits = gid.hex()
    return ":".join(digits[i : i + 4] for i in range(0, 32, 4))
