"""The questions of the benchmark harness that are asked on the running kernel: one iteration each works, whatever its
figures are."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testbed.paths import REPOSITORY

REFERENCE = ("ptp", "ptp+ipMasq", "bridge", "bridge+ipMasq")
ALONE = "rdmanet without pods"

#: Question → the peers of each case.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "cni": {
        **dict.fromkeys(("add/1 p50", "add/2 p50"), (*REFERENCE, "an empty process")),
        **dict.fromkeys(("del/1 p50", "del/2 p50", "del-until-gone/1 p50"), REFERENCE),
        **dict.fromkeys(("add/1 with 2 pods p50", "del/1 with 2 pods p50"), REFERENCE),
        "add-dad/1 p50": ("ptp", "bridge"),
    },
    "agent": {
        **{f"{case}/{n} p50": ("limit",) for case in ("memory", "memory-adopted", "adopt") for n in (0, 2)},
        **{f"{case}/2 p50": (ALONE,) for case in ("memory-private", "idle", "restart", "status-api")},
        "status-cni/0 p50": ("an empty process",),
        "status-cni/2 p50": ("an empty process",),
    },
    "churn": dict.fromkeys(("add/2 p50", "del/2 p50", "pair/2 p50"), ("ptp", "ptp+ipMasq")),
}
#: May be nothing at all, and then has no ratio.
ZERO_IS_FINE = {"idle/2 p50"}


@pytest.mark.parametrize("name", EXPECTED)
def test_one_iteration(name: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    if not Path("/usr/lib/cni/ptp").exists():
        pytest.skip("needs /usr/lib/cni/ptp: install containernetworking-plugins")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench", "--only", name, "--effort", "smoke", "--output", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())
    found = {(row["case"], row["peer"]): row for row in rows}
    for case, peers in EXPECTED[name].items():
        for peer in peers:
            row = found[case, peer]
            figures = [row["ours"], row["peer_value"]] + ([] if case in ZERO_IS_FINE else [row["ratio"]])
            assert all(isinstance(figure, float) and math.isfinite(figure) for figure in figures), row
            assert row["question"] == name
            assert row["unit"]
    for suffix in ("png", "svg"):
        for figure in ("ratios", "samples"):
            assert (tmp_path / f"{name}-{figure}.{suffix}").stat().st_size > 1000
    assert name in (tmp_path / "table.md").read_text()
