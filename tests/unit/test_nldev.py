"""The kernel's list of queue pairs and a device's counters, as bytes."""

from __future__ import annotations

import struct

import pytest

from rdmanet.netlink.batch import Reply
from rdmanet.netlink.nldev import RES_LQPN, RES_PID, Reading, _attributes, _reading


def attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def test_attributes_of_all_lengths() -> None:
    found = [(RES_LQPN, b"\x11\x00\x00\x00"), (29, b"ib_core\x00x"), (RES_PID, b"\x2a\x00\x00\x00"), (27, b"\x03")]
    raw = b"".join(attribute(kind, content) for kind, content in found)
    assert [*_attributes(raw)] == found


def test_a_nested_flag_is_no_part_of_the_type() -> None:
    assert [*_attributes(attribute(20 | 1 << 15, b""))] == [(20, b"")]


@pytest.mark.parametrize("raw", [b"", b"\x08\x00", b"\x00\x00\x15\x00\x11\x00\x00\x00", b"\x03\x00\x15\x00"])
def test_what_is_cut_off_ends_the_list(raw: bytes) -> None:
    assert [*_attributes(raw)] == []


def test_what_a_device_shows() -> None:
    def counter(name: str, value: int) -> bytes:
        return attribute(81, attribute(82, name.encode() + b"\0") + attribute(83, struct.pack("=Q", value)))

    port = Reply(payloads=[attribute(2, b"rxe0\0") + attribute(12, b"\x04")])
    counted = Reply(payloads=[attribute(80, counter("sent_pkts", 1 << 40) + counter("rcvd_rnr_err", 0))])
    assert _reading(port, counted) == Reading(True, {"sent_pkts": 1 << 40, "rcvd_rnr_err": 0})
    down = Reply(payloads=[attribute(12, b"\x01")])
    assert _reading(down, Reply(errno=22)) == Reading(False, {})
    assert _reading(Reply(errno=22), Reply(errno=22)) is None
