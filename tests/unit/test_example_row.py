"""benchmarks.accept.rdma.allreduce: what it takes for agreement, and what it makes of the pods' reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accept.rdma.allreduce import agreement, ring_bytes, step_times
from benchmarks.step_plot import draw_steps
from testbed.rows import StepError

LOSSES = [3.0, 2.0, 1.0]


def report(transport: str = "rdma", digest: str = "a", shift: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "transport": transport,
        "hidden": 4,
        "gradient_bytes": 1000,
        "parameters_sha256": digest,
        "losses": [loss + shift for loss in LOSSES],
        "step_s": [9.0, 0.002, 0.004],
        "reduce_s": [8.0, 0.001, 0.002],
        "ready_s": 0.1,
        **more,
    }


def alone(shift: float = 0.0, difference: float = 0.0) -> dict[str, Any]:
    return {"losses": [loss + shift for loss in LOSSES], "difference": difference}


def test_agreement_is_the_largest_difference() -> None:
    trainings = [[report(alone=alone(difference=3e-16)), report(shift=2e-15)], [report("tcp"), report("tcp")]]
    assert agreement(trainings) == pytest.approx(2e-15, rel=0.2)


@pytest.mark.parametrize(
    ("trainings", "sentence"),
    [
        ([[report(alone=alone()), report(digest="b")]], "2 different results of 2 processes"),
        ([[report(alone=alone(difference=1e-6))]], "1e-06 from one process alone"),
        ([[report(alone=alone(shift=0.5))]], "0.5 from one process alone"),
        ([[report(losses=[1.0, 1.0], alone={"losses": [1.0, 1.0], "difference": 0})]], "nothing was learned"),
    ],
)
def test_what_is_no_agreement(trainings: list[list[dict[str, Any]]], sentence: str) -> None:
    with pytest.raises(StepError, match=sentence):
        agreement(trainings)


def test_each_process_sends_nearly_two_gradients_a_step() -> None:
    trainings = [[report()] * 4, [report("tcp")] * 4, [report()] * 4]
    assert ring_bytes(trainings, "rdma") == 2 * len(LOSSES) * 1500
    assert ring_bytes(trainings, "tcp") == len(LOSSES) * 1500


def test_a_step_is_as_slow_as_its_slowest_process(tmp_path: Path) -> None:
    slow = report(step_s=[1.0, 0.001, 0.010], reduce_s=[1.0, 0.0005, 0.009], ready_s=0.3)
    rows = step_times(6, [[report(), slow]])
    assert rows == [
        {
            "transport": "rdma",
            "family": 6,
            "gradient_bytes": 1000,
            "step_ms": [2, 10],
            "reduce_ms": [1, 9],
            "ready_ms": 300,
        }
    ]
    files = draw_steps([*rows, *step_times(4, [[report("tcp")]])], tmp_path / "steps")
    assert [file.suffix for file in files] == [".png", ".svg"]
    assert all(words in files[1].read_text() for words in ("TCP sockets", "IPv6", "1 KB"))
