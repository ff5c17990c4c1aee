"""Rows of `make accept ONLY=reliability` at a small size: that each works and finds nothing amiss."""

from __future__ import annotations

from benchmarks.accept.reliability import load


def test_load() -> None:
    figure = load.measure(load.Sizes(pods=12, speaking=2, rounds=5))
    assert figure.value > 0
    assert figure.more["calls"]
