"""The demo's steps, and what it takes to pass."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.rows import Row

#: The steps, by the names and in the order of the issue that asked for them.
STEPS = ("agent", "add", "tcp", "ebpf", "lease", "perftest", "refused", "restart", "clean")


def verdict(rows: Sequence[Row]) -> str:
    """The last line."""
    return f"demo: {sum(row.ok for row in rows)} of {len(STEPS)} steps passed"


def passed(rows: Sequence[Row]) -> bool:
    """Whether every step was there and succeeded."""
    return [row.step for row in rows if row.ok] == list(STEPS)
