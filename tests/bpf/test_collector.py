"""The collector on the table that the programs fill: both sides mean the same halves, times and shares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rdmanet.tracking import Tracking, alias_key, inside_key
from tests.bpf.bench import REDIRECT, Bench
from tests.bpf.flows import entries
from tests.bpf.lab import UPLINK
from tests.bpf.test_nat import FLOWS, VERSIONS, back, out, outside_port
from tests.bpf.test_nodeport import NODE_PORT, call, ends, entered
from tests.kernel.service_entries import OUTSIDE, ServiceEntries

__all__ = ["entered"]

LONG_AGO_S = 7500


@pytest.fixture
def tracking(bench: Bench) -> Iterator[Tracking]:
    with ThreadPoolExecutor(1) as executor:
        yield Tracking(bench.datapath.flows, lambda: [pod.id for pod in bench.lab.pods], executor, 1.0)


def age(bench: Bench) -> None:
    """As if nothing had come for a long time. Where the machine is younger than that, the first tick of its clock."""
    then_ns = max(1, time.clock_gettime_ns(time.CLOCK_MONOTONIC) - LONG_AGO_S * 1_000_000_000)
    for entry in entries(bench):
        # Of an opened connection, which goes soonest: a young machine has no 7440 s to look back on.
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
