"""The search: inputs for one target until its time is over; what fails is saved, and the search goes on."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import rdmanet
from testbed.fuzzing.mutation import Mutator
from testbed.paths import BUILD
from testbed.progress import Ticker

FOUND = BUILD / "fuzz"
#: Failures after which a target has shown enough.
MOST_FAILURES = 20
OURS = str(Path(rdmanet.__file__).parent)

#: Whatever tells one place in the code from another; nothing where a target cannot tell.
Places = set[Any]


class Failure(Exception):
    """An input did what none may."""


@dataclass(frozen=True, slots=True)
class Target:
    """``run`` takes an input and returns what code it reached; Failure, or any other exception, is a finding."""

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes], Places]
    tokens: Sequence[bytes] = ()


@dataclass(slots=True)
class Search:
    """What came of it."""

    name: str
    seed: int
    inputs: int = 0
    places: int = 0
    kept: int = 0
    failures: list[str] = field(default_factory=list)


def search(target: Target, budget_s: float, seed: int) -> Search:
    """Inputs for so long; the seeds themselves are the first ones."""
    chance = random.Random(seed)
    mutator = Mutator(chance, target.tokens)
    corpus, reached, done = list(target.seeds), set[Any](), Search(target.name, seed)
    first = list(target.seeds)
    ticker = Ticker(f"fuzz {target.name}, seed {seed}")
    end_s = time.monotonic() + budget_s
    while time.monotonic() < end_s and len(done.failures) < MOST_FAILURES:
        data = first.pop() if first else mutator.change(chance.choice(corpus), chance.choice(corpus))
        done.inputs += 1
        try:
            places = target.run(data)
        except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
            path = save(target.name, data)
            done.failures.append(f"{path}: {type(error).__name__}: {error}"[:500])
            continue
        if not places <= reached:
            reached |= places
            corpus.append(data)
            done.kept += 1
        ticker.tick(f"{done.inputs} inputs, {len(reached)} places, {len(done.failures)} failures")
    done.places = len(reached)
    return done


def save(name: str, data: bytes) -> Path:
    """Where an input can be found afterwards."""
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def traced(function: Callable[[], object]) -> Places:
    """The lines of ours that a function reaches; what it raises is raised."""
    found: Places = set()

    def line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            found.add((frame.f_code, frame.f_lineno))
        return line

    def call(frame: FrameType, _: str, __: object) -> Any:
        code: CodeType = frame.f_code
        return line if code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        function()
    finally:
        sys.settrace(before)
    return found
