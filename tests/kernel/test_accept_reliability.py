"""Rows of `make accept ONLY=reliability` at a small size: that each works and finds nothing amiss."""

from __future__ import annotations

import random

import pytest

from benchmarks.accept.reliability import fuzz, growth, load
from benchmarks.accept.reliability.chaos import Chaos
from testbed.cni_executable import missing_for
from testbed.crashes.crashing import Crashes
from testbed.world import config

ROUNDS = 6


def test_load() -> None:
    figure = load.measure(load.Sizes(pods=12, speaking=2, rounds=5))
    assert figure.value > 0
    assert figure.more["calls"]


def test_growth() -> None:
    figure = growth.measure(growth.Sizes(attachments=60, warm_up=40, live=10, every=20))
    assert figure.more["memory_bytes"]


def test_random_kills() -> None:
    """The points, each once, are test_crash.py's."""
    with Crashes.begin("chaos") as crashes:
        chaos = Chaos(crashes, random.Random(1), config({}))
        for _ in range(ROUNDS):
            chaos.round()
        chaos.end()
        assert chaos.left == []
        assert chaos.agents > 0
        crashes.nothing_left("at last")


def test_fuzz() -> None:
    missing = missing_for("sanitized")
    if missing:
        pytest.skip(missing)
    figure = fuzz.measure(share=0.01)
    assert figure.more["crashes"] == 0
    assert figure.value > len(fuzz.BUDGETS_S)
