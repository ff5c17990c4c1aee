"""rdmanet.tracking over a table in memory: what may be over, and what is counted. The rest is in tests/bpf."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from rdmanet.datapath import tables
from rdmanet.datapath.flows import (
    ALIAS,
    NO_SLOT,
    ORIGIN_IS_HIGH,
    REPLIED,
    SERVICE,
    TRANSLATED,
    Candidate,
    Flow,
    Glance,
    key_of,
)
from rdmanet.model import address_key
from rdmanet.tracking import Tracking, timeout_s
from testbed.flow_halves import alias_key, inside_key

TCP, UDP, ICMP = 6, 17, 1
POD, OTHER_POD = 5, 6
End = tuple[str, int]


def end(of: End) -> tuple[bytes, bytes]:
    return address_key(of[0]), of[1].to_bytes(2, "big")


def flow(
    begun: End,
    aimed: End,
    protocol: int = TCP,
    *,
    idle_s: float = 0.0,
    age_s: float = 100.0,
    origin: int = POD,
    target: int = 0,
    flags: int = REPLIED,
    translated: End = ("::", 0),
    closing: int = 0,
    slot: int = 1,
) -> Flow:
    now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    key = key_of(end(begun), end(aimed), protocol)
    (low, low_port), (high, high_port) = sorted((end(begun), end(aimed)))
    if end(begun) == (high, high_port):
        flags |= ORIGIN_IS_HIGH
    address, port = end(translated)
    created, seen = now_ns - int(age_s * 1e9), now_ns - int(idle_s * 1e9)
    return Flow(
        key,
        low,
        high,
        low_port,
        high_port,
        protocol,
        created,
        seen,
        address,
        origin,
        target,
        slot,
        0,
        port,
        flags,
        closing,
    )


def masqueraded(
    protocol: int = TCP, *, idle_s: float = 0.0, port: int = 61000, own_port: int = 4000
) -> tuple[Flow, Flow]:
    """Both halves."""
    remote, pod, own = ("198.51.100.9", 80), ("10.0.0.5", own_port), ("192.0.2.1", port)
    if protocol == ICMP:
        answerer = (remote[0], {0: 1, 1: 2}.get(own_port, 0))
        inside = flow(pod, answerer, ICMP, idle_s=idle_s, flags=REPLIED | TRANSLATED, translated=own)
        alias = flow(own, (remote[0], 0), ICMP, flags=TRANSLATED | ALIAS, translated=pod, slot=NO_SLOT)
        return inside, alias
    inside = flow(pod, remote, protocol, idle_s=idle_s, flags=REPLIED | TRANSLATED, translated=own)
    return inside, flow(own, remote, protocol, flags=TRANSLATED | ALIAS, translated=pod, slot=NO_SLOT)


def served(*, idle_s: float = 0.0) -> tuple[Flow, Flow]:
    client, pod, service = ("198.51.100.9", 5000), ("10.0.0.5", 8080), ("192.0.2.1", 30080)
    kind = TRANSLATED | SERVICE
    inside = flow(client, pod, idle_s=idle_s, origin=0, target=POD, flags=kind | REPLIED, translated=service)
    return inside, flow(client, service, origin=77, target=POD, flags=kind | ALIAS, translated=pod, slot=NO_SLOT)


class Table:
    """The maps; the program says of everything that it is asked about that it is over, but for what is ``spared``."""

    max_entries = 1024

    def __init__(self, *entries: Flow, counts: Mapping[int, int] | None = None):
        self.entries = {entry.key: entry for entry in entries}
        self.said = dict(counts or {})
        self.asked: list[Candidate] = []
        self.spared: set[bytes] = set()

    def glances(self) -> Iterator[list[Glance]]:
        for flow in list(self.entries.values()):
            yield [Glance._make(getattr(flow, name) for name in Glance._fields)]

    def collect(self, candidates: Sequence[Candidate]) -> list[bool]:
        self.asked += candidates
        over = [one.key in self.entries and one.key not in self.spared for one in candidates]
        for one, gone in zip(candidates, over, strict=True):
            if gone:
                entry = self.entries.pop(one.key)
                if (other := alias_key(entry)) is not None:
                    self.entries.pop(other, None)
                if entry.slot in self.said:
                    self.said[entry.slot] -= 1
        return over

    def counts(self) -> dict[int, int]:
        return {slot: count for slot, count in self.said.items() if count}

    def set_counts(self, counts: Mapping[int, int]) -> None:
        self.said.update(counts)


def collect(table: Table, *attachments: Collection[int]) -> int:
    """``attachments``: what there are, each time that it is asked for."""
    answers = iter(attachments or [(POD, OTHER_POD)] * 2)
    with ThreadPoolExecutor(1) as executor:
        return Tracking(table, lambda: next(answers), executor, 1.0).collect()


ONE, TWO, THREE = ("10.0.0.5", 4000), ("10.0.0.6", 80), ("10.0.0.6", 81)


@pytest.mark.parametrize(
    ("protocol", "flags", "closing", "seconds_s"),
    [
        (TCP, REPLIED, 0, 7440),
        (TCP, 0, 0, 240),
        (TCP, REPLIED, 1, 7440),
        (TCP, REPLIED, 3, 60),
        (UDP, REPLIED, 0, 300),
        (UDP, 0, 0, 120),
        (ICMP, REPLIED, 0, 60),
        (58, 0, 0, 60),
        (132, REPLIED, 0, 300),
    ],
)
def test_the_time_of_each_state(protocol: int, flags: int, closing: int, seconds_s: int) -> None:
    assert timeout_s(flow(ONE, TWO, protocol, flags=flags, closing=closing, target=OTHER_POD)) == seconds_s


HALVES: dict[str, Callable[[], tuple[Flow, Flow]]] = {
    "tcp": masqueraded,
    "udp": lambda: masqueraded(UDP),
    **{f"echo {own_port}": partial(masqueraded, ICMP, own_port=own_port) for own_port in (0, 1, 2, 9)},
    "service": served,
}


@pytest.mark.parametrize("kind", HALVES)
def test_halves_know_each_other(kind: str) -> None:
    inside, alias = HALVES[kind]()
    assert alias_key(inside) == alias.key
    assert inside_key(alias) == inside.key


def test_what_is_asked_about() -> None:
    """What has been idle for the shortest of all times, and outside's halves that are not quite new."""
    table = Table(
        flow(ONE, TWO, idle_s=59, target=OTHER_POD),
        old := flow(ONE, THREE, idle_s=61, target=OTHER_POD),
        masqueraded(port=1)[1],
        served()[1]._replace(created_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC)),
    )
    table.spared = set(table.entries)
    assert collect(table) == 0
    assert table.asked == [Candidate(old.key, None), Candidate(masqueraded(port=1)[1].key, None)]


def test_what_goes_is_counted_with_its_other_half() -> None:
    table = Table(*masqueraded(idle_s=9999), flow(ONE, TWO, idle_s=9999, target=OTHER_POD))
    assert collect(table) == 3
    assert not table.entries


def test_flows_of_a_pod_that_has_gone() -> None:
    inside, alias = masqueraded()
    other = flow(("10.0.0.6", 1), ("10.0.0.7", 2), origin=OTHER_POD, target=7, slot=2)
    table = Table(inside, alias, other)
    table.spared = {alias.key}
    assert collect(table, (OTHER_POD, 7), (OTHER_POD, 7)) == 2
    assert list(table.entries) == [other.key]
    assert Candidate(inside.key, (POD, 0)) in table.asked


def test_flows_of_a_pod_that_comes_while_the_table_is_read_stay() -> None:
    table = Table(flow(ONE, TWO, target=OTHER_POD))
    assert collect(table, (POD,), (POD, OTHER_POD)) == 0
    assert table.asked == []


def test_shares_are_what_is_there() -> None:
    idle = flow(ONE, THREE, idle_s=9999, target=OTHER_POD, slot=3)
    table = Table(*masqueraded(), flow(ONE, TWO, target=OTHER_POD, slot=3), idle, counts={1: 5, 2: 9, 3: 2})
    table.spared = {masqueraded()[1].key}
    assert collect(table) == 1
    assert table.said == {1: 1, 2: 0, 3: 1}


def test_how_many_are_left() -> None:
    table = Table(*masqueraded(), flow(ONE, TWO, UDP, idle_s=9999, target=OTHER_POD))
    table.spared = {masqueraded()[1].key}
    with ThreadPoolExecutor(1) as executor:
        tracking = Tracking(table, lambda: [POD, OTHER_POD], executor, 1.0)
        tracking.collect()
    assert tracking.entries == 2


def test_the_lesser_end_comes_first() -> None:
    one, two = end(ONE), end(TWO)
    assert key_of(one, two, TCP) == key_of(two, one, TCP)
    assert tables.FLOW_KEY.size == len(key_of(one, two, TCP))
