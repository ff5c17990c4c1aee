"""What the kernel announces of RDMA devices, links and addresses, for whoever watches a descriptor.

A source is a socket that becomes readable, and ``read`` then says what has happened, as values. Where more happened
than its buffer holds it says LOST, and whoever wants to know looks for himself.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rdmanet.errors import KernelError, NetlinkError
from rdmanet.model import IPAddress, RdmaMode
from rdmanet.netlink import namespace
from rdmanet.netlink.batch import SOL_NETLINK
from rdmanet.netlink.messages import (
    IFA_ADDRESS,
    IFA_LOCAL,
    IFLA_IFNAME,
    RTA_DST,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    attributes,
)
from rdmanet.netlink.nldev import NETLINK_RDMA, RdmaSocket

NETLINK_KOBJECT_UEVENT = 15
NETLINK_ADD_MEMBERSHIP, NETLINK_LISTEN_ALL_NSID = 1, 8
#: include/uapi/rdma/rdma_netlink.h, since Linux 6.12.
RDMA_NL_GROUP_NOTIFY = 4
_ATTR_DEV_INDEX, _ATTR_DEV_NAME = 1, 2
#: include/uapi/linux/rtnetlink.h
RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE = 1, 5, 7, 9, 11
UEVENT_GROUP = 1
RTN_LOCAL = 2
_RTMSG_TYPE = 7  # where struct rtmsg has it
_HEADER = struct.Struct("=IHHII")
_RECEIVE_BYTES = 1 << 16
#: Where the kernel's own and the host's network namespace is found: the first process lives in it.
_FIRST_NAMESPACE = "/proc/1/ns/net"


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """An RDMA device, or the node that belongs to it (then ``name`` is the node's), has come, gone or changed."""

    name: str | None
    index: int | None = None


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something about a link of the host has changed, or it is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class AddressGone:
    """An address is no longer on any or on one of the host's links."""

    address: IPAddress


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """The host takes an address for its own from now on."""

    address: IPAddress


@dataclass(frozen=True, slots=True)
class Lost:
    """More has happened than could be kept."""


LOST = Lost()
Event = DeviceEvent | LinkEvent | AddressGone | LocalRoute | Lost
Parse = Callable[[bytes], Iterator[Event]]


class Source:
    """A socket of announcements; give it back with ``close``. ``read`` never waits."""

    def __init__(self, sock: socket.socket, parse: Parse):
        self._sock = sock
        self._parse = parse
        sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._sock.fileno()

    def read(self) -> list[Event]:
        """Everything that waits. Raises NetlinkError where the socket cannot be read at all."""
        found: list[Event] = []
        while True:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(
                        "What the kernel announces cannot be read.", operation="recv", errno=error.errno
                    ) from error
                found.append(LOST)
            else:
                found += self._parse(data)

    def close(self) -> None:
        """Gives the socket back. Idempotent."""
        self._sock.close()


def device_sources(mode: RdmaMode) -> list[Source]:
    """RDMA devices of the whole machine.

    The kernel announces a device in the network namespace that it belongs to: in shared mode that is the initial one,
    in exclusive mode the pod's. There is no socket of ours in pods: one that listens to all namespaces that ours has
    a number for hears them too, and a veth pair to a pod gives it a number (net/core/rtnetlink.c,
    rtnl_fill_link_netnsid). Kernels before 6.12 do not announce over RDMA netlink, and none announces there that a
    device has moved into a namespace (7.3.4): where that matters the devices' uevents tell.
    """
    with RdmaSocket.here() as rdma:
        announces = rdma.announces()
    wanted: list[tuple[Callable[[], socket.socket], Parse]] = []
    if announces:
        wanted.append((_device_socket, device_events))
    if not announces or mode is RdmaMode.EXCLUSIVE:
        wanted.append((_uevent_socket, uevents))
    with namespace.opened(_FIRST_NAMESPACE) as first:
        return [Source(namespace.run_inside(first, make), parse) for make, parse in wanted]


def link_source(*, addresses: bool) -> Source:
    """Links of the calling thread's namespace; with ``addresses`` also addresses that are taken away, and those that
    the host begins to take for its own."""
    more = (RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE) if addresses else ()
    return Source(_socket(socket.NETLINK_ROUTE, (RTNLGRP_LINK, *more)), route_events)


def address_source() -> Source:
    """Addresses that the host begins to take for its own, and those that are taken away from it."""
    groups = (RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE)
    return Source(_socket(socket.NETLINK_ROUTE, groups), route_events)


def _device_socket() -> socket.socket:
    return _socket(NETLINK_RDMA, (RDMA_NL_GROUP_NOTIFY,), all_namespaces=True)


def _uevent_socket() -> socket.socket:
    return _socket(NETLINK_KOBJECT_UEVENT, (UEVENT_GROUP,))


def _socket(family: int, groups: tuple[int, ...], *, all_namespaces: bool = False) -> socket.socket:
    try:
        # Bound before it joins: RDMA netlink refuses the other order.
        sock = namespace.netlink_socket(family)
        try:
            if all_namespaces:
                sock.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
            for group in groups:
                sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise KernelError(
            "The kernel does not let the agent hear of RDMA devices and links; the agent must run as root in the"
            " host's namespaces.",
            operation="NETLINK_ADD_MEMBERSHIP",
            subject=str(groups),
            errno=error.errno,
        ) from error
    return sock


# Messages


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each netlink message."""
    place = 0
    while place + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, place)[:2]
        if length < _HEADER.size:
            return
        yield kind, data[place + _HEADER.size : place + length]
        place += (length + 3) & ~3


def device_events(data: bytes) -> Iterator[Event]:
    """Of RDMA_NLDEV_CMD_MONITOR messages."""
    for _, payload in _messages(data):
        found = dict(attributes(payload))
        index, name = found.get(_ATTR_DEV_INDEX), found.get(_ATTR_DEV_NAME)
        yield DeviceEvent(
            name=None if name is None else _string(name),
            index=None if index is None else int(struct.unpack("=I", index)[0]),
        )


def uevents(data: bytes) -> Iterator[Event]:
    """Of the kernel's uevents (lib/kobject_uevent.c): ACTION@DEVPATH, then KEY=VALUE, each with a NUL behind it."""
    head, *pairs = data.split(b"\0")
    if b"SUBSYSTEM=infiniband" in pairs or b"SUBSYSTEM=infiniband_verbs" in pairs:
        yield DeviceEvent(name=os.fsdecode(head.rpartition(b"/")[2]))


def route_events(data: bytes) -> Iterator[Event]:
    """Of rtnetlink's announcements."""
    for kind, payload in _messages(data):
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            # struct ifinfomsg, then attributes; the name comes first and there may be a kilobyte behind it.
            for attribute, value in attributes(payload[16:]):
                if attribute == IFLA_IFNAME:
                    yield LinkEvent(_string(value))
                    break
        elif kind == RTM_DELADDR:
            found = dict(attributes(payload[8:]))  # struct ifaddrmsg
            packed = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
            if packed is not None:
                yield AddressGone(ipaddress.ip_address(packed))
        elif kind == RTM_NEWROUTE and len(payload) > _RTMSG_TYPE and payload[_RTMSG_TYPE] == RTN_LOCAL:
            destination = dict(attributes(payload[12:])).get(RTA_DST)  # struct rtmsg
            if destination is not None:
                yield LocalRoute(ipaddress.ip_address(destination))


def _string(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")
