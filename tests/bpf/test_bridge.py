"""Flows that begin in the middle of a swap that makes their table anew: programs find them in the old one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from rdmanet.datapath import bpf, migration
from rdmanet.datapath.artifact import Artifact
from tests.bpf import lab
from tests.bpf.bench import REDIRECT, Bench
from tests.bpf.test_nat import FLOWS, VERSIONS, back, out, outside_port


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
    return replace(artifact, hash=f"{more:08x}" + artifact.hash[8:], maps=maps)


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
    """The new table is emptied when the bridging programs run: as if all flows had begun since it was filled."""
    port = outside_port(out(bench, bench.web, kind, version))
    verdicts: list[int] = []

    def lose_and_answer() -> None:
        new = bpf.get(bench.lab.pins / "flows~new")
        assert new is not None
        try:
            for key in bpf.keys(new, 40, 1000):
                bpf.delete(new, key)
        finally:
            os.close(new)
        verdicts.append(back(bench, kind, version, port).verdict)
        # The pod goes on behind the same port.
        verdicts.append(outside_port(out(bench, bench.web, kind, version)))

    with in_the_middle(0, monkeypatch, lose_and_answer):
        bench.datapath.swap(sized(bench.lab.artifact, 16))
    assert verdicts == [REDIRECT, port]
    assert back(bench, kind, version, port).verdict == REDIRECT
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
    for flow in list(bench.datapath.flows.all()):
        bench.datapath.flows.take(flow.key)
    assert back(bench, "udp", 4, port).verdict != REDIRECT
    bench.datapath.swap(bench.lab.artifact)
