"""The benchmark harness' questions about RDMA: one iteration each works, whatever its figures are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.measure import find, measure
from benchmarks.question import Effort, Place, read
from benchmarks.questions.rdma import SMOKE_TESTS
from benchmarks.results import compare
from rdmanet.model import RdmaMode

#: Question → the peers of each case.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "rdma": {
        **{f"{test}/64B": ("routed", "one veth") for test in SMOKE_TESTS},
        "python/write-lat/64KiB": ("perftest",),
    },
    "lease": {
        "cold": ("rdma_cm",),
        "one more": ("rdma_cm",),
        "batch-64": ("rdma_cm",),
        "batch-64/small": ("rdma_cm",),
        "warm": ("rdma_cm",),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_one_iteration(name: str, tmp_path: Path, rdma_mode: RdmaMode) -> None:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    samples = tmp_path / "samples.jsonl"
    measure(name, Place.VM, Effort.SMOKE, samples)
    record = read(samples)
    assert not record.failures
    comparisons = {(c.case, c.peer): c for c in compare(find(name), record)}
    assert set(comparisons) == {(case, peer) for case, peers in EXPECTED[name].items() for peer in peers}
    for comparison in comparisons.values():
        for figure in (comparison.ours, comparison.peer_value, comparison.ratio):
            assert figure is not None, comparison
            assert math.isfinite(figure), comparison
            assert figure > 0, comparison
