"""The collector on the table that the programs fill: both sides mean the same halves, times and shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.artifact import CONTINUATIONS
from rdmanet.datapath.flows import Candidate
from rdmanet.tracking import Tracking
from testbed.bpf.bench import REDIRECT, Bench
from testbed.bpf.lab import FIRST_PORT, LAST_PORT, UPLINK
from testbed.flow_halves import alias_key, inside_key
from testbed.service_entries import OUTSIDE, ServiceEntries
from tests.bpf.flows import entries
from tests.bpf.test_nat import FLOWS, VERSIONS, back, lose, only_port, out, outside_port
from tests.bpf.test_nodeport import NODE_PORT, call, ends, entered

__all__ = ["entered"]

LONG_AGO_S = 7500


@pytest.fixture
def tracking(bench: Bench) -> Iterator[Tracking]:
    with ThreadPoolExecutor(1) as executor:
        yield Tracking(bench.datapath.flows, lambda: [pod.id for pod in bench.lab.pods], executor, 1.0)


def age(bench: Bench) -> None:
    """As if nothing had come for a long time, longer perhaps than the machine is up."""
    then_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - LONG_AGO_S * 1_000_000_000
    for entry in entries(bench):
        entry.write(bench, last_seen_ns=then_ns, created_ns=then_ns, closing=3)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_masqueraded(bench: Bench, tracking: Tracking, kind: str, version: int) -> None:
    port = outside_port(out(bench, bench.web, kind, version))
    assert back(bench, kind, version, port).verdict == REDIRECT
    inside, alias = sorted(bench.datapath.flows.all(), key=lambda flow: flow.is_alias)
    assert (alias_key(inside), inside_key(alias)) == (alias.key, inside.key)
    assert tracking.collect() == 0
    assert bench.flow_count(bench.web) == 1
    age(bench)
    assert tracking.collect() == 2
    assert (entries(bench), bench.flow_count(bench.web)) == ([], 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_of_a_node_port(bench: Bench, entered: ServiceEntries, tracking: Tracking, version: int) -> None:
    entered.put(7, version, NODE_PORT, "tcp", ends(version, bench.web), scope=OUTSIDE)
    assert call(bench, "tcp", UPLINK[version], NODE_PORT).verdict == REDIRECT
    inside, alias = sorted(bench.datapath.flows.all(), key=lambda flow: flow.is_alias)
    assert (alias_key(inside), inside_key(alias)) == (alias.key, inside.key)
    age(bench)
    assert tracking.collect() == 2
    assert (entries(bench), bench.flow_count(bench.web)) == ([], 0)


def stale(bench: Bench, *, by_s: float, timeout_s: int, closing: int = 0) -> None:
    """Inside halves are idle for so much longer than a time."""
    for entry in entries(bench):
        if not entry.alias:
            then_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - int((timeout_s + by_s) * 1e9)
            entry.write(bench, last_seen_ns=then_ns, closing=closing)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kind", "closing", "replied", "timeout_s"),
    [
        ("echo", 0, False, 60),
        ("udp", 0, False, 120),
        ("udp", 0, True, 300),
        ("tcp", 0, False, 240),
        ("tcp", 0, True, 7440),
        ("tcp", 1, True, 7440),
        ("tcp", 3, True, 60),
    ],
)
def test_a_flow_goes_after_its_states_time(
    bench: Bench, tracking: Tracking, kind: str, closing: int, replied: bool, timeout_s: int, version: int
) -> None:
    port = outside_port(out(bench, bench.web, kind, version))
    if replied:
        assert back(bench, kind, version, port).verdict == REDIRECT
    stale(bench, by_s=-10, timeout_s=timeout_s, closing=closing)
    assert tracking.collect() == 0
    stale(bench, by_s=5, timeout_s=timeout_s, closing=closing)
    assert tracking.collect() == 2
    assert entries(bench) == []


@pytest.mark.parametrize("identifier", [0, 1, 2, 9])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_echos_halves_are_found_whatever_its_identifier(
    bench: Bench, tracking: Tracking, identifier: int, version: int
) -> None:
    outside_port(out(bench, bench.web, "echo", version, port=identifier))
    for entry in entries(bench):
        entry.write(bench, created_ns=1)
    assert tracking.collect() == 0
    age(bench)
    assert tracking.collect() == 2
    assert entries(bench) == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_outsides_half_without_the_other_is_an_orphan(
    bench: Bench, tracking: Tracking, kind: str, version: int
) -> None:
    outside_port(out(bench, bench.web, kind, version))
    lose(bench, alias=False)
    assert tracking.collect() == 0, "it has just been entered: the other half may come"
    (alias,) = entries(bench)
    then_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - 6 * 10**9
    alias.write(bench, created_ns=then_ns)
    assert tracking.collect() == 1
    assert entries(bench) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_an_orphan_of_a_flow_that_has_another_port_by_now(bench: Bench, tracking: Tracking, version: int) -> None:
    outside_port(out(bench, bench.web, "udp", version))
    (old,) = (entry for entry in entries(bench) if entry.alias)
    bench.clear("flows")
    only_port(bench, LAST_PORT)
    port = outside_port(out(bench, bench.web, "udp", version))
    old.write(bench, created_ns=1)
    assert tracking.collect() == 1
    assert back(bench, "udp", version, port).verdict == REDIRECT
    assert len(entries(bench)) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_anothers_outside_half_stays(bench: Bench, tracking: Tracking, version: int) -> None:
    """The port of an idle flow has been given to another one."""
    only_port(bench, FIRST_PORT)
    outside_port(out(bench, bench.web, "udp", version))
    (idle,) = (entry for entry in entries(bench) if not entry.alias)
    bench.clear("flows")
    outside_port(out(bench, bench.train_0, "udp", version))
    idle.write(bench, last_seen_ns=1)
    tracking.collect()
    assert idle.key not in {entry.key for entry in entries(bench)}
    assert back(bench, "udp", version, FIRST_PORT).verdict == REDIRECT


class Meanwhile:
    """The maps; something happens between the look and the collecting."""

    def __init__(self, bench: Bench, act: Callable[[], object]):
        self._flows, self._act = bench.datapath.flows, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flows, name)

    def collect(self, candidates: Sequence[Candidate]) -> list[bool]:
        self._act()
        return self._flows.collect(candidates)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_a_packet_that_comes_meanwhile_saves_its_flow(bench: Bench, kind: str, version: int) -> None:
    port = outside_port(out(bench, bench.web, kind, version))
    age(bench)
    with ThreadPoolExecutor(1) as executor:
        flows = Meanwhile(bench, lambda: out(bench, bench.web, kind, version))
        assert Tracking(flows, lambda: [pod.id for pod in bench.lab.pods], executor, 1.0).collect() == 0
    assert back(bench, kind, version, port).verdict == REDIRECT
    assert bench.flow_count(bench.web) == 1


def test_an_address_that_another_pod_has_by_now_keeps_its_flow(bench: Bench) -> None:
    """The pod has gone, and its address begins a flow of the same ends for another one."""
    outside_port(out(bench, bench.web, "udp", 4))
    (inside,) = (entry for entry in entries(bench) if not entry.alias)
    with ThreadPoolExecutor(1) as executor:
        flows = Meanwhile(bench, lambda: inside.write(bench, origin=bench.train_0.id))
        assert Tracking(flows, lambda: [bench.train_0.id], executor, 1.0).collect() == 0
    assert len(entries(bench)) == 2


def test_many_at_once(bench: Bench, tracking: Tracking) -> None:
    for number in range(50):
        outside_port(out(bench, bench.web, "udp", 4, port=5000 + number))
    for entry in entries(bench)[:33]:
        entry.write(bench, last_seen_ns=1)
    assert tracking.collect() == 66
    assert (len(entries(bench)), bench.flow_count(bench.web)) == (34, 17)


def test_nothing_is_collected_while_the_program_is_in_no_slot(bench: Bench, tracking: Tracking) -> None:
    outside_port(out(bench, bench.web, "udp", 4))
    age(bench)
    bpf.delete(bench.map("programs"), layout.U32.pack(CONTINUATIONS["collect"]))
    try:
        assert tracking.collect() == 0
    finally:
        bench.datapath.pins.fill_slots()
    assert tracking.collect() == 2


def test_a_miscounted_share_is_set_right(bench: Bench, tracking: Tracking) -> None:
    outside_port(out(bench, bench.web, "udp", 4))
    bench.set_flow_count(bench.web, 1000)
    bench.set_flow_count(bench.train_0, 7)
    tracking.collect()
    assert (bench.flow_count(bench.web), bench.flow_count(bench.train_0)) == (1, 0)


def test_the_flows_of_a_pod_that_has_gone_go(bench: Bench) -> None:
    outside_port(out(bench, bench.web, "udp", 4))
    outside_port(out(bench, bench.train_0, "udp", 4))
    with ThreadPoolExecutor(1) as executor:
        Tracking(bench.datapath.flows, lambda: [bench.train_0.id], executor, 1.0).collect()
    assert {flow.origin for flow in bench.datapath.flows.all() if not flow.is_alias} == {bench.train_0.id}
