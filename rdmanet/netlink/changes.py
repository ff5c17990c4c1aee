"""What rtnetlink announces of things that the agent has made: in the host's namespace, and in those of pods.

The kernel drops what nobody here reacts to (an ADD alone causes some forty announcements), so that whoever listens does
not wake for it. What is announced only says where to look.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from rdmanet.errors import KernelError, NetlinkError
from rdmanet.netlink import events, namespace
from rdmanet.netlink.batch import SOL_NETLINK
from rdmanet.netlink.messages import (
    IFF_UP,
    IFLA_IFNAME,
    IFLA_LINK_NETNSID,
    RT_TABLE_MAIN,
    RTA_OIF,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELQDISC,
    RTM_DELROUTE,
    RTM_DELTFILTER,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNETCONF,
    RTM_NEWROUTE,
    RTN_UNICAST,
    attributes,
)

#: include/uapi/linux/rtnetlink.h
RTNLGRP_NEIGH, RTNLGRP_TC, RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF = 3, 4, 24, 25
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
#: A link that is new has all bits of ifi_change.
_NEW = 0xFFFFFFFF
_NETCONFA_IFINDEX = 1
#: What waits meanwhile: announcements have a kilobyte or two.
RECEIVE_BUFFER_BYTES = 8 << 20
_RECEIVE_BYTES = 1 << 16
_HEADER = struct.Struct("=IHHII")
_COMMON = (events.RTNLGRP_LINK, events.RTNLGRP_IPV4_IFADDR, events.RTNLGRP_IPV6_IFADDR)
_ROUTES = (events.RTNLGRP_IPV4_ROUTE, events.RTNLGRP_IPV6_ROUTE)
HOST_GROUPS = (*_COMMON, *_ROUTES, RTNLGRP_TC, RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF)
POD_GROUPS = (*_COMMON, *_ROUTES, RTNLGRP_NEIGH)
HOST_TYPES = (
    *(RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE, RTM_DELROUTE),
    *(RTM_DELQDISC, RTM_DELTFILTER, RTM_NEWNETCONF),
)
POD_TYPES = (RTM_DELLINK, RTM_DELADDR, RTM_DELROUTE, RTM_DELNEIGH)


@dataclass(frozen=True, slots=True)
class Change:
    """Something about the link with this index (0: not known) in the host's namespace, or in the one that has a number
    for us. ``name`` of links alone; ``new`` is one that has just been made, with the number of its peer's namespace;
    ``default`` tells a default route of the host, ``filters`` that it is about the link's filters."""

    index: int
    namespace: int | None = None
    name: str | None = None
    new: bool = False
    peer_namespace: int | None = None
    default: bool = False
    filters: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """More has happened than could be kept."""


class Changes:
    """A socket of announcements; give it back with ``close``. ``read`` never waits."""

    def __init__(self, sock: socket.socket, parse: Callable[[bytes, int | None], Change | None]):
        self._sock = sock
        self._parse = parse
        sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._sock.fileno()

    def read(self, most: int) -> list[Change | Lost]:
        """So many of those that wait. Raises NetlinkError where the socket cannot be read at all."""
        found: list[Change | Lost] = []
        for _ in range(most):
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_RECEIVE_BYTES, 64)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(
                        "What the kernel announces cannot be read.", operation="recvmsg", errno=error.errno
                    ) from error
                found.append(Lost())
                continue
            change = self._parse(data, _namespace(ancillary))
            if change is not None:
                found.append(change)
        return found

    def close(self) -> None:
        """Gives the socket back. Idempotent."""
        self._sock.close()


def host_changes() -> Changes:
    """Of the calling thread's namespace. Raises KernelError."""
    return Changes(_socket(HOST_GROUPS, HOST_TYPES, all_namespaces=False), host_change)


def pod_changes() -> Changes:
    """Of all namespaces that ours has a number for, as it has for those at the other end of its veth pairs; needs
    CAP_NET_BROADCAST. Raises KernelError."""
    return Changes(_socket(POD_GROUPS, POD_TYPES, all_namespaces=True), pod_change)


def _socket(groups: Iterable[int], types: Collection[int], *, all_namespaces: bool) -> socket.socket:
    try:
        sock = namespace.netlink_socket(socket.NETLINK_ROUTE)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
            _filter(sock, program(types, new=not all_namespaces))
            if all_namespaces:
                sock.setsockopt(SOL_NETLINK, events.NETLINK_LISTEN_ALL_NSID, 1)
            for group in groups:
                sock.setsockopt(SOL_NETLINK, events.NETLINK_ADD_MEMBERSHIP, group)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise KernelError(
            "The kernel does not let the agent hear what happens to links; the agent must run as root in the host's"
            " namespaces.",
            operation="NETLINK_ADD_MEMBERSHIP",
            errno=error.errno,
        ) from error
    return sock


def program(types: Collection[int], *, new: bool) -> bytes:
    """A classic BPF program (struct sock_filter) that lets through announcements of these types; of links those that
    have gone down, with ``new`` those that are new as well; of neighbours the addresses of single interfaces: those of
    groups (MLD's, router solicitations') every idle interface forgets after a while."""
    load_half, load_word, load_byte, equal, any_bit, end = 0x28, 0x20, 0x30, 0x15, 0x45, 0x06
    type_at, flags_at, change_at, neighbour_type_at = 4, 24, 28, 27  # struct nlmsghdr; ifinfomsg or ndmsg behind it

    def swapped(code: str, number: int) -> int:
        # It loads in the network's order.
        return int.from_bytes(struct.pack(code, number), "big")

    up = swapped("=I", IFF_UP)
    wanted = sorted(set(types) - {RTM_DELNEIGH})
    neighbours = RTM_DELNEIGH in types
    code = [(load_half, 0, 0, type_at)]
    # Offsets count from the next instruction; the last two are what all others lead to.
    for place, number in enumerate(wanted):
        code.append((equal, len(wanted) - place + (9 if neighbours else 6), 0, swapped("=H", number)))
    if neighbours:
        code += [
            (equal, 0, 2, swapped("=H", RTM_DELNEIGH)),
            (load_byte, 0, 0, neighbour_type_at),
            (equal, 7, 6, RTN_UNICAST),
        ]
    code += [
        (equal, 0, 5, swapped("=H", RTM_NEWLINK)),
        (load_word, 0, 0, change_at),
        (equal, 4 if new else 3, 0, _NEW),
        (any_bit, 0, 2, up),
        (load_word, 0, 0, flags_at),
        (any_bit, 0, 1, up),
        (end, 0, 0, 0),
        (end, 0, 0, 0xFFFFFFFF),
    ]
    return b"".join(struct.pack("=HBBI", *one) for one in code)


def _filter(sock: socket.socket, code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))


def _namespace(ancillary: Iterable[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if level == SOL_NETLINK and kind == events.NETLINK_LISTEN_ALL_NSID:
            return int(struct.unpack("=i", data[:4])[0])
    return None


# Messages: each announcement comes by itself


def host_change(data: bytes, number: int | None) -> Change | None:
    """Of the host's namespace."""
    kind, payload = _message(data)
    if kind in (RTM_NEWLINK, RTM_DELLINK):
        return _link(kind, payload, number)
    if kind in (RTM_NEWADDR, RTM_DELADDR):
        return Change(_index(payload))
    if kind in (RTM_DELQDISC, RTM_DELTFILTER):
        return Change(_index(payload), filters=True)  # struct tcmsg has it there, too
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        table = payload[4]  # struct rtmsg
        return Change(_route_index(payload), default=payload[1] == 0) if table == RT_TABLE_MAIN else None
    if kind == RTM_NEWNETCONF:
        index = dict(attributes(payload[4:])).get(_NETCONFA_IFINDEX)
        return None if index is None else Change(int(struct.unpack("=i", index)[0]))
    return None


def pod_change(data: bytes, number: int | None) -> Change | None:
    """Of another namespace than ours."""
    if number is None:
        return None
    kind, payload = _message(data)
    if kind in (RTM_NEWLINK, RTM_DELLINK):
        return _link(kind, payload, number)
    if kind in (RTM_DELADDR, RTM_DELNEIGH):
        return Change(_index(payload), namespace=number)
    return Change(_route_index(payload), namespace=number) if kind == RTM_DELROUTE else None


def _message(data: bytes) -> tuple[int, bytes]:
    if len(data) < _HEADER.size + 12:
        return 0, b""
    length, kind = _HEADER.unpack_from(data)[:2]
    return kind, data[_HEADER.size : length]


def _index(payload: bytes) -> int:
    """Where struct ifaddrmsg, ndmsg and tcmsg have it."""
    return int(struct.unpack_from("=i", payload, 4)[0])


def _route_index(payload: bytes) -> int:
    for kind, value in attributes(payload[12:]):
        if kind == RTA_OIF:
            return int(struct.unpack("=I", value)[0])
    return 0


def _link(kind: int, payload: bytes, number: int | None) -> Change | None:
    """One that is gone, down or new; a pod's only where it is gone or down."""
    index, flags, change = struct.unpack_from("=iII", payload, 4)  # struct ifinfomsg
    new = kind == RTM_NEWLINK and change == _NEW
    if kind == RTM_NEWLINK and not new and (flags & IFF_UP or not change & IFF_UP):
        return None
    if new and number is not None:
        return None
    name, peer = None, None
    for attribute, value in attributes(payload[16:]):
        if attribute == IFLA_IFNAME:
            name = value.split(b"\0", 1)[0].decode(errors="replace")
        elif attribute == IFLA_LINK_NETNSID:
            peer = int(struct.unpack("=i", value)[0])
    return Change(index, number, name, new, peer)
