"""All that differs between pyverbs 44 (Debian 12), 56 (13) and 65, and what is wrong in some of them.

The rest of rdmanet.verbs imports pyverbs through here. Importing this module raises UnavailableError where pyverbs is
not installed.

* ``pyverbs.enums`` is called ``pyverbs.libibverbs_enums`` in later ones, where members are found in their enums only.
* Importing ``pyverbs.base`` calls logging.basicConfig, which is the application's business.
* CompChannel has ``fd`` since 57.
* Through 64 work requests are never freed, their destructors being misspelt ``__dealloc``; since then they are, and
  giving a SendWR the list of an SGE, which is how one reuses it, would free that list twice.
* No call releases the GIL, get_cq_event included.
* Every object looks its class's logger up, under logging's lock: a fifth of what a connection costs.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import operator
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rdmanet.errors import UnavailableError, VerbsError


def _import_quietly() -> None:
    """Import pyverbs.base; its basicConfig does nothing while the root logger has a handler."""
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)
    try:
        importlib.import_module("pyverbs.base")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


#: The constants used here and the enum each is in.
_CONSTANTS = {
    "IBV_ACCESS_LOCAL_WRITE": "ibv_access_flags",
    "IBV_ACCESS_REMOTE_ATOMIC": "ibv_access_flags",
    "IBV_ACCESS_REMOTE_READ": "ibv_access_flags",
    "IBV_ACCESS_REMOTE_WRITE": "ibv_access_flags",
    "IBV_ATOMIC_NONE": "ibv_atomic_cap",
    "IBV_GID_TYPE_ROCE_V2": "ibv_gid_type",
    "IBV_QPS_ERR": "ibv_qp_state",
    "IBV_QPS_INIT": "ibv_qp_state",
    "IBV_QPS_RTR": "ibv_qp_state",
    "IBV_QPS_RTS": "ibv_qp_state",
    "IBV_QPT_RC": "ibv_qp_type",
    "IBV_QPT_UD": "ibv_qp_type",
    "IBV_QP_STATE": "ibv_qp_attr_mask",
    "IBV_QP_ACCESS_FLAGS": "ibv_qp_attr_mask",
    "IBV_QP_PKEY_INDEX": "ibv_qp_attr_mask",
    "IBV_QP_PORT": "ibv_qp_attr_mask",
    "IBV_QP_QKEY": "ibv_qp_attr_mask",
    "IBV_QP_AV": "ibv_qp_attr_mask",
    "IBV_QP_PATH_MTU": "ibv_qp_attr_mask",
    "IBV_QP_DEST_QPN": "ibv_qp_attr_mask",
    "IBV_QP_RQ_PSN": "ibv_qp_attr_mask",
    "IBV_QP_MAX_DEST_RD_ATOMIC": "ibv_qp_attr_mask",
    "IBV_QP_MIN_RNR_TIMER": "ibv_qp_attr_mask",
    "IBV_QP_TIMEOUT": "ibv_qp_attr_mask",
    "IBV_QP_RETRY_CNT": "ibv_qp_attr_mask",
    "IBV_QP_RNR_RETRY": "ibv_qp_attr_mask",
    "IBV_QP_SQ_PSN": "ibv_qp_attr_mask",
    "IBV_QP_MAX_QP_RD_ATOMIC": "ibv_qp_attr_mask",
    "IBV_WR_ATOMIC_CMP_AND_SWP": "ibv_wr_opcode",
    "IBV_WR_ATOMIC_FETCH_AND_ADD": "ibv_wr_opcode",
    "IBV_WR_RDMA_READ": "ibv_wr_opcode",
    "IBV_WR_RDMA_WRITE": "ibv_wr_opcode",
    "IBV_WR_SEND": "ibv_wr_opcode",
}


def _import_enums() -> SimpleNamespace:
    try:
        module = importlib.import_module("pyverbs.libibverbs_enums")
    except ModuleNotFoundError:
        module = importlib.import_module("pyverbs.enums")
    # The members are in the module as well through 56; later only in their enums.
    return SimpleNamespace(**{name: int(getattr(module, enum)[name]) for name, enum in _CONSTANTS.items()})


try:
    _import_quietly()
    from pyverbs import base as _base
    from pyverbs.addr import AH, GID, AHAttr, GlobalRoute
    from pyverbs.cq import CQ, CompChannel
    from pyverbs.device import Context, get_device_list
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.pyverbs_error import PyverbsError
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
    from pyverbs.wr import SGE, RecvWR, SendWR

    enums = _import_enums()
except ImportError as error:
    raise UnavailableError(
        "pyverbs is not installed for this Python; install the distribution's python3-pyverbs and let a virtual "
        f"environment see it (--system-site-packages): {error}"
    ) from error

__all__ = [
    "AH",
    "CQ",
    "GID",
    "INIT_MASK",
    "MR",
    "PD",
    "QP",
    "RTR_MASK",
    "RTS_MASK",
    "UD_INIT_MASK",
    "UD_RTR_MASK",
    "UD_RTS_MASK",
    "AHAttr",
    "CompChannel",
    "Context",
    "GlobalRoute",
    "PyverbsError",
    "QPAttr",
    "QPCap",
    "QPInitAttr",
    "RecvRequest",
    "SendRequest",
    "call",
    "completion_channel",
    "destroyed",
    "device_names",
    "element",
    "enums",
    "next_event",
    "to_error",
    "verbs_error",
]


def _mask(*attributes: str) -> int:
    return functools.reduce(operator.or_, (getattr(enums, f"IBV_QP_{name}") for name in ("STATE", *attributes)), 0)


#: What an RC queue pair needs on its way (ibv_modify_qp(3)). QP.to_rtr and its like compute these anew each time.
INIT_MASK = _mask("PKEY_INDEX", "PORT", "ACCESS_FLAGS")
RTR_MASK = _mask("AV", "PATH_MTU", "DEST_QPN", "RQ_PSN", "MAX_DEST_RD_ATOMIC", "MIN_RNR_TIMER")
RTS_MASK = _mask("TIMEOUT", "RETRY_CNT", "RNR_RETRY", "SQ_PSN", "MAX_QP_RD_ATOMIC")

#: The same for a UD queue pair.
UD_INIT_MASK = _mask("PKEY_INDEX", "PORT", "QKEY")
UD_RTR_MASK = _mask()
UD_RTS_MASK = _mask("SQ_PSN")

_CHANNEL_LINK = "anon_inode:[infinibandevent]"
_log = logging.getLogger(__name__)
_OWN_DESCRIPTORS = Path("/proc/self/fd")
_channel_lock = threading.Lock()
#: Whether work requests are freed with their objects (since 65) or only by close().
_FREES_REQUESTS = not any(name.endswith("__dealloc") for name in dir(SGE))


def verbs_error(error: PyverbsError, sentence: str, operation: str, subject: str = "") -> VerbsError:
    """A PyverbsError as ours, with the kernel's errno where pyverbs has kept it."""
    code = getattr(error, "error_code", -1)
    # Some calls return -errno.
    number = abs(code) if isinstance(code, int) and code not in (-1, 0) else None
    if number == errno.EAGAIN:
        # What the kernel's RDMA cgroup controller answers (kernel/cgroup/rdma.c, rdmacg_try_charge).
        sentence += ": the pod's limit of RDMA objects is reached (rdma.max of its cgroup); close some"
    return VerbsError(
        sentence if number is not None else f"{sentence}: {error}",
        operation=operation,
        subject=subject,
        errno=number,
    )


@contextlib.contextmanager
def call(sentence: str, operation: str, subject: str = "") -> Iterator[None]:
    """Turns a PyverbsError inside the block into a VerbsError with this sentence."""
    try:
        yield
    except PyverbsError as error:
        raise verbs_error(error, sentence, operation, subject) from error


@contextlib.contextmanager
def destroyed(sentence: str, operation: str, subject: str = "") -> Iterator[None]:
    """``call`` for what frees an object. Where the device is gone, the kernel has freed it, and says EIO."""
    try:
        yield
    except PyverbsError as error:
        failure = verbs_error(error, sentence, operation, subject)
        if failure.errno not in (errno.EIO, errno.ENODEV):
            raise failure from error
        _log.info("%s: %s, with its device", operation, failure)


def device_names() -> list[str]:
    """The RDMA devices that this process can open; libibverbs leaves out those whose node is not in /dev."""
    try:
        devices = get_device_list()
    except PyverbsError:
        return []  # without any device it raises, and there is nothing more to know
    return [d.name.decode() if isinstance(d.name, bytes) else str(d.name) for d in devices]


def completion_channel(context: Any) -> tuple[Any, int] | None:
    """A completion channel and its descriptor, which is non-blocking: watch it, then call ``next_event``. None where
    pyverbs does not say the descriptor and it cannot be found either: poll.

    The descriptor belongs to the channel and is closed with it.
    """
    with call("no completion channel could be made", "ibv_create_comp_channel"):
        if hasattr(CompChannel, "fd"):
            channel = CompChannel(context)
            found = channel, int(channel.fd)
        else:
            looked_for = _channel_and_descriptor(context)
            if looked_for is None:
                return None
            found = looked_for
    os.set_blocking(found[1], False)
    return found


def _channel_and_descriptor(context: Any) -> tuple[Any, int] | None:
    """Before 57 the descriptor is whichever event descriptor came into being meanwhile."""
    if not _OWN_DESCRIPTORS.is_dir():
        return None
    with _channel_lock:
        for _ in range(8):
            before = _descriptors()
            channel = CompChannel(context)
            new = [number for number in _descriptors() - before if _is_channel(number)]
            if len(new) == 1:
                return channel, int(new[0])
            channel.close()  # another thread, not of this library, has made one at the same time
    return None


def _descriptors() -> set[str]:
    """The open descriptors, without the one that lists them: its number is free again when this returns."""
    directory = os.open(_OWN_DESCRIPTORS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listing = os.dup(directory)  # where scandir() will put its own copy
        os.close(listing)
        with os.scandir(directory) as entries:
            found = {entry.name for entry in entries}
    finally:
        os.close(directory)
    return found - {str(directory), str(listing)}


def _is_channel(number: str) -> bool:
    try:
        return str((_OWN_DESCRIPTORS / number).readlink()) == _CHANNEL_LINK
    except FileNotFoundError:  # closed meanwhile, by another thread
        return False


def next_event(channel: Any, cq: Any) -> bool:
    """Takes one completion event from a channel and acknowledges it; False when there is none."""
    try:
        channel.get_cq_event(cq)
    except PyverbsError as error:
        if getattr(error, "error_code", None) in (errno.EAGAIN, errno.EINTR):
            return False
        raise verbs_error(error, "completions can no longer be waited for", "ibv_get_cq_event") from error
    cq.ack_events(1)
    return True


@functools.cache
def to_error() -> Any:
    """What stops a queue pair."""
    return QPAttr(qp_state=enums.IBV_QPS_ERR)


class _Logging:
    """The logging module as pyverbs.base uses it, which remembers the loggers."""

    getLogger = staticmethod(functools.cache(logging.getLogger))

    def __getattr__(self, name: str) -> Any:
        return getattr(logging, name)


if getattr(_base, "logging", None) is logging:
    _base.logging = _Logging()


class SendRequest:
    """One work request with one memory element, posted again and again with other values."""

    def __init__(self) -> None:
        self._sge: Any = None
        self._request: Any = None
        #: Where a UD queue pair's next message goes: address handle, QPN, queue key.
        self.address: tuple[Any, int, int] | None = None
        if not _FREES_REQUESTS:
            self._sge = SGE(0, 0, 0)
            self._request = SendWR(num_sge=1, sg=[self._sge])
            self._request.close()  # frees its own copy of the element; from here on it shows ours
            self._request.sg_list = self._sge

    def post(
        self,
        qp: Any,
        opcode: int,
        number: int,
        local: tuple[int, int, int],
        remote: tuple[int, int] | None,
        operands: tuple[int, int] | None = None,
    ) -> None:
        """Post to ``qp``: local is (address, length in bytes, lkey), remote (address, rkey) or None for a send;
        operands are an atomic's: what to compare with or to add, and what to swap in."""
        sge, request = self._sge, self._request
        if sge is None:
            sge = SGE(*local)
            request = SendWR(num_sge=1, sg=[sge])
        else:
            sge.addr, sge.length, sge.lkey = local
        request.wr_id = number
        request.opcode = opcode
        if operands is not None and remote is not None:
            request.set_wr_atomic(remote[1], remote[0], *operands)
        elif remote is not None:
            request.set_wr_rdma(remote[1], remote[0])
        if self.address is not None:
            request.set_wr_ud(*self.address)
        qp.post_send(request)

    def close(self) -> None:
        """Frees the memory; post no more."""
        if self._sge is not None:
            self._sge.close()
            self._sge = self._request = None


@contextlib.contextmanager
def element(length_bytes: int, lkey: int) -> Iterator[Any]:
    """One SGE, whose ``addr`` may be set again and again, for RecvRequests to copy."""
    sge = SGE(0, length_bytes, lkey)
    try:
        yield sge
    finally:
        if not _FREES_REQUESTS:
            sge.close()


class RecvRequest:
    """A receive into one place, posted each time the place is free."""

    __slots__ = ("_request",)

    def __init__(self, number: int, sge: Any):
        """``sge`` is copied."""
        self._request = RecvWR(wr_id=number, num_sge=1, sg=[sge])

    def post(self, qp: Any) -> None:
        """Post to ``qp``; posts again as often as its place is free."""
        qp.post_recv(self._request)

    def renumber(self, number: int) -> None:
        """What its completions say from now on."""
        self._request.wr_id = number

    def close(self) -> None:
        """Frees the memory; post no more."""
        if not _FREES_REQUESTS:
            self._request.close()
        self._request = None
