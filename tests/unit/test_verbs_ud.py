"""Datagrams: who a message is from, by the header that the device writes before it."""

from __future__ import annotations

import ipaddress
import secrets

import pytest

from rdmanet.model import address_key

pytest.importorskip("pyverbs", reason="needs pyverbs (python3-pyverbs)")
from rdmanet.verbs.ud import GRH_BYTES, source_of

OWN = (address_key("10.0.0.2"), address_key("fd00::2"))


def ipv4(source: str, destination: str, before: bytes = bytes(20), first: int = 0x45) -> bytes:
    addresses = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(destination).packed
    return before + bytes([first]) + bytes(11) + addresses


def ipv6(source: str, destination: str, first: int = 0x60) -> bytes:
    addresses = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(destination).packed
    return bytes([first]) + bytes(7) + addresses


@pytest.mark.parametrize("before", [bytes(20), b"\x60" + bytes(19), b"\xff" * 20, secrets.token_bytes(20)])
def test_ipv4_source_whatever_is_before_it(before: bytes) -> None:
    header = ipv4("10.0.0.3", "10.0.0.2", before)
    assert len(header) == GRH_BYTES
    assert source_of(header, OWN) == address_key("10.0.0.3")


def test_ipv6_source() -> None:
    assert source_of(ipv6("fd00::3", "fd00::2"), OWN) == address_key("fd00::3")


@pytest.mark.parametrize(
    "header",
    [
        bytes(40),
        b"\xff" * 40,
        ipv4("10.0.0.3", "10.0.0.4"),
        ipv4("10.0.0.3", "10.0.0.2", first=0x46),
        ipv6("fd00::3", "fd00::4"),
        ipv6("fd00::3", "fd00::2", first=0x40),
    ],
)
def test_what_was_not_for_this_pod_has_no_source(header: bytes) -> None:
    assert source_of(header, OWN) == b""
