"""Row `chain`: Debian's reference plugins behind ours, in every version that they know; bandwidth, which is our own."""

from __future__ import annotations

from benchmarks.accept.reliability.tested import passed
from testbed.rows import Figure

TESTS = ("tests/kernel/test_chain.py", "tests/kernel/test_bandwidth.py")


def measure() -> Figure:
    """The suite's tests of chains and of bandwidth."""
    count = passed(TESTS)
    detail = (
        "portmap, tuning, firewall and sbr behind ours: 0.3.1 to 1.0.0, port mappings from outside, host, other pods"
        " and the pod itself by TCP, UDP and both families, three interfaces routed by source, CHECK in every chain;"
        " the capability bandwidth is our own, as the reference plugin's qdisc needs the place of our filter: UDP and"
        " TCP, both ways, both families"
    )
    return Figure(count, "tests", detail, {"tests": count})
