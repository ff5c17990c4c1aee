"""Sockets of a network namespace, and their end: sock_diag(7), uapi/linux/inet_diag.h."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import NETLINK_SOCK_DIAG, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY

from rdmanet.errors import NetlinkError, RdmanetError, UnavailableError
from rdmanet.netlink import namespace

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
_ID = struct.Struct("=2s2s16s16sIQ")  # ports in network byte order, addresses, interface, cookie
_ID_PLACE = 4  # in struct inet_diag_msg
_NO_COOKIE = 0xFFFFFFFFFFFFFFFF
_ALL_STATES = 0xFFFFFFFF
_MAPPED = bytes(10) + b"\xff\xff"


def destroy_connected(wanted: Mapping[int, Collection[bytes]]) -> int:
    """Destroys this namespace's UDP sockets that are connected to one of their ends (address key, then port in network
    byte order), by cookie; returns how many there were. Their owners get ECONNABORTED (kernel commit 5d77dca82839,
    4.9).

    Raises UnavailableError where the kernel cannot (CONFIG_INET_UDP_DIAG, CONFIG_INET_DIAG_DESTROY), NetlinkError where
    it refuses.
    """
    ports = {end[16:] for ends in wanted.values() for end in ends}
    found = 0
    with namespace.netlink_socket(NETLINK_SOCK_DIAG) as sock:
        for family in (socket.AF_INET, socket.AF_INET6):
            for port in ports:
                for raw in _connected(sock, family, port):
                    _, dport, _, address, _, cookie = _ID.unpack(raw)
                    end = (address if family == socket.AF_INET6 else _MAPPED + address[:4]) + dport
                    if end in wanted.get(cookie, ()):
                        found += _destroy(sock, family, raw)
    return found


def _connected(sock: socket.socket, family: int, port: bytes) -> list[bytes]:
    """struct inet_diag_sockid of the family's UDP sockets that are connected to this port."""
    wanted = _ID.pack(b"\0\0", port, b"", b"", 0, _NO_COOKIE)
    _send(sock, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, wanted)
    return [body[_ID_PLACE : _ID_PLACE + _ID.size] for body in _answers(sock)]


def _destroy(sock: socket.socket, family: int, identity: bytes) -> int:
    _send(sock, SOCK_DESTROY, NLM_F_ACK, family, identity)
    try:
        list(_answers(sock))
    except NetlinkError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # closed meanwhile
            return 0
        raise
    return 1


def _send(sock: socket.socket, kind: int, flags: int, family: int, identity: bytes) -> None:
    body = _REQUEST.pack(family, socket.IPPROTO_UDP, 0, _ALL_STATES) + identity
    sock.send(_HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body)


def _answers(sock: socket.socket) -> Iterator[bytes]:
    """Bodies of messages up to the one that says it is done."""
    while True:
        received = sock.recv(1 << 16)
        at = 0
        while at < len(received):
            length, kind, _, _, _ = _HEADER.unpack_from(received, at)
            body = received[at + _HEADER.size : at + length]
            at += (length + 3) & ~3
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    raise _failed(number)
                return
            yield body


def _failed(number: int) -> RdmanetError:
    if number == errno.EOPNOTSUPP:
        return UnavailableError(
            "This kernel cannot destroy UDP sockets (CONFIG_INET_DIAG_DESTROY): those that are connected to a backend "
            "that has gone stay connected to it.",
            operation="SOCK_DESTROY",
            errno=number,
        )
    return NetlinkError(
        f"Sockets cannot be looked at: {os.strerror(number)}.", operation="NETLINK_SOCK_DIAG", errno=number
    )
