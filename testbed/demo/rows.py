"""The demo's rows: printed as they come, and written to build/demo.json at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rdmanet.errors import RdmanetError

#: The steps, by the names and in the order of the issue that asked for them.
STEPS = ("agent", "add", "tcp", "ebpf", "lease", "perftest", "refused", "restart", "clean")


class StepError(RdmanetError):
    """A step did not show what it should."""


def need(condition: bool, sentence: str) -> None:
    """StepError with `sentence` unless `condition`."""
    if not condition:
        raise StepError(sentence)


@dataclass(frozen=True, slots=True)
class Row:
    """One step's result; `value` is None where the step failed before it had a figure."""

    step: str
    ok: bool
    value: float | None
    unit: str
    detail: str


@dataclass(frozen=True, slots=True)
class Figure:
    """What a step that succeeded has to say."""

    value: float
    unit: str
    detail: str


def measure(step: str, work: Callable[[], Figure]) -> Row:
    """Carry out a step. What it raises on purpose, and what the system refuses, is a failed row; bugs pass."""
    try:
        figure = work()
    except (RdmanetError, OSError, ValueError, LookupError, AssertionError) as error:
        kind = "" if isinstance(error, RdmanetError | AssertionError) else f"{type(error).__name__}: "
        return Row(step, False, None, "", f"{kind}{error}")
    return Row(step, True, figure.value, figure.unit, figure.detail)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text(row: Row) -> str:
    """A row for people."""
    figure = "" if row.value is None else f"{_number(row.value)} {row.unit}"
    return f"{'ok    ' if row.ok else 'FAILED'}  {row.step:<9} {figure:>15}  {row.detail}"


def show(row: Row, stream: TextIO = sys.stdout) -> None:
    """Print a row at once."""
    print(text(row), file=stream, flush=True)


def verdict(rows: Sequence[Row]) -> str:
    """The last line."""
    return f"demo: {sum(row.ok for row in rows)} of {len(STEPS)} steps passed"


def passed(rows: Sequence[Row]) -> bool:
    """Whether every step was there and succeeded."""
    return [row.step for row in rows if row.ok] == list(STEPS)


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
