"""rdmanet.tracking over a table in memory: what is taken out, in which order, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from rdmanet.datapath import tables
from rdmanet.datapath.flows import ALIAS, NO_SLOT, ORIGIN_IS_HIGH, REPLIED, SERVICE, TRANSLATED, Flow, key_of
from rdmanet.model import address_key
from rdmanet.tracking import Tracking, alias_key, inside_key, timeout_s

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
    """The maps, and what was asked of them in order."""

    def __init__(self, *entries: Flow, counts: Mapping[int, int] | None = None):
        self.entries = {entry.key: entry for entry in entries}
        self.said = dict(counts or {})
        self.taken: list[bytes] = []
        self.reads = 0
        self.revived: dict[bytes, Flow] = {}  # touched by a packet after the table was read

    max_entries = 1024

    def all(self) -> Iterator[Flow]:
        self.reads += 1
        yield from list(self.entries.values())

    def find(self, key: bytes) -> Flow | None:
        return self.revived.get(key) or self.entries.get(key)

    def take(self, key: bytes) -> Flow | None:
        self.taken.append(key)
        return self.entries.pop(key, None)

    def put_back(self, flow: Flow) -> None:
        self.entries.setdefault(flow.key, flow)

    def counts(self) -> dict[int, int]:
        return dict(self.said)

    def set_counts(self, counts: Mapping[int, int]) -> None:
        self.said.update(counts)


def collect(table: Table, attachments: Collection[int] = (POD, OTHER_POD)) -> int:
    with ThreadPoolExecutor(1) as executor:
        return Tracking(table, lambda: attachments, executor, 1.0).collect()


ONE, TWO = ("10.0.0.5", 4000), ("10.0.0.6", 80)


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
def test_a_flow_goes_after_its_states_time(protocol: int, flags: int, closing: int, seconds_s: int) -> None:
    def idle(idle_s: float) -> Flow:
        return flow(ONE, TWO, protocol, idle_s=idle_s, flags=flags, closing=closing, target=OTHER_POD)

    assert timeout_s(idle(0)) == seconds_s
    young, old = Table(idle(seconds_s - 5)), Table(idle(seconds_s + 5))
    assert (collect(young), len(young.entries)) == (0, 1)
    assert (collect(old), len(old.entries)) == (1, 0)


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
    table = Table(inside, alias)
    assert collect(table) == 0
    assert len(table.entries) == 2


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_both_halves_go_together_outsides_first(protocol: int) -> None:
    inside, alias = masqueraded(protocol, idle_s=9999)
    table = Table(inside, alias)
    assert collect(table) == 2
    assert table.taken == [alias.key, inside.key]


def test_a_services_flow_goes_with_its_alias() -> None:
    table = Table(*served(idle_s=9999))
    assert collect(table) == 2
    assert not table.entries


def test_a_half_without_the_other_is_an_orphan() -> None:
    _, alias = masqueraded()
    assert collect(Table(alias)) == 1
    # Of a flow that has another port by now.
    inside, _ = masqueraded(port=61001)
    table = Table(inside, alias)
    assert collect(table) == 1
    assert list(table.entries) == [inside.key]


def test_a_half_that_has_just_been_entered_waits_for_the_other() -> None:
    _, alias = masqueraded()
    young = alias._replace(created_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC))
    assert collect(Table(young)) == 0


def test_a_packet_that_comes_meanwhile_saves_its_flow() -> None:
    inside, alias = masqueraded(idle_s=9999)
    table = Table(inside, alias)
    table.revived[inside.key] = masqueraded()[0]
    assert collect(table) == 0
    assert len(table.entries) == 2


class Racing(Table):
    """A program does something right before the entry of a key is taken."""

    def __init__(self, *entries: Flow, before: bytes, act: Callable[[Racing], None]):
        super().__init__(*entries)
        self.before, self.act = before, act

    def take(self, key: bytes) -> Flow | None:
        if key == self.before:
            self.act(self)
        return super().take(key)


@pytest.mark.parametrize("which", ["alias", "inside"])
def test_a_flow_that_begins_anew_before_it_is_taken_stays_with_both_halves(which: str) -> None:
    """Under the same key and behind the same port, as port searches begin at the same place."""
    inside, alias = masqueraded(idle_s=9999)
    anew, half = masqueraded()
    half = half._replace(created_ns=half.created_ns + 1)

    def begin_anew(table: Racing) -> None:
        table.entries |= {anew.key: anew} | ({half.key: half} if which == "alias" else {})

    table = Racing(inside, alias, before={"alias": alias, "inside": inside}[which].key, act=begin_anew)
    assert collect(table) == 0
    assert table.entries == {anew.key: anew, alias.key: half if which == "alias" else alias}


def test_a_flow_that_a_program_is_entering_keeps_its_outside_half() -> None:
    """The idle entry has been removed, the new alias is there and the rest not yet."""
    inside, alias = masqueraded(idle_s=9999)
    young = alias._replace(created_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC))

    def enter_half(table: Racing) -> None:
        del table.entries[inside.key]
        table.entries[alias.key] = young

    table = Racing(inside, alias, before=alias.key, act=enter_half)
    assert collect(table) == 0
    assert table.entries == {alias.key: young}


def test_an_orphan_that_is_found_again_stays() -> None:
    inside, alias = masqueraded()

    def enter(table: Racing) -> None:
        table.entries[inside.key] = inside

    table = Racing(alias, before=alias.key, act=enter)
    assert collect(table) == 0
    assert set(table.entries) == {inside.key, alias.key}


def test_an_alias_whose_flow_was_entered_while_the_table_was_read_is_not_taken() -> None:
    inside, alias = masqueraded()
    table = Table(alias)
    table.revived[inside.key] = inside
    assert collect(table) == 0
    assert table.taken == []


def test_anothers_alias_stays() -> None:
    """The port has been given to another flow: its half is not the idle one's."""
    idle, _ = masqueraded(idle_s=9999)
    remote, pod, own = ("198.51.100.9", 80), ("10.0.0.5", 4001), ("192.0.2.1", 61000)
    other = flow(pod, remote, flags=REPLIED | TRANSLATED, translated=own)
    alias = flow(own, remote, flags=TRANSLATED | ALIAS, translated=pod, slot=NO_SLOT)
    table = Table(idle, other, alias)
    assert collect(table) == 1
    assert set(table.entries) == {other.key, alias.key}


def test_flows_of_a_pod_that_has_gone_go_at_once() -> None:
    table = Table(*masqueraded(), flow(("10.0.0.6", 1), ("10.0.0.7", 2), origin=OTHER_POD, target=7, slot=2))
    assert collect(table, attachments=(OTHER_POD, 7)) == 2
    assert [entry.origin for entry in table.entries.values()] == [OTHER_POD]


def test_shares_are_what_is_there() -> None:
    table = Table(*masqueraded(), flow(ONE, TWO, target=OTHER_POD, slot=3), counts={1: 5, 2: 9, 3: 1})
    collect(table)
    assert table.said == {1: 1, 2: 0, 3: 1}


def test_an_empty_table_is_not_looked_at_twice() -> None:
    table = Table()
    assert collect(table) == 0
    assert (table.reads, table.taken) == (1, [])


def test_the_lesser_end_comes_first() -> None:
    one, two = end(ONE), end(TWO)
    assert key_of(one, two, TCP) == key_of(two, one, TCP)
    assert tables.FLOW_KEY.size == len(key_of(one, two, TCP))
