"""Many rtnetlink messages in one send, their acks read back by number.

The kernel works through a batch before ``send`` returns, and goes on after a message that it refuses: a batch holds
only messages that are harmless when an earlier one failed (net/netlink/af_netlink.c, netlink_rcv_skb). Only the last
message asks for an ack; a refused one is always answered.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rdmanet.errors import ConflictError, NetlinkError, NotFoundError, RdmanetError
from rdmanet.netlink import namespace
from rdmanet.netlink.messages import NLM_F_ACK, Message, attributes

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_ACK_TLVS, NLM_F_DUMP_INTR = 0x200, 0x10
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
#: The kernel answers before ``send`` returns: who waits for longer waits for ever.
ANSWER_TIMEOUT_S = 10
#: What is sent at once: replies wait in the socket's buffer (net.core.rmem_max, 208 KiB at least) until all are done.
MAX_MESSAGES = 64
#: A pod can have as many routes as it likes: so much of a dump is read.
MAX_DUMP_BYTES = 1 << 20
#: A table that changes while it is read may be read wrongly.
_DUMPS = 3
_FAMILIES = {0: "NETLINK_ROUTE", 20: "NETLINK_RDMA"}
_HEADER = struct.Struct("=IHHII")
_RECEIVE_BYTES = 1 << 16


@dataclass(slots=True)
class Reply:
    """What the kernel said to one message: 0 or an errno, its own words if any, the payloads that it sent."""

    errno: int = 0
    words: str = ""
    payloads: list[bytes] = field(default_factory=list)


def refused(operation: str, subject: str, number: int, words: str = "") -> RdmanetError:
    """The exception for an errno of rtnetlink."""
    kind: Callable[..., RdmanetError] = NetlinkError
    if number in (errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL):
        kind = NotFoundError
    elif number in (errno.EEXIST, errno.EBUSY):
        kind = ConflictError
    sentence = f"The kernel refused {operation} for {subject}{': ' + words if words else ''}."
    return kind(sentence, operation=operation, subject=subject, errno=number)


class BatchSocket:
    """rtnetlink (or another family) of the namespace of the thread that made it; used by one thread at a time. A
    context manager.

    After an OSError-born NetlinkError (not a refusal) the socket may be out of step: close it.
    """

    def __init__(self, family: int = socket.NETLINK_ROUTE) -> None:
        try:
            self._sock = namespace.netlink_socket(family)
        except OSError as error:
            raise refused("socket", _FAMILIES.get(family, str(family)), error.errno or errno.EIO) from error
        try:
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self._sock.setsockopt(SOL_NETLINK, option, 1)
            # Not settimeout(): that asks poll() before every call.
            timeout = struct.pack("=qq", ANSWER_TIMEOUT_S, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        except BaseException:
            self._sock.close()
            raise
        self._number = 0

    def __enter__(self) -> BatchSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the socket back. Idempotent."""
        self._sock.close()

    def exchange(self, messages: Sequence[Message]) -> list[Reply]:
        """Sends all and returns a reply for each, refused or not; NetlinkError where there is no answer at all."""
        replies: list[Reply] = []
        for start in range(0, len(messages), MAX_MESSAGES):
            replies += self._exchange(messages[start : start + MAX_MESSAGES])
        return replies

    def _exchange(self, messages: Sequence[Message]) -> list[Reply]:
        first = self._number + 1
        self._number += len(messages)
        parts = []
        for number, message in enumerate(messages, first):
            flags = message.flags | (NLM_F_ACK if number == self._number else 0)
            parts.append(_HEADER.pack(_HEADER.size + len(message.body), message.type, flags, number, 0))
            parts.append(message.body)
        replies = [Reply() for _ in messages]
        try:
            self._sock.send(b"".join(parts))
            while not self._read(replies, first):
                pass
        except OSError as error:
            raise refused(messages[0].operation, messages[0].subject, error.errno or errno.EIO) from error
        return replies

    def _read(self, replies: list[Reply], first: int) -> bool:
        """Takes what one ``recv`` brings; True with the answer to the last message."""
        data = self._sock.recv(_RECEIVE_BYTES)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
            payload = data[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3
            if not 0 <= number - first < len(replies):
                continue  # of a batch that was given up
            reply = replies[number - first]
            if kind == NLMSG_ERROR:
                reply.errno = -struct.unpack_from("=i", payload)[0]
                reply.words = _words(payload, flags)
                if number == self._number:
                    return True
            else:
                reply.payloads.append(payload)
        return False

    def dump(self, message: Message) -> list[bytes]:
        """The payloads of a dump. Raises as ``send``, and NetlinkError where there is too much."""
        self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for _ in range(_DUMPS):
            self._number += 1
            header = _HEADER.pack(_HEADER.size + len(message.body), message.type, message.flags, self._number, 0)
            payloads: list[bytes] = []
            try:
                self._sock.send(header + message.body)
                whole = self._read_dump(message, payloads)
            except OSError as error:
                raise refused(message.operation, message.subject, error.errno or errno.EIO) from error
            if whole:
                break
        return payloads

    def _read_dump(self, message: Message, payloads: list[bytes]) -> bool:
        """Takes everything; False where the table has changed meanwhile."""
        whole, read_bytes = True, 0
        while True:
            data = self._sock.recv(_RECEIVE_BYTES)
            read_bytes += len(data)
            if read_bytes > MAX_DUMP_BYTES:
                raise refused(message.operation, message.subject, errno.EFBIG, "there is too much of it")
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
                payload = data[offset + _HEADER.size : offset + length]
                offset += (length + 3) & ~3
                if number != self._number:
                    continue
                whole = whole and not flags & NLM_F_DUMP_INTR
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    failed = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if failed:
                        raise refused(message.operation, message.subject, failed)
                    return whole
                payloads.append(payload)

    def send(self, messages: Sequence[Message]) -> list[Reply]:
        """As ``exchange``; raises for the first message that was refused and does not accept that."""
        return accepted(messages, self.exchange(messages))


def accepted(messages: Sequence[Message], replies: list[Reply]) -> list[Reply]:
    """The replies; raises for the first message that was refused and does not accept that."""
    for message, reply in zip(messages, replies, strict=True):
        if reply.errno and reply.errno not in message.accepted:
            raise refused(message.operation, message.subject, reply.errno, reply.words)
    return replies


def _words(payload: bytes, flags: int) -> str:
    """The kernel's sentence behind a capped error message: the errno, the header it answers, attributes."""
    if not flags & NLM_F_ACK_TLVS:
        return ""
    words = dict(attributes(payload[4 + _HEADER.size :])).get(NLMSGERR_ATTR_MSG, b"")
    return words.rstrip(b"\0").decode(errors="replace").rstrip(".")


class BatchSockets:
    """Sockets of the namespace in which the process lives, kept between calls; for threads that never leave it."""

    def __init__(self) -> None:
        self._free: list[BatchSocket] = []

    def exchange(self, messages: Sequence[Message]) -> list[Reply]:
        """See ``BatchSocket.exchange``."""
        try:
            sock = self._free.pop()
        except IndexError:
            sock = BatchSocket()
        try:
            replies = sock.exchange(messages)
        except BaseException:
            sock.close()
            raise
        self._free.append(sock)
        return replies

    def send(self, messages: Sequence[Message]) -> list[Reply]:
        """See ``BatchSocket.send``."""
        return accepted(messages, self.exchange(messages))

    def close(self) -> None:
        """Gives every socket back that nobody uses just now. Idempotent."""
        while self._free:
            self._free.pop().close()
