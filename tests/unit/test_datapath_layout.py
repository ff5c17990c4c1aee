"""rdmanet.datapath.layout and the compiler's pure parts."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.datapath import layout
from rdmanet.datapath.artifact import Relocation
from rdmanet.datapath.compiler import _places, _program, compile_datapath
from rdmanet.datapath.layout import AttachmentEntry, EndpointEntry, NodeEntry, UplinkEntry
from rdmanet.errors import InputError, StateError, UnavailableError
from rdmanet.model import GuardEntry, GuardState

ADDRESS = st.binary(min_size=16, max_size=16)
MAC = st.binary(min_size=6, max_size=6)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PORTS = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted)


@given(MAC, U32, st.booleans(), PORTS, U32, U32, U32, st.booleans())
def test_node(
    mac: bytes, ifindex: int, masquerade: bool, ports: list[int], epoch: int, maglev: int, flows: int, monitor: bool
) -> None:
    entry = NodeEntry(mac, ifindex, masquerade, ports[0], ports[1], epoch, maglev, flows, monitor)
    assert NodeEntry.decode(entry.encode()) == entry


POLICY = (U32, U32, U32)  # identity, sets


@given(
    st.builds(AttachmentEntry, U32, MAC, ADDRESS, ADDRESS, st.booleans(), st.booleans(), st.integers(0, 255), *POLICY)
)
def test_attachment(entry: AttachmentEntry) -> None:
    raw = entry.encode(5)
    assert AttachmentEntry.decode(raw) == entry
    assert layout.attachment_slot(raw) == (entry.attachment_id, 5)


@given(st.builds(EndpointEntry, U32, MAC, U32, st.booleans(), st.booleans(), *POLICY))
def test_endpoint(entry: EndpointEntry) -> None:
    raw = entry.encode(5)
    assert EndpointEntry.decode(raw) == entry
    assert layout.endpoint_slot(raw) == (entry.attachment_id, 5)


@given(st.builds(UplinkEntry, ADDRESS, ADDRESS))
def test_uplink(entry: UplinkEntry) -> None:
    assert UplinkEntry.decode(entry.encode()) == entry


LEASE = st.integers(1, 2**63 - 1)
GUARDS = st.builds(GuardEntry, LEASE, ADDRESS, U32, st.sampled_from(GuardState), U64, U64, st.booleans())


@given(GUARDS)
def test_guard(entry: GuardEntry) -> None:
    assert layout.decode_guard(layout.encode_guard(entry)) == entry


@given(st.lists(st.tuples(st.tuples(ADDRESS, st.integers(0, 0xFFFFFF)), GUARDS), max_size=5))
def test_many_guards_are_encoded_as_one_by_one(entries: list[tuple[tuple[bytes, int], GuardEntry]]) -> None:
    keys, values = layout.encode_guards(entries)
    assert keys == b"".join(layout.encode_guard_key(*key) for key, _ in entries)
    assert values == b"".join(layout.encode_guard(entry) for _, entry in entries)


@pytest.mark.parametrize(
    ("address", "qpn", "peer"), [(b"x", 1, bytes(16)), (bytes(16), 1 << 24, bytes(16)), (bytes(16), 1, b"x")]
)
def test_a_wrong_key_among_many_is_refused(address: bytes, qpn: int, peer: bytes) -> None:
    with pytest.raises(InputError, match="no key of the guard map"):
        layout.encode_guards([((address, qpn), GuardEntry(1, peer, 2, GuardState.GRANTED))])


def test_a_guard_state_of_another_version_is_refused() -> None:
    raw = layout.GUARD.pack(1, 0, 0, bytes(16), 17, 4)
    with pytest.raises(StateError, match="state 4"):
        layout.decode_guard(raw)


@pytest.mark.parametrize("qpn", [-1, 1 << 24])
def test_a_qpn_has_24_bits(qpn: int) -> None:
    with pytest.raises(InputError, match="24 bits"):
        layout.encode_guard_key(bytes(16), qpn)


@pytest.mark.parametrize("ports", [(0, 10), (10, 9), (60000, 65536)])
def test_port_ranges(ports: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="no range of ports"):
        NodeEntry(bytes(6), 1, True, *ports).encode()


def test_places_name_fields_and_leave_padding_out() -> None:
    assert layout.ENDPOINT.places() == {
        "ifindex": (0, 4),
        "attachment": (4, 4),
        "flags": (8, 4),
        "mac": (12, 6),
        "slot": (20, 4),
        "identity": (24, 4),
        "ingress_set": (28, 4),
        "egress_set": (32, 4),
    }
    assert layout.ENDPOINT.size == 36


def test_bccs_descriptions_become_places() -> None:
    inner = ["address_key", [["word", "unsigned int", [4]]], "struct_packed"]
    described = [
        "x",
        [
            ["flag", "unsigned char"],
            ["__pad_1", "char", [7]],
            ["address", inner],
            ["n", "unsigned long long"],
            ["pad", "unsigned char", [3]],
        ],
        "struct_packed",
    ]
    assert _places(described) == {"flag": (0, 1), "address": (8, 16), "n": (24, 8)}
    assert _places("unsigned long long") == {"value": (0, 8)}


def test_map_descriptors_become_relocations() -> None:
    def instruction(opcode: int, source: int, immediate: int) -> bytes:
        return struct.pack("=BBhi", opcode, source << 4 | 1, 0, immediate)

    load_map = instruction(0x18, 1, 9) + bytes(8)
    load_number = instruction(0x18, 0, 9) + struct.pack("=BBhi", 0, 0, 0, 0x1018)
    leave = instruction(0x95, 0, 0)
    program = _program("pod", load_number + load_map + leave, {9: "endpoints"})
    assert program.relocations == (Relocation(2, "endpoints"),)
    assert program.instructions == load_number + instruction(0x18, 1, 0) + bytes(8) + leave


def test_without_headers_the_compiler_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nowhere")
    with pytest.raises(UnavailableError, match="set BCC_KERNEL_SOURCE"):
        compile_datapath(tmp_path)
