"""Many guard entries in one update of the real map."""

from __future__ import annotations

import pytest

from rdmanet.errors import ExhaustedError, InputError
from rdmanet.model import DatagramEntry, GuardEntry, GuardState, address_key
from testbed.bpf.bench import Bench

OWN, PEER = address_key("10.213.0.1"), address_key("fd00:213::2")
GUARD_ENTRIES = 65536  # bpf/guard.h


def entries(count: int, state: GuardState = GuardState.GRANTED) -> list[tuple[tuple[bytes, int], GuardEntry]]:
    return [((OWN, 16 + n), GuardEntry(1000 + n, PEER, 500 + n, state, n, 2 * n)) for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 128])
def test_as_one_by_one(bench: Bench, count: int) -> None:
    bench.datapath.set_guards(entries(count))
    assert bench.datapath.guards() == dict(entries(count))
    bench.datapath.set_guards(entries(count, GuardState.REVOKED))
    assert {entry.state for entry in bench.datapath.guards().values()} <= {GuardState.REVOKED}


def test_a_full_map_is_named_and_keeps_what_fits(bench: Bench) -> None:
    with pytest.raises(ExhaustedError, match="map guard is full: it holds at most 65536 entries"):
        bench.datapath.set_guards(entries(GUARD_ENTRIES + 1))
    held = bench.datapath.guards()
    assert len(held) == GUARD_ENTRIES
    assert held[OWN, 16] == entries(1)[0][1]
    bench.datapath.set_guards(entries(10, GuardState.REVOKED))  # what is there can be changed
    bench.datapath.delete_guards(list(held))
    assert bench.datapath.guards() == {}


def test_datagrams_are_written_read_and_forgotten(bench: Bench) -> None:
    pairs = [((OWN, 16), (PEER, 500 + n)) for n in range(100)]
    written = {pair: DatagramEntry(1000 + n, n, 2 * n) for n, pair in enumerate(pairs)}
    for _ in range(2):
        bench.datapath.set_datagrams(list(written.items()))
        assert bench.datapath.datagrams() == written
    bench.datapath.delete_datagrams([*pairs[:40], (pairs[0][1], pairs[0][0]), *pairs[60:]])
    assert set(bench.datapath.datagrams()) == set(pairs[40:60])
    bench.datapath.set_datagrams([])
    bench.datapath.delete_datagrams(pairs)
    assert bench.datapath.datagrams() == {}
    with pytest.raises(InputError, match="24 bits"):
        bench.datapath.set_datagrams([(((OWN, 1 << 24), (PEER, 1)), DatagramEntry(1))])


@pytest.mark.parametrize("there", [[], [0], [3], [0, 1, 5], [*range(8)]])
def test_what_is_not_there_is_passed_over(bench: Bench, there: list[int]) -> None:
    keys = [(OWN, 16 + number) for number in range(8)]
    bench.datapath.set_guards([entries(8)[number] for number in there])
    bench.datapath.set_guard(PEER, 99, entries(1)[0][1])
    bench.datapath.delete_guards(keys)
    assert set(bench.datapath.guards()) == {(PEER, 99)}
