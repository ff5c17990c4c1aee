"""Rows that are tests of the suite: those that are named pass, none is skipped, and they are counted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from testbed.paths import REPOSITORY
from testbed.rows import need

TIMEOUT_S = 3600.0
NOT_PASSED = ("failure", "error", "skipped")


def passed(tests: Sequence[str]) -> int:
    """How many there were, of files or single ones, with their parameters. StepError names what did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        argv = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={report}", *tests]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        need(report.exists(), f"pytest ended with status {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    lost = [f"{case.get('name')}" for case in cases if any(case.find(kind) is not None for kind in NOT_PASSED)]
    need(not lost, f"{len(lost)} of {len(cases)} tests did not pass: {', '.join(lost[:5])}")
    need(bool(cases) and done.returncode == 0, f"pytest ended with status {done.returncode}: {done.stdout[-300:]}")
    return len(cases)
