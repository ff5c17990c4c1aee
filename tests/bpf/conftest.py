"""The lab in which single programs run on single packets (BPF_PROG_TEST_RUN)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.bpf import lab
from testbed.bpf.bench import Bench


@pytest.fixture(scope="session")
def session_bench() -> Iterator[Bench]:
    lab.require_root()
    with Bench.build(lab.artifact()) as bench:
        yield bench


@pytest.fixture
def bench(session_bench: Bench) -> Bench:
    """The bench with empty tables and the usual entries."""
    session_bench.reset()
    return session_bench
