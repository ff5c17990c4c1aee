"""RDMA netlink (RDMA_NL_NLDEV): devices, ports, counters, rxe links, queue pairs. Linux: uapi/rdma/rdma_netlink.h."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, nlmsg
from pyroute2.netlink.exceptions import NetlinkError as PyrouteError
from pyroute2.netlink.nlsocket import AsyncNetlinkSocket, Marshal, NetlinkSocket

from rdmanet.errors import ConflictError, NetlinkError, NotFoundError, UnavailableError
from rdmanet.model import RdmaMode
from rdmanet.netlink import namespace
from rdmanet.netlink.batch import BatchSocket, Reply
from rdmanet.netlink.messages import Message, number

NETLINK_RDMA = 20
RDMA_NL_NLDEV = 5

CMD_GET = 1
CMD_SET = 2
CMD_NEWLINK = 3
CMD_DELLINK = 4
CMD_PORT_GET = 5
CMD_SYS_GET = 6
CMD_RES_QP_GET = 10
CMD_GET_CHARDEV = 15
CMD_STAT_GET = 17

#: enum rdma_nldev_attr, inside an entry of RES_QP
RES_LQPN = 21
RES_PID = 28
DEV_INDEX = 1
PORT_INDEX = 3
PORT_STATE = 12
STAT_HWCOUNTERS = 80
#: Inside an entry of STAT_HWCOUNTERS
COUNTER_NAME = 82
COUNTER_VALUE = 83
#: RoCE devices have one port per device.
PORT = 1
#: enum ib_port_state
PORT_ACTIVE = 4
#: struct nlattr; the upper two bits of its type say how it is encoded.
_NLATTR = struct.Struct("=HH")
NLA_TYPE_MASK = 0x3FFF


def _type(command: int) -> int:
    return (RDMA_NL_NLDEV << 10) | command


class nldevmsg(nlmsg):  # type: ignore[misc]
    """An NLDEV message: no fixed header, attributes only. Numbers as in enum rdma_nldev_attr."""

    prefix = "RDMA_NLDEV_"
    nla_map = (
        (1, "RDMA_NLDEV_ATTR_DEV_INDEX", "uint32"),
        (2, "RDMA_NLDEV_ATTR_DEV_NAME", "asciiz"),
        (3, "RDMA_NLDEV_ATTR_PORT_INDEX", "uint32"),
        (12, "RDMA_NLDEV_ATTR_PORT_STATE", "uint8"),
        (19, "RDMA_NLDEV_ATTR_RES_QP", "cdata"),  # see _attributes
        (50, "RDMA_NLDEV_ATTR_NDEV_INDEX", "uint32"),
        (51, "RDMA_NLDEV_ATTR_NDEV_NAME", "asciiz"),
        (65, "RDMA_NLDEV_ATTR_LINK_TYPE", "asciiz"),
        (66, "RDMA_NLDEV_SYS_ATTR_NETNS_MODE", "uint8"),
        (68, "RDMA_NLDEV_NET_NS_FD", "uint32"),
        (69, "RDMA_NLDEV_ATTR_CHARDEV_TYPE", "asciiz"),
        (70, "RDMA_NLDEV_ATTR_CHARDEV_NAME", "asciiz"),
        (72, "RDMA_NLDEV_ATTR_CHARDEV", "uint64"),
        (103, "RDMA_NLDEV_SYS_ATTR_MONITOR_MODE", "uint8"),
    )


class _NldevMarshal(Marshal):  # type: ignore[misc]
    msg_map: ClassVar = {
        _type(command): nldevmsg
        for command in (
            CMD_GET,
            CMD_SET,
            CMD_NEWLINK,
            CMD_DELLINK,
            CMD_PORT_GET,
            CMD_SYS_GET,
            CMD_RES_QP_GET,
            CMD_GET_CHARDEV,
        )
    }


class _AsyncNldevSocket(AsyncNetlinkSocket):  # type: ignore[misc]
    marshal_class = _NldevMarshal


class _NldevSocket(NetlinkSocket):  # type: ignore[misc]
    async_class = _AsyncNldevSocket


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """A device as the kernel lists it."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Port:
    """A device's port: the device's name, whether the port is active, and its netdev where this namespace has it."""

    device: str
    active: bool
    netdev: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """Whether a device's port is active, and what its driver has counted there (hw_counters) by the driver's own
    names: rxe's and each NIC's are others. Nothing where it counts nothing."""

    port_active: bool
    events: dict[str, int]


@dataclass(frozen=True, slots=True)
class CharacterDevice:
    """A character device: its name below /dev/infiniband and its number."""

    name: str
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class QueuePair:
    """A queue pair as the kernel lists it; ``pid`` is None for the kernel's own."""

    qpn: int
    pid: int | None


class RdmaSocket:
    """RDMA netlink as seen from one network namespace. Belongs to one thread; use as a context manager."""

    def __init__(self, sock: socket.socket):
        try:
            self._netlink = _NldevSocket(family=NETLINK_RDMA, use_socket=sock)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def here(cls) -> RdmaSocket:
        """Of the host's namespace. Raises UnavailableError on a kernel without RDMA."""
        return cls(_rdma_socket())

    @classmethod
    def inside(cls, descriptor: int) -> RdmaSocket:
        """Of the namespace that ``descriptor`` stands for."""
        return cls(namespace.run_inside(descriptor, _rdma_socket))

    @staticmethod
    def readings(indexes: Sequence[int], descriptor: int | None = None) -> list[Reading | None]:
        """What devices show by now, by their indexes; None where there is none. Of the host's namespace, or of the one
        that ``descriptor`` stands for. Quick for a thousand."""
        if descriptor is None:
            return _readings(indexes)
        return namespace.run_inside(descriptor, lambda: _readings(indexes))

    def __enter__(self) -> RdmaSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()

    def _ask(self, command: int, attributes: list[tuple[str, object]], *, dump: bool = False) -> list[Any]:
        message = nldevmsg()
        message["attrs"] = attributes
        flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else NLM_F_ACK)
        subject = ", ".join(f"{name.removeprefix('RDMA_NLDEV_')}={value}" for name, value in attributes)
        try:
            return list(self._netlink.nlm_request(message, msg_type=_type(command), msg_flags=flags))
        except PyrouteError as error:
            raise _refused(command, subject, abs(int(error.code or 0))) from error
        except OSError as error:
            raise _refused(command, subject, error.errno or errno.EIO) from error

    def mode(self) -> RdmaMode:
        """The host's RDMA namespace mode (true in the attribute: shared)."""
        for reply in self._ask(CMD_SYS_GET, []):
            value = reply.get_attr("RDMA_NLDEV_SYS_ATTR_NETNS_MODE")
            if value is not None:
                return RdmaMode.SHARED if value else RdmaMode.EXCLUSIVE
        raise UnavailableError(
            "The kernel does not say its RDMA network namespace mode; it needs Linux 5.3 or newer.",
            operation="RDMA_NLDEV_CMD_SYS_GET",
        )

    def announces(self) -> bool:
        """Whether the kernel announces devices over RDMA netlink (RDMA_NL_GROUP_NOTIFY, Linux 6.12)."""
        return any(reply.get_attr("RDMA_NLDEV_SYS_ATTR_MONITOR_MODE") for reply in self._ask(CMD_SYS_GET, []))

    def devices(self) -> list[RdmaDevice]:
        """Every device that this namespace can see."""
        return [
            RdmaDevice(
                index=reply.get_attr("RDMA_NLDEV_ATTR_DEV_INDEX"),
                name=reply.get_attr("RDMA_NLDEV_ATTR_DEV_NAME"),
            )
            for reply in self._ask(CMD_GET, [], dump=True)
        ]

    def device(self, name: str) -> RdmaDevice | None:
        """The device of that name as this namespace sees it, or None (GET by name gives EINVAL, so: dump)."""
        return next((device for device in self.devices() if device.name == name), None)

    def port(self, index: int) -> Port | None:
        """The port of the device with this index, or None where there is no such device."""
        place: list[tuple[str, object]] = [("RDMA_NLDEV_ATTR_DEV_INDEX", index), ("RDMA_NLDEV_ATTR_PORT_INDEX", PORT)]
        try:
            (reply,) = self._ask(CMD_PORT_GET, place)
        except NotFoundError:
            return None
        return Port(
            device=reply.get_attr("RDMA_NLDEV_ATTR_DEV_NAME"),
            active=reply.get_attr("RDMA_NLDEV_ATTR_PORT_STATE") == PORT_ACTIVE,
            netdev=reply.get_attr("RDMA_NLDEV_ATTR_NDEV_NAME"),
        )

    def add_rxe(self, name: str, netdev: str) -> None:
        """Makes a Soft-RoCE device on a netdev of this namespace. NEWLINK answers no index: ask ``device``."""
        self._ask(
            CMD_NEWLINK,
            [
                ("RDMA_NLDEV_ATTR_DEV_NAME", name),
                ("RDMA_NLDEV_ATTR_LINK_TYPE", "rxe"),
                ("RDMA_NLDEV_ATTR_NDEV_NAME", netdev),
            ],
        )

    def delete_link(self, index: int) -> bool:
        """Removes a software device; False when it is gone already."""
        try:
            self._ask(CMD_DELLINK, [("RDMA_NLDEV_ATTR_DEV_INDEX", index)])
        except NotFoundError:
            return False
        return True

    def move(self, index: int, descriptor: int) -> None:
        """Moves a device into another network namespace (exclusive mode only; not rxe before Linux 7.3)."""
        self._ask(CMD_SET, [("RDMA_NLDEV_ATTR_DEV_INDEX", index), ("RDMA_NLDEV_NET_NS_FD", descriptor)])

    def character_device(self, index: int) -> CharacterDevice:
        """The uverbs node of a device."""
        for reply in self._ask(
            CMD_GET_CHARDEV,
            [("RDMA_NLDEV_ATTR_DEV_INDEX", index), ("RDMA_NLDEV_ATTR_CHARDEV_TYPE", "uverbs")],
        ):
            device_number = reply.get_attr("RDMA_NLDEV_ATTR_CHARDEV")
            if device_number is not None:
                # huge_encode_dev(): the layout of makedev() in glibc, which os.major and os.minor undo.
                return CharacterDevice(
                    name=reply.get_attr("RDMA_NLDEV_ATTR_CHARDEV_NAME"),
                    major=os.major(device_number),
                    minor=os.minor(device_number),
                )
        raise UnavailableError(
            "The RDMA device has no uverbs node; load the ib_uverbs module on the host.",
            operation="RDMA_NLDEV_CMD_GET_CHARDEV",
            subject=str(index),
        )

    def queue_pairs(self, index: int) -> list[QueuePair]:
        """The queue pairs of a device, with the pid (as the host counts) of the process that made each."""
        pairs = []
        for reply in self._ask(CMD_RES_QP_GET, [("RDMA_NLDEV_ATTR_DEV_INDEX", index)], dump=True):
            for _, entry in _attributes(reply.get_attr("RDMA_NLDEV_ATTR_RES_QP") or b""):
                found = dict(_attributes(entry))
                if RES_LQPN in found:
                    qpn, pid = (found.get(kind) for kind in (RES_LQPN, RES_PID))
                    pairs.append(QueuePair(qpn=_number(qpn), pid=None if pid is None else _number(pid)))
        return pairs


def _attributes(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Types and contents of netlink attributes (struct nlattr), one behind another. There may be hundreds of queue
    pairs with a dozen attributes each, and an object for each of those takes twenty times as long."""
    place = 0
    while place + _NLATTR.size <= len(raw):
        length, kind = _NLATTR.unpack_from(raw, place)
        if length < _NLATTR.size:
            return
        yield kind & NLA_TYPE_MASK, raw[place + _NLATTR.size : place + length]
        place += (length + 3) & ~3


def _number(raw: bytes | None) -> int:
    return int.from_bytes(raw or b"", sys.byteorder)


def _readings(indexes: Sequence[int]) -> list[Reading | None]:
    def ask(command: int, index: int) -> Message:
        body = number(DEV_INDEX, index) + number(PORT_INDEX, PORT)
        return Message(_type(command), NLM_F_REQUEST, body, f"RDMA_NLDEV_CMD {command}", f"device {index}")

    questions = [ask(command, index) for index in indexes for command in (CMD_PORT_GET, CMD_STAT_GET)]
    with BatchSocket(NETLINK_RDMA) as sock:
        replies = sock.exchange(questions)
    return [_reading(*replies[place : place + 2]) for place in range(0, len(replies), 2)]


def _reading(port: Reply, counted: Reply) -> Reading | None:
    """Refused are an index that is not there, and counters of a device that has none: both with EINVAL."""
    if port.errno:
        return None
    state = dict(_attributes(port.payloads[0])).get(PORT_STATE, b"\0")
    events = {}
    for payload in counted.payloads:
        for _, entry in _attributes(dict(_attributes(payload)).get(STAT_HWCOUNTERS, b"")):
            found = dict(_attributes(entry))
            name = found.get(COUNTER_NAME, b"").rstrip(b"\0").decode("ascii", "replace")
            events[name] = _number(found.get(COUNTER_VALUE))
    return Reading(port_active=state[0] == PORT_ACTIVE, events=events)


def _rdma_socket() -> socket.socket:
    try:
        return namespace.netlink_socket(NETLINK_RDMA)
    except OSError as error:
        raise UnavailableError(
            "This kernel has no RDMA subsystem (no RDMA netlink); load ib_core and rdma_rxe, or use a kernel that"
            " has them.",
            operation="socket(NETLINK_RDMA)",
            errno=error.errno,
        ) from error


def _refused(command: int, subject: str, code: int) -> Exception:
    names = {v: k for k, v in globals().items() if k.startswith("CMD_")}
    operation = f"RDMA_NLDEV_{names[command]}"
    # Where an index is not there these answer EINVAL (nldev_dellink, nldev_port_get_doit), and have no other reason to.
    by_index = command in (CMD_DELLINK, CMD_PORT_GET)
    if code in (errno.ENODEV, errno.ENOENT) or (by_index and code == errno.EINVAL):
        return NotFoundError(f"The RDMA device is gone ({subject}).", operation=operation, subject=subject, errno=code)
    if code == errno.EEXIST:
        return ConflictError(
            f"An RDMA device of this name or on this netdev exists already ({subject}).",
            operation=operation,
            subject=subject,
            errno=code,
        )
    if code in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT) or (command == CMD_NEWLINK and code == errno.EINVAL):
        return UnavailableError(
            "This kernel cannot make the RDMA device: it lacks rdma_rxe, or is older than Linux 7.1 (Soft-RoCE in"
            " network namespaces). `rdmanet doctor` says what it can.",
            operation=operation,
            subject=subject,
            errno=code,
        )
    return NetlinkError(
        f"The kernel refused {operation} ({subject}).", operation=operation, subject=subject, errno=code
    )


@contextlib.contextmanager
def available() -> Iterator[RdmaSocket | None]:
    """RDMA netlink of the host, or None on a kernel without RDMA."""
    try:
        sock = RdmaSocket.here()
    except UnavailableError:
        yield None
        return
    with sock:
        yield sock
