"""The kernel's list of queue pairs, as bytes."""

from __future__ import annotations

import struct

import pytest

from rdmanet.netlink.nldev import RES_LQPN, RES_PID, _attributes


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
