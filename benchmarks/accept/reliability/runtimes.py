"""What the rows `podman` and `containerd` share: the suite's tests of a runtime, here or where there is RDMA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.accept.reliability.tested import passed
from rdmanet.model import RdmaMode
from testbed import kernel
from testbed.rows import Figure

RUNS = 10


def with_rdma(tests: str) -> Figure | None:
    """Two containers' RDMA, where the kernel has it for them; None elsewhere."""
    if kernel.why_not_here(RdmaMode.SHARED):
        return None
    count = passed([tests])
    return Figure(
        count, "tests", "perftest by both GIDs and leased queue pairs between two containers", {"tests": count}
    )


def median_ms(work: Callable[[], object]) -> float:
    """Of RUNS runs."""
    taken = []
    for _ in range(RUNS):
        begun = time.monotonic()
        work()
        taken.append((time.monotonic() - begun) * 1000)
    return statistics.median(taken)


def figure(what: str, ours_ms: float, other: str, other_ms: float, tests: Sequence[str]) -> Figure:
    """The whole row: what it takes with our network and with another one, and what was tried."""
    count = passed(tests)
    detail = (
        f"{what} takes {ours_ms:.0f} ms with our network, {other_ms:.0f} ms with {other} (medians of {RUNS}); TCP by"
        f" both families, ports mapped, killed in the middle, without an agent, rebooted, the guide: {count} tests"
    )
    return Figure(ours_ms, "ms", detail, {"tests": count, "other_ms": other_ms})
