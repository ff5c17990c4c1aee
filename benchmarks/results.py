"""Samples to comparisons: medians, paired ratios, spreads. Pure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.question import LIMIT, OURS, Goal, Question, Record, Sample, Statistic
from rdmanet.errors import RequestError

#: Fewer samples than this have no 99th percentile.
LEAST_FOR_P99 = 20
#: Nearer to 1 than this nobody wins: as much as counted instructions differ from run to run.
SAME = 0.005


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours over one peer in one case. ``spread`` is the rounds' 25th and 75th percentile of the ratio."""

    question: str
    case: str
    statistic: Statistic
    peer: str
    unit: str
    ours: float | None
    peer_value: float | None
    spread: tuple[float, float] | None
    ratio: float | None
    goal: float | None
    failure: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return self.ratio is not None and self.ratio <= self.goal

    @property
    def verdict(self) -> str:
        """Who wins, in the same words whoever it is."""
        if self.failure:
            return self.failure
        if self.ratio is None:
            return "nothing to compare"
        if self.peer == LIMIT:
            return "within the limit" if self.ratio <= 1 else "over the limit"
        if self.spread is not None and self.spread[0] <= 1 <= self.spread[1]:
            return "even"
        if abs(self.ratio - 1) < SAME:
            return "even"
        return f"{OURS} wins" if self.ratio < 1 else f"{self.peer} wins"

    def row(self) -> dict[str, Any]:
        """The row of results.json."""
        return {
            "question": self.question,
            "case": f"{self.case} {self.statistic}",
            "ours": self.ours,
            "peer": self.peer,
            "peer_value": self.peer_value,
            "unit": self.unit,
            "ratio": self.ratio,
            "goal": self.goal,
            "met": self.met,
            "spread": self.spread,
            "verdict": self.verdict,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the closest ranks (NIST's and NumPy's default). Needs one value at least."""
    if not values:
        raise RequestError("a percentile of nothing", operation="percentile")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def compare(question: Question, record: Record) -> list[Comparison]:
    """Every comparison of a question: ours with each peer, in each case, in the order in which they were measured."""
    cases: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in record.samples:
        cases[sample.case][sample.contender].append(sample)
    failures = {(failure.case, failure.contender): failure.sentence for failure in record.failures}
    for case, contender in failures:
        cases[case].setdefault(contender, [])
    found = []
    for case, contenders in cases.items():
        units = {sample.unit for samples in contenders.values() for sample in samples}
        if len(units) > 1:
            raise RequestError(f"{case} was measured in {' and '.join(sorted(units))}", subject=question.name)
        unit = "".join(units)
        peers = [peer for peer in contenders if peer != OURS]
        for statistic in question.statistics:
            for peer in peers:
                sentences = [f"{name}: {failures[case, name]}" for name in (OURS, peer) if (case, name) in failures]
                ours, theirs = contenders.get(OURS, []), contenders[peer]
                if statistic is Statistic.P99 and min(len(ours), len(theirs)) < LEAST_FOR_P99 and not sentences:
                    continue
                goal = _goal(question.goals, case, peer, statistic)
                found.append(
                    _comparison(question.name, case, statistic, peer, unit, ours, theirs, goal, "; ".join(sentences))
                )
    return found


def _goal(goals: Iterable[Goal], case: str, peer: str, statistic: Statistic) -> float | None:
    for goal in goals:
        if goal.statistic is statistic and fnmatchcase(case, goal.case) and fnmatchcase(peer, goal.peer):
            return goal.limit
    return None


def _comparison(
    question: str,
    case: str,
    statistic: Statistic,
    peer: str,
    unit: str,
    ours: Sequence[Sample],
    theirs: Sequence[Sample],
    goal: float | None,
    failure: str,
) -> Comparison:
    percent = 50.0 if statistic is Statistic.P50 else 99.0
    values = [_value(samples, percent) for samples in (ours, theirs)]
    ratio, spread = _ratio(ours, theirs, statistic)
    return Comparison(question, case, statistic, peer, unit, values[0], values[1], spread, ratio, goal, failure)


def _value(samples: Sequence[Sample], percent: float) -> float | None:
    return percentile([sample.value for sample in samples], percent) if samples else None


def _by_round(samples: Sequence[Sample]) -> Mapping[int, float]:
    rounds: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        rounds[sample.round].append(sample.value)
    return {number: statistics.median(values) for number, values in rounds.items()}


def _ratio(
    ours: Sequence[Sample], theirs: Sequence[Sample], statistic: Statistic
) -> tuple[float | None, tuple[float, float] | None]:
    """The ratio and its spread over rounds; a zero of the peer's gives none."""
    if statistic is Statistic.P99:
        mine, other = _value(ours, 99), _value(theirs, 99)
        return (mine / other if mine is not None and other else None), None
    mine_by, other_by = _by_round(ours), _by_round(theirs)
    if theirs and theirs[0].contender == LIMIT:  # said once, for all rounds
        other_by = dict.fromkeys(mine_by, theirs[0].value)
    pairs = [(mine_by[number], other_by[number]) for number in mine_by if number in other_by]
    ratios = [mine / other for mine, other in pairs if other]
    if not ratios:
        return None, None
    return statistics.median(ratios), (percentile(ratios, 25), percentile(ratios, 75))


HEADINGS = ("case", "ours", "peer", "peer's", "unit", "ratio", "spread", "goal", "")


def table(comparisons: Iterable[Comparison]) -> list[str]:
    """One question's comparisons for people: columns are aligned, GitHub shows them as a table."""
    rows = [HEADINGS, *map(_cells, comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        cells = (_aligned(cell, column, widths[column]) for column, cell in enumerate(row))
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|".join(_rule(column, width) for column, width in enumerate(widths))
    return [lines[0], f"|{rule}|", *lines[1:]]


_LEFT = (0, 2, 4, 8)


def _aligned(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column in _LEFT else cell.rjust(width)


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column in _LEFT else "-" * (width + 1) + ":"


def _cells(comparison: Comparison) -> tuple[str, ...]:
    met = {True: "met: ", False: "MISSED: ", None: ""}[comparison.met]
    spread = comparison.spread
    return (
        f"{comparison.case} {comparison.statistic}",
        _number(comparison.ours),
        comparison.peer,
        _number(comparison.peer_value),
        comparison.unit,
        _ratio_text(comparison.ratio),
        f"{_ratio_text(spread[0])}-{_ratio_text(spread[1])}" if spread else "",
        "" if comparison.goal is None else f"{comparison.goal:.2f}",
        met + comparison.verdict,
    )


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio_text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
