"""Rows of what was shown: printed as they come, and written as JSON at the end (the demo, `make accept`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from rdmanet.errors import RdmanetError

#: Of the column with the steps' names.
WIDTH = 9


class StepError(RdmanetError):
    """A step did not show what it should."""


def need(condition: bool, sentence: str) -> None:
    """StepError with `sentence` unless `condition`."""
    if not condition:
        raise StepError(sentence)


@dataclass(frozen=True, slots=True)
class Row:
    """One step's result; `value` is None where the step failed before it had a figure, `more` is what else JSON has."""

    step: str
    ok: bool
    value: float | None
    unit: str
    detail: str
    more: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figure:
    """What a step that succeeded has to say."""

    value: float
    unit: str
    detail: str
    more: Mapping[str, object] = field(default_factory=dict)


def measure(step: str, work: Callable[[], Figure]) -> Row:
    """Carry out a step. What it raises on purpose, and what the system refuses, is a failed row; bugs pass."""
    try:
        figure = work()
    except (RdmanetError, OSError, ValueError, LookupError, AssertionError) as error:
        kind = "" if isinstance(error, RdmanetError | AssertionError) else f"{type(error).__name__}: "
        return Row(step, False, None, "", f"{kind}{error}")
    return Row(step, True, figure.value, figure.unit, figure.detail, figure.more)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text(row: Row, width: int = WIDTH) -> str:
    """A row for people."""
    figure = "" if row.value is None else f"{_number(row.value)} {row.unit}"
    return f"{'ok    ' if row.ok else 'FAILED'}  {row.step:<{width}} {figure:>15}  {row.detail}"


def show(row: Row, stream: TextIO = sys.stdout, *, width: int = WIDTH) -> None:
    """Print a row at once."""
    print(text(row, width), file=stream, flush=True)


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as a list of objects; `more` where there is any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = [{key: value for key, value in asdict(row).items() if key != "more" or value} for row in rows]
    path.write_text(json.dumps(objects, indent=2) + "\n")


def read(path: Path) -> list[Row]:
    """What `write` wrote; nothing where the file is not there."""
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
