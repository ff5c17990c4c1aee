"""Flows that are entered are counted once for each pod of theirs, by direction; packets of known flows are not."""

from __future__ import annotations

import pytest

from rdmanet.datapath import bpf
from rdmanet.datapath.layout import COUNTER_SLOTS
from rdmanet.datapath.tables import BEGUN
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, Bench, between, host_frame, pod_frame
from testbed.bpf.lab import GATEWAYS, UPLINK
from testbed.bpf.packets import TCP, Ip
from testbed.service_entries import OUTSIDE, ServiceEntries
from tests.bpf.test_nat import FLOWS, PORT, VERSIONS, back, only_port, out, outside_port
from tests.bpf.test_nodeport import NODE_PORT, answer, call, ends, entered

__all__ = ["entered"]


def begun(bench: Bench) -> dict[tuple[int, str], int]:
    """Of all pods, since the last run began."""
    return bench.datapath.flows.begun()


@pytest.mark.parametrize("version", VERSIONS)
def test_between_pods(bench: Bench, version: int) -> None:
    one, two = bench.train_0, bench.web
    assert bench.from_pod(one, pod_frame(one, between(one, two, version))).verdict == REDIRECT
    assert begun(bench) == {(one.id, "from_pod"): 1, (two.id, "to_pod"): 1}
    assert bench.datapath.flows.shares() == {one.id: 1}
    # Known by now.
    assert bench.from_pod(one, pod_frame(one, between(one, two, version))).verdict == REDIRECT
    assert begun(bench) == {}
    other_way = between(two, one, version, TCP, packets.tcp(80, 40000))
    assert bench.from_pod(two, pod_frame(two, other_way)).verdict == REDIRECT
    assert begun(bench) == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_from_the_host(bench: Bench, version: int) -> None:
    packet = Ip(GATEWAYS[version], bench.web.addresses[version], TCP, packets.tcp(40000, 80))
    assert bench.from_host(host_frame(packet)).verdict == REDIRECT
    assert begun(bench) == {(bench.web.id, "to_pod"): 1}
    assert bench.datapath.flows.shares() == {bench.web.id: 1}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_masqueraded(bench: Bench, kind: str, version: int) -> None:
    port = outside_port(out(bench, bench.web, kind, version))
    assert begun(bench) == {(bench.web.id, "from_pod"): 1}
    assert back(bench, kind, version, port).verdict == REDIRECT
    assert begun(bench) == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_of_a_node_port(bench: Bench, entered: ServiceEntries, version: int) -> None:
    entered.put(7, version, NODE_PORT, "tcp", ends(version, bench.web), scope=OUTSIDE)
    assert call(bench, "tcp", UPLINK[version], NODE_PORT).verdict == REDIRECT
    assert begun(bench) == {(bench.web.id, "to_pod"): 1}
    assert answer(bench, bench.web, "tcp", version).verdict == REDIRECT
    assert begun(bench) == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_refused_has_not_begun(bench: Bench, version: int) -> None:
    only_port(bench, 61000)
    assert outside_port(out(bench, bench.web, "udp", version)) == 61000
    outcome = out(bench, bench.web, "udp", version, port=PORT + 1)
    assert (outcome.verdict, set(outcome.drops)) == (SHOT, {(bench.web.id, "nat_no_port")})
    assert begun(bench) == {}


def test_the_map_has_a_place_for_every_slot(bench: Bench) -> None:
    info = bpf.map_info(bench.map("flows_begun"))
    assert (info.max_entries, info.value_size) == (COUNTER_SLOTS, BEGUN.size)
