"""rdmanet.netlink.changes: which announcements are reacted to, and what they say; live in tests/kernel."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from rdmanet.netlink import changes, messages
from rdmanet.netlink.changes import HOST_TYPES, POD_TYPES, Change, host_change, pod_change

LINK = struct.Struct("=BxHiII")
UP, DOWN, NEW, QUIET = 1, 0, 0xFFFFFFFF, 0
NAME = messages.text(messages.IFLA_IFNAME, "rn-7")
PEER = messages.number(messages.IFLA_LINK_NETNSID, 3)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def link(kind: int, flags: int = UP, change: int = QUIET, more: bytes = b"") -> bytes:
    return message(kind, LINK.pack(0, 1, 12, flags, change) + NAME + more)


def address(kind: int) -> bytes:
    body = struct.pack("=BBBBI", 2, 32, 0, 0, 12) + messages.attribute(messages.IFA_LOCAL, bytes(4))
    return message(kind, body)


def route(kind: int, *, length: int = 0, table: int = messages.RT_TABLE_MAIN) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, length, 0, 0, table, 4, 0, 1, 0) + messages.number(messages.RTA_OIF, 12)
    return message(kind, body)


def tc(kind: int) -> bytes:
    return message(kind, struct.pack("=BxxxiIII", 0, 12, 0, 0, 0))


def neighbour(kind: int, type_: int = messages.RTN_UNICAST) -> bytes:
    return message(kind, struct.pack("=BxxxiHBB", 2, 12, 0x80, 0, type_))


def netconf(index: int) -> bytes:
    return message(messages.RTM_NEWNETCONF, struct.pack("=Bxxx", 2) + messages.number(1, index & 0xFFFFFFFF))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (link(messages.RTM_DELLINK), Change(12, name="rn-7")),
        (link(messages.RTM_NEWLINK, UP, NEW, PEER), Change(12, name="rn-7", new=True, peer_namespace=3)),
        (link(messages.RTM_NEWLINK, DOWN, 1), Change(12, name="rn-7")),
        (link(messages.RTM_NEWLINK, UP, 1), None),
        (link(messages.RTM_NEWLINK, UP, QUIET), None),
        (address(messages.RTM_DELADDR), Change(12)),
        (address(messages.RTM_NEWADDR), Change(12)),
        (route(messages.RTM_DELROUTE), Change(12, default=True)),
        (route(messages.RTM_NEWROUTE, length=24), Change(12)),
        (route(messages.RTM_NEWROUTE, table=255), None),
        (tc(messages.RTM_DELQDISC), Change(12, filters=True)),
        (tc(messages.RTM_DELTFILTER), Change(12, filters=True)),
        (netconf(12), Change(12)),
        (netconf(-1), Change(-1)),
        (message(messages.RTM_NEWLINK, b""), None),
        (b"", None),
    ],
)
def test_what_happens_on_the_host(data: bytes, expected: Change | None) -> None:
    assert host_change(data, None) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (link(messages.RTM_DELLINK), Change(12, 5, "rn-7")),
        (link(messages.RTM_NEWLINK, DOWN, 1), Change(12, 5, "rn-7")),
        (link(messages.RTM_NEWLINK, UP, NEW, PEER), None),
        (address(messages.RTM_DELADDR), Change(12, 5)),
        (route(messages.RTM_DELROUTE, length=20, table=100), Change(12, 5)),
        (neighbour(messages.RTM_DELNEIGH), Change(12, 5)),
        (tc(messages.RTM_DELQDISC), None),
        (b"", None),
    ],
)
def test_what_happens_in_a_pod(data: bytes, expected: Change | None) -> None:
    assert pod_change(data, 5) == expected
    assert pod_change(data, None) is None, "the host's own"


def verdict(program: bytes, data: bytes) -> bool:
    """What the kernel's interpreter of classic BPF says (Documentation/networking/filter.rst)."""
    code = list(struct.iter_unpack("=HBBI", program))
    place, accumulator = 0, 0
    load: dict[int, Callable[[int], int]] = {
        0x28: lambda at: int.from_bytes(data[at : at + 2], "big"),
        0x20: lambda at: int.from_bytes(data[at : at + 4], "big"),
        0x30: lambda at: data[at],
    }
    while True:
        what, if_true, if_false, number = code[place]
        place += 1
        if what in load:
            accumulator = load[what](number)
        elif what == 0x15:
            place += if_true if accumulator == number else if_false
        elif what == 0x45:
            place += if_true if accumulator & number else if_false
        else:
            assert what == 0x06
            return bool(number)


@pytest.mark.parametrize(("types", "new"), [(HOST_TYPES, True), (POD_TYPES, False)], ids=["host", "pod"])
def test_the_kernel_drops_what_nobody_reacts_to(types: tuple[int, ...], new: bool) -> None:
    program = changes.program(types, new=new)
    for kind in range(16, 128):
        passes = verdict(program, message(kind, bytes(64)))
        assert passes == (kind in types and kind != messages.RTM_DELNEIGH), f"type {kind}"
    for type_ in range(16):
        passes = verdict(program, neighbour(messages.RTM_DELNEIGH, type_))
        assert passes == (messages.RTM_DELNEIGH in types and type_ == messages.RTN_UNICAST), f"neighbour {type_}"
    assert verdict(program, link(messages.RTM_NEWLINK, DOWN, 1))
    for flags in (UP, DOWN):
        assert verdict(program, link(messages.RTM_NEWLINK, flags, NEW)) == new
        assert not verdict(program, link(messages.RTM_NEWLINK, flags, QUIET))
    assert not verdict(program, link(messages.RTM_NEWLINK, UP, 1))
