"""What the kernel announces, as bytes: the messages are those that Linux 7.3.4 and 6.1 sent."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from rdmanet.errors import NetlinkError
from rdmanet.netlink import events, messages
from rdmanet.netlink.events import LOST, AddressGone, DeviceEvent, Event, LinkEvent, LocalRoute, Source
from tests.unit.test_netlink_messages import encoded
from tests.unit.test_nldev import attribute

MONITOR = 5 << 10 | 28


def announced(kind: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, 0, 0) + payload + bytes(-len(payload) % 4)


def test_devices() -> None:
    gone = attribute(1, b"\x07\x00\x00\x00") + attribute(2, b"rxe_rn1\x00") + attribute(102, b"\x01")
    attached = attribute(102, b"\x02")  # of a netdev that the listener does not see
    found = [*events.device_events(announced(MONITOR, gone) + announced(MONITOR, attached))]
    assert found == [DeviceEvent("rxe_rn1", 7), DeviceEvent(None, None)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("remove@/devices/virtual/infiniband/rxe0|ACTION=remove|SUBSYSTEM=infiniband|NAME=rxe0|", ["rxe0"]),
        ("add@/devices/virtual/infiniband_verbs/uverbs0|ACTION=add|SUBSYSTEM=infiniband_verbs|", ["uverbs0"]),
        ("add@/devices/virtual/net/rxe0|ACTION=add|SUBSYSTEM=net|INTERFACE=rxe0|", []),
        ("libudev", []),
    ],
)
def test_uevents(text: str, expected: list[str]) -> None:
    assert [*events.uevents(text.replace("|", "\0").encode())] == [DeviceEvent(name) for name in expected]


def test_links_and_addresses() -> None:
    link = encoded(ifinfmsg, {"index": 3}, [("IFLA_IFNAME", "rn-7"), ("IFLA_MTU", 1500)])
    addresses = [ipaddress.ip_address("10.213.0.7"), ipaddress.ip_address("fd72:646d:616e::7")]
    data = announced(messages.RTM_NEWLINK, link) + announced(messages.RTM_DELLINK, link)
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        fields: dict[str, object] = {"family": int(family), "prefixlen": address.max_prefixlen, "index": 3}
        payload = encoded(ifaddrmsg, fields, [("IFA_ADDRESS", str(address))])
        data += announced(messages.RTM_NEWADDR, payload) + announced(messages.RTM_DELADDR, payload)
    found = [*events.route_events(data)]
    assert found == [LinkEvent("rn-7"), LinkEvent("rn-7"), *(AddressGone(address) for address in addresses)]


@pytest.mark.parametrize(("kind", "known"), [("local", True), ("unicast", False)])
def test_routes_by_which_the_host_takes_an_address_for_its_own(kind: str, known: bool) -> None:
    data = b""
    for family, text in ((socket.AF_INET, "10.213.0.7"), (socket.AF_INET6, "fd72:646d:616e::7")):
        fields: dict[str, object] = {"family": int(family), "type": 2 if kind == "local" else 1}
        data += announced(messages.RTM_NEWROUTE, encoded(rtmsg, fields, [("RTA_DST", text)]))
    found = [LocalRoute(ipaddress.ip_address(text)) for text in ("10.213.0.7", "fd72:646d:616e::7")]
    assert [*events.route_events(data)] == (found if known else [])


@pytest.mark.parametrize("data", [b"", b"\x10\x00", bytes(16), announced(MONITOR, b"\x03\x00\x01\x00")[:-2]])
def test_what_is_cut_off_says_nothing(data: bytes) -> None:
    assert [event for event in events.device_events(data) if event != DeviceEvent(None)] == []
    assert [*events.route_events(data)] == []


def names(data: bytes) -> Iterator[Event]:
    yield LinkEvent(data.decode())


def test_a_source_gives_all_that_waits_and_never_waits() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    source = Source(ours, names)
    with theirs:
        assert source.read() == []
        theirs.send(b"one")
        theirs.send(b"two")
        assert source.read() == [LinkEvent("one"), LinkEvent("two")]
    source.close()
    source.close()


class Overflowing:
    """A netlink socket whose buffer was too small once, and which then fails for good."""

    def __init__(self) -> None:
        self.results: list[bytes | int] = [errno.ENOBUFS, b"rn-1", errno.EAGAIN, errno.EIO]

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def recv(self, size: int) -> bytes:
        result = self.results.pop(0)
        if isinstance(result, int):
            raise OSError(result, os.strerror(result))
        return result


def test_what_was_lost_is_said_and_what_cannot_be_read_raises() -> None:
    source = Source(Overflowing(), names)  # type: ignore[arg-type]
    assert source.read() == [LOST, LinkEvent("rn-1")]
    with pytest.raises(NetlinkError):
        source.read()
