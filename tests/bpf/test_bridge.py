"""Flows that begin in the middle of a swap that makes their table anew: programs find them in the old one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rdmanet.datapath import bpf, migration, programs
from rdmanet.datapath.artifact import Artifact
from testbed.bpf import lab, packets
from testbed.bpf.bench import REDIRECT, Bench
from tests.bpf.test_nat import FLOWS, VERSIONS, back, only_port, out, outside_port


@pytest.fixture(scope="module")
def own_bench() -> Iterator[Bench]:
    """Swaps replace the map that the other tests' bench has open."""
    lab.require_root()
    with Bench.build(lab.artifact()) as bench:
        yield bench


@pytest.fixture
def bench(own_bench: Bench) -> Bench:
    own_bench.lab.forget_maps()
    own_bench.reset()
    return own_bench


def sized(artifact: Artifact, more: int) -> Artifact:
    """Another artifact with the same programs, whose table of flows is larger."""
    flows = artifact.maps["flows"]
    maps = {**artifact.maps, "flows": replace(flows, max_entries=flows.max_entries + more)}
    return replace(artifact, hash=f"{abs(more):08x}" + artifact.hash[8:], maps=maps)


@contextmanager
def in_the_middle(moment: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> Iterator[None]:
    """Inside, a swap calls ``act`` when it waits for replaced programs for the ``moment``-th time."""
    real, times = migration.wait_for_programs, 0

    def wait() -> None:
        nonlocal times
        real()
        if times == moment:
            act()
        times += 1

    monkeypatch.setattr(migration, "wait_for_programs", wait)
    yield
    monkeypatch.undo()
    assert times == 2, "a swap that makes the table anew exchanges its programs twice"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_an_answer_to_what_only_the_old_table_knows_comes_in(
    bench: Bench, kind: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has been copied when the bridging programs begin to run."""
    port = outside_port(out(bench, bench.web, kind, version))
    verdicts: list[int] = []

    def answer() -> None:
        new = bpf.get(bench.lab.pins / "flows~new")
        assert new is not None
        try:
            assert list(bpf.keys(new, 40, 1000)) == []
        finally:
            os.close(new)
        verdicts.append(back(bench, kind, version, port).verdict)
        # The pod goes on behind the same port.
        verdicts.append(outside_port(out(bench, bench.web, kind, version)))

    with in_the_middle(0, monkeypatch, answer):
        bench.datapath.swap(sized(bench.lab.artifact, 16))
    assert verdicts == [REDIRECT, port]
    assert back(bench, kind, version, port).verdict == REDIRECT
    bench.datapath.swap(bench.lab.artifact)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FLOWS)
def test_an_outside_port_is_whose_it_is_by_now(
    bench: Bench, kind: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap has begun; the collector takes a flow out, old programs give its port to another flow, and that one's
    answer meets the bridging programs."""
    only_port(bench, lab.FIRST_PORT)
    outside_port(out(bench, bench.web, kind, version))
    put = programs.Loaded.put
    destinations: list[str] = []

    def put_late(loaded: programs.Loaded, array: int, directory: Path) -> None:
        if not destinations:
            bench.lab.forget_maps()
            bench.clear("flows")
            outside_port(out(bench, bench.train_0, kind, version))
        put(loaded, array, directory)
        answer = back(bench, kind, version, lab.FIRST_PORT)
        assert answer.verdict == REDIRECT, answer.drops
        destinations.append(packets.look(answer.frame).destination)

    monkeypatch.setattr(programs.Loaded, "put", put_late)
    bench.datapath.swap(sized(bench.lab.artifact, 48))
    monkeypatch.undo()
    assert destinations == [bench.train_0.addresses[version]] * 2
    bench.datapath.swap(bench.lab.artifact)


def test_flows_that_have_no_room_any_more_are_lost_and_the_swap_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new table is as large as the old one's contents when it is made, and another flow begins before these are
    copied: it stays, and as much of the others is lost."""
    for number in range(2):
        outside_port(out(bench, bench.web, "udp", 4, port=5000 + number))
    begun: list[int] = []
    smaller = 4 - bench.lab.artifact.maps["flows"].max_entries

    def begin() -> None:
        begun.append(outside_port(out(bench, bench.web, "udp", 4, port=6000)))

    with in_the_middle(0, monkeypatch, begin):
        bench.datapath.swap(sized(bench.lab.artifact, smaller))
    assert "2 entries of the old table of flows had no room in the new one" in caplog.text
    assert len(list(bench.datapath.flows.all())) == 4
    assert back(bench, "udp", 4, begun[0]).verdict == REDIRECT
    bench.datapath.swap(bench.lab.artifact)


def test_the_old_table_is_let_go(bench: Bench) -> None:
    """Programs that go on hold the new one alone, and nothing but what is there is found."""
    port = outside_port(out(bench, bench.web, "udp", 4))
    bench.datapath.swap(sized(bench.lab.artifact, 32))
    maps = {name: bpf.get(bench.lab.pins / name) for name in ("flows", "flows_before")}
    try:
        sizes = {name: bpf.map_info(found).max_entries for name, found in maps.items() if found is not None}
        assert sizes == {"flows": bench.lab.artifact.maps["flows"].max_entries + 32, "flows_before": 1}
    finally:
        for found in maps.values():
            if found is not None:
                os.close(found)
    bench.lab.forget_maps()
    bench.clear("flows")
    assert back(bench, "udp", 4, port).verdict != REDIRECT
    bench.datapath.swap(bench.lab.artifact)
