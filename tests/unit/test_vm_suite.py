"""The suite's driver: counting, and its two lanes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from testbed import suite
from testbed.suite import Outcome, Run, parse_junit, run_lanes

JUNIT = """<?xml version="1.0"?>
<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="x"/></testcase>
<testcase classname="tests.a" name="bad"><error message="clean-up too"/></testcase>
<testcase classname="tests.a" name="untidy"/>
<testcase classname="tests.a" name="untidy"><error message="clean-up"/></testcase>
<testcase classname="tests.a" name="left"><skipped message="no perftest"/></testcase>
<testcase classname="tests.a" name="out"><skipped message="no perftest"/></testcase>
</testsuite></testsuites>"""


def test_junit_counts_each_test_once() -> None:
    outcome = parse_junit(JUNIT)
    assert outcome.passed == 1
    assert outcome.failures == ["tests.a::bad", "tests.a::untidy"]
    assert outcome.skips == {"no perftest": 2}
    assert outcome.summary()[-1] == "1 passed, 2 failed, 2 skipped"
    assert "skipped 2: no perftest" in outcome.summary()


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(Outcome(passed=1), 0), (Outcome(), 1), (Outcome(passed=5, failures=["x"]), 1)],
)
def test_a_suite_that_ran_nothing_has_failed(outcome: Outcome, code: int) -> None:
    assert outcome.exit_code == code


@pytest.mark.parametrize(
    ("status", "words"),
    [(5, "found no tests"), (4, "called wrongly"), (137, "status 137"), (1, "without naming a test")],
)
def test_a_run_without_results_is_a_failure(tmp_path: Path, status: int, words: str) -> None:
    outcome = suite._finish("tests/rdma", status, tmp_path / "missing.xml")
    assert len(outcome.failures) == 1
    assert words in outcome.failures[0]


def test_lanes_run_side_by_side_and_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    meeting = threading.Barrier(2)

    def meet(log: BinaryIO) -> Outcome:
        log.write(b"here\n")
        meeting.wait(60)  # only passes while the other lane is running too
        return Outcome(passed=2)

    total = run_lanes([[Run("one", meet)], [Run("two/three", meet), _failing()]])
    assert (total.passed, total.failures) == (4, ["four"])
    assert (tmp_path / "two-three.log").read_bytes() == b"here\n"


def _failing() -> Run:
    return Run("four", lambda log: Outcome(failures=["four"]))
