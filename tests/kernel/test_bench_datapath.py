"""The question datapath, asked on the running kernel: every contender has a figure in every case."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.measure import find, measure
from benchmarks.peers.paths import PEERS, REFERENCE_PLUGINS
from benchmarks.question import OURS, Effort, Place, read
from benchmarks.questions.datapath import FAMILIES, FEW, GROWING, UNJUDGED, WORKS
from benchmarks.results import compare


def test_every_contender_has_a_figure_in_every_case(tmp_path: Path) -> None:
    if not (REFERENCE_PLUGINS / "ptp").exists():
        pytest.skip("the reference plugins are missing: apt-get install containernetworking-plugins")
    samples = tmp_path / "samples.jsonl"
    measure("datapath", Place.HOST, Effort.SMOKE, samples)
    record = read(samples)
    assert record.failures == ()
    expected = {(f"{work.name}/{family}", name) for work in WORKS for family in FAMILIES for name in (OURS, *PEERS)}
    expected |= {(f"{work.name}/{family}/growth-4", n) for work in GROWING for family in FAMILIES for n in (OURS, FEW)}
    judged = (OURS, UNJUDGED, "loopback")
    expected |= {(f"{work.name}/{family}/rules-200", n) for work in GROWING for family in FAMILIES for n in judged}
    assert {(sample.case, sample.contender) for sample in record.samples} == expected
    assert all(math.isfinite(sample.value) and sample.value > 0 for sample in record.samples)
    found = compare(find("datapath"), record)
    assert len(found) == len(expected) - len({case for case, _ in expected})
    assert all(comparison.ratio is not None for comparison in found)
    # Each case says what is to be reached, but those that only explain.
    assert {c.peer for c in found if c.goal is None} <= {"loopback", "veth"}
