"""The demo's pure parts: rows, the verdict, and reading perftest's tables."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from testbed.container import Completed
from testbed.demo.rdma import last_figures, messages
from testbed.demo.rows import STEPS, passed, verdict
from testbed.rows import Figure, Row, StepError, measure, need, text, write

GOOD = [Row(step, True, 1.0, "ms", "") for step in STEPS]


def test_measure_makes_a_row() -> None:
    assert measure("tcp", lambda: Figure(2.5, "Gbit/s", "pod to pod")) == Row("tcp", True, 2.5, "Gbit/s", "pod to pod")


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (StepError("bytes differ"), "bytes differ"),
        (UnavailableError("no agent", operation="GET"), "no agent (GET)"),
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: [Errno 111] Connection refused"),
    ],
)
def test_measure_makes_a_failed_row_with_the_sentence(error: Exception, detail: str) -> None:
    def work() -> Figure:
        raise error

    assert measure("tcp", work) == Row("tcp", False, None, "", detail)


def test_measure_lets_bugs_pass() -> None:
    with pytest.raises(TypeError):
        measure("tcp", lambda: Figure(*()))  # type: ignore[call-arg]


def test_need() -> None:
    need(True, "never said")
    with pytest.raises(StepError, match="the reason"):
        need(False, "the reason")


def test_text() -> None:
    assert text(GOOD[0]).split() == ["ok", "agent", "1", "ms"]
    assert text(Row("tcp", False, None, "", "why")).split() == ["FAILED", "tcp", "why"]


def test_verdict_and_status_agree() -> None:
    assert (verdict(GOOD), passed(GOOD)) == ("demo: 9 of 9 steps passed", True)
    for rows in (GOOD[:-1], [*GOOD[:-1], Row("clean", False, None, "", "")], []):
        assert not passed(rows)
        assert verdict(rows) == f"demo: {sum(row.ok for row in rows)} of 9 steps passed"


def test_write_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    write(GOOD, tmp_path / "build" / "demo.json")
    rows = json.loads((tmp_path / "build" / "demo.json").read_text())
    assert [row["step"] for row in rows] == list(STEPS)
    assert all(list(row) == ["step", "ok", "value", "unit", "detail"] for row in rows)


LATENCY = """
 local address: LID 0000 QPN 0x0012 PSN 0x7a3f5c
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]  99%[usec]
 2       200          310.11         2903.32      402.75             498.10           220.35          1543.67
---------------------------------------------------------------------------------------
"""


def test_last_figures() -> None:
    assert last_figures(Completed(("ib_send_lat",), 0, LATENCY, "", 1.0))[:5] == [2, 200, 310.11, 2903.32, 402.75]
    rounded = LATENCY.replace("220.35", "-nan")
    assert last_figures(Completed(("ib_send_lat",), 0, rounded, "", 1.0))[4] == 402.75
    without_rate = Completed(("ib_send_lat",), 0, re.sub(r"\d+\.\d+", "inf", LATENCY), "", 1.0)
    assert last_figures(without_rate)[4] == math.inf
    assert messages(without_rate) == 200
    with pytest.raises(StepError, match="ib_send_lat printed no figures"):
        last_figures(Completed(("ib_send_lat",), 0, "Unable to connect\n", "", 1.0))
