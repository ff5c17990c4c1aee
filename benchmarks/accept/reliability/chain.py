"""Row `chain`: Debian's reference plugins behind ours, in every version that they know, and CHECK through them."""

from __future__ import annotations

from benchmarks.accept.reliability.tested import passed
from testbed.rows import Figure

TESTS = ("tests/kernel/test_chain.py",)


def measure() -> Figure:
    """The suite's tests of chains."""
    count = passed(TESTS)
    detail = (
        "portmap, tuning, firewall and sbr behind ours: 0.3.1 to 1.0.0, port mappings from outside, host, other pods"
        " and the pod itself by TCP, UDP and both families, three interfaces routed by source, CHECK in every chain;"
        " not bandwidth, whose qdisc needs the place of our filter"
    )
    return Figure(count, "tests", detail, {"tests": count})
