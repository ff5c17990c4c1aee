"""The question services, asked on the running kernel: every contender that it can have has a figure in every case."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.measure import find, measure
from benchmarks.peers.kube_proxy import why_no_ipvs
from benchmarks.peers.paths import REFERENCE_PLUGINS
from benchmarks.question import OURS, Effort, Place, read
from benchmarks.questions.services import ALONE, BARE, FAMILIES, IPTABLES, IPVS
from benchmarks.results import compare
from testbed.host import Host

FEW, MANY = 1, 20


def test_every_contender_has_a_figure_in_every_case(tmp_path: Path) -> None:
    if not (REFERENCE_PLUGINS / "ptp").exists():
        pytest.skip("the reference plugins are missing: apt-get install containernetworking-plugins")
    with Host.scratch("ipvs-there") as host:
        peers = [IPTABLES] if why_no_ipvs(host) else [IPTABLES, IPVS]
    samples = tmp_path / "samples.jsonl"
    measure("services", Place.HOST, Effort.SMOKE, samples)
    record = read(samples)
    assert record.failures == ()
    expected = {
        (f"{kind}/{family}/{size}", name)
        for kind in ("through", "direct", "added")
        for family in FAMILIES
        for size in (FEW, MANY)
        for name in (OURS, *peers, *([ALONE] if size == MANY else []), *([BARE] if kind == "direct" else []))
    }
    assert {(sample.case, sample.contender) for sample in record.samples} == expected
    assert all(math.isfinite(sample.value) for sample in record.samples)
    assert all(sample.value > 0 for sample in record.samples if not sample.case.startswith("added"))
    found = compare(find("services"), record)
    assert len(found) == len(expected) - len({case for case, _ in expected})
    assert {c.peer for c in found if c.goal is not None} == {ALONE}
