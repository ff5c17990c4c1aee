"""The nouns: address keys, names of kernel objects, MACs."""

from __future__ import annotations

import dataclasses
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.model import GATEWAY_MAC, PodName, address_key, address_of, pod_mac
from tests.unit.test_store import wanted

MAX_IFNAME_BYTES = 15  # IFNAMSIZ less the end
MAX_DEVICE_NAME_BYTES = 63  # IB_DEVICE_NAME_MAX less the end


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("10.213.0.2", "00000000000000000000ffff0ad50002"),
        ("fd72:646d:616e::2", "fd72646d616e00000000000000000002"),
        ("::", "00" * 16),
        ("::1", "00" * 15 + "01"),
    ],
)
def test_address_key(text: str, key: str) -> None:
    assert address_key(text).hex() == key
    assert address_key(ipaddress.ip_address(text)).hex() == key
    assert str(address_of(bytes.fromhex(key))) == text


@given(st.ip_addresses())
def test_address_keys_lead_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    key = address_key(address)
    assert len(key) == 16
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    assert address_of(key) == (mapped or address), "an IPv4-mapped IPv6 address is the IPv4 address"


@given(st.integers(1, 2**32 - 1))
def test_macs_are_local_unicast_and_nobody_elses(number: int) -> None:
    mac = pod_mac(number)
    assert mac != GATEWAY_MAC
    first = int(mac[:2], 16)
    assert first & 0b11 == 0b10
    assert int(mac.replace(":", "")[4:], 16) == number


@given(st.integers(1, 2**31))
def test_kernel_names_fit(number: int) -> None:
    attachment = wanted(id=number)
    assert len(attachment.host_ifname) <= MAX_IFNAME_BYTES
    assert len(attachment.device_name) <= MAX_DEVICE_NAME_BYTES


def test_addresses_are_ipv4_first_and_those_that_exist() -> None:
    both = wanted()
    assert [address.version for address in both.addresses] == [4, 6]
    assert [a.version for a in dataclasses.replace(both, ipv4=None).addresses] == [6]
    assert dataclasses.replace(both, ipv4=None, ipv6=None).addresses == ()


def test_pod_names_are_written_with_their_namespace() -> None:
    assert str(PodName("default", "train-0")) == "default/train-0"
