"""benchmarks.results: known samples, known answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.question import Effort, Failure, Goal, Place, Question, Record, Run, Sample, Statistic, read
from benchmarks.results import Comparison, compare, percentile, table
from rdmanet.errors import RequestError


def question(*goals: Goal, statistics: tuple[Statistic, ...] = (Statistic.P50,)) -> Question:
    return Question("q", "Is it?", (Place.HOST,), lambda run: None, goals, statistics)


def record(
    contenders: Mapping[str, Sequence[Sequence[float]]], case: str = "add/1", unit: str = "ms", *failures: Failure
) -> Record:
    """Contender → a list of samples for each round."""
    samples = [
        Sample(Place.HOST, case, name, number, value, unit)
        for name, rounds in contenders.items()
        for number, values in enumerate(rounds)
        for value in values
    ]
    return Record(tuple(samples), failures, {})


def only(found: list[Comparison]) -> Comparison:
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 99, 5.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 25, 1.75),  # as numpy.percentile
        ([float(n) for n in range(1, 101)], 99, 99.01),
        ([1.0, 2.0], 100, 2.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentiles_are_interpolated(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(RequestError):
        percentile([], 50)


def test_ratios_are_paired_by_round() -> None:
    """Drift that meets both contenders of a round leaves the ratio as it is."""
    found = only(compare(question(), record({"rdmanet": [[1, 1], [10, 30], [5]], "ptp": [[2], [40], [10]]})))
    assert found.ratio == 0.5
    assert found.spread == (0.5, 0.5)
    assert (found.ours, found.peer_value) == (5.0, 10.0)
    assert found.verdict == "rdmanet wins"
    assert found.met is None


def test_a_round_that_one_contender_lacks_does_not_count() -> None:
    found = only(compare(question(), record({"rdmanet": [[1], [9]], "ptp": [[2]]})))
    assert found.ratio == 0.5


def test_the_spread_is_the_middle_half_of_the_rounds() -> None:
    rounds = {"rdmanet": [[1], [2], [3], [4], [5]], "ptp": [[2], [2], [2], [2], [2]]}
    found = only(compare(question(), record(rounds)))
    assert found.spread == (1.0, 2.0)
    assert found.ratio == 1.5


def test_the_verdict_says_the_same_of_either() -> None:
    assert only(compare(question(), record({"rdmanet": [[3]], "ptp": [[2]]}))).verdict == "ptp wins"
    assert only(compare(question(), record({"rdmanet": [[2]], "ptp": [[3]]}))).verdict == "rdmanet wins"
    assert only(compare(question(), record({"rdmanet": [[1], [3]], "ptp": [[2], [2]]}))).verdict == "even"


def test_nobody_wins_by_less_than_runs_differ() -> None:
    assert only(compare(question(), record({"rdmanet": [[1000.0]], "ptp": [[997.0]]}))).verdict == "even"
    assert only(compare(question(), record({"rdmanet": [[1000.0]], "ptp": [[990.0]]}))).verdict == "ptp wins"


def test_goals_are_found_by_pattern_and_judged() -> None:
    goals = (Goal("add/*", "ptp", 0.35), Goal("*", "*", 1.0))
    rounds = {"rdmanet": [[35.0]], "ptp": [[100.0]], "bridge": [[20.0]]}
    ptp, bridge = compare(question(*goals), record(rounds))
    assert (ptp.goal, ptp.met) == (0.35, True)
    assert (bridge.goal, bridge.met) == (1.0, False)


def test_a_limit_is_said_once_and_holds_for_all_rounds() -> None:
    found = only(compare(question(Goal("*", "limit", 1.0)), record({"rdmanet": [[50], [54], [58]], "limit": [[60]]})))
    assert found.ratio == pytest.approx(0.9)
    assert found.met
    assert found.verdict == "within the limit"


def test_p99_pools_the_rounds_and_needs_twenty_samples() -> None:
    both = (Statistic.P50, Statistic.P99)
    few = compare(question(statistics=both), record({"rdmanet": [[1.0] * 19], "ptp": [[1.0] * 20]}))
    assert [comparison.statistic for comparison in few] == [Statistic.P50]
    many = record({"rdmanet": [[1.0] * 50, [2.0] * 50], "ptp": [[4.0] * 100]})
    p99 = compare(question(Goal("*", "*", 0.4, Statistic.P99), statistics=both), many)[1]
    assert p99.ratio == 0.5
    assert p99.met is False


def test_units_are_not_mixed() -> None:
    mixed = Record((*record({"rdmanet": [[1]]}).samples, *record({"ptp": [[1]]}, unit="us").samples), (), {})
    with pytest.raises(RequestError, match="ms and us"):
        compare(question(), mixed)


def test_a_failure_stands_in_the_table_and_misses_its_goal() -> None:
    failed = record({"ptp": [[1.0]]}, "add/1", "ms", Failure(Place.HOST, "add/1", "rdmanet", "no address left"))
    found = only(compare(question(Goal("*", "*", 1.0)), failed))
    assert found.met is False
    assert "no address left" in "\n".join(table([found]))
    assert found.row()["ours"] is None


def test_a_peer_without_cost_gives_no_ratio() -> None:
    assert only(compare(question(), record({"rdmanet": [[1]], "ptp": [[0]]}))).ratio is None


def test_rows_have_the_fields_that_were_asked_for() -> None:
    row = only(compare(question(), record({"rdmanet": [[1]], "ptp": [[2]]}))).row()
    fields = {"question", "case", "ours", "peer", "peer_value", "unit", "ratio", "goal", "met"}
    assert fields <= row.keys()
    assert row["case"] == "add/1 p50"


def test_the_tables_columns_are_aligned() -> None:
    rounds = {"rdmanet": [[1234.5]], "ptp": [[2.0]], "a long name": [[0.001]]}
    lines = [line for line in table(compare(question(), record(rounds))) if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1


def test_samples_survive_the_file_and_contenders_turn(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    orders = []
    with file.open("w") as sink:
        run = Run(question(), Place.HOST, Effort.QUICK, sink)
        run.environment({"kernel": "6.18"})
        for number in run.rounds(full=30, quick=3):
            orders.append([name for name, _ in run.turns({"a": 1, "b": 2, "c": 3})])
            run.sample("case", "rdmanet", number + 0.5, "ms")
        run.failed("case", "ptp", "away")
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    found = read(file)
    assert [sample.value for sample in found.samples] == [0.5, 1.5, 2.5]
    assert [sample.round for sample in found.samples] == [0, 1, 2]
    assert found.failures == (Failure(Place.HOST, "case", "ptp", "away"),)
    assert found.environments[Place.HOST] == {"kernel": "6.18"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_no_figure_is_no_sample(tmp_path: Path, value: float) -> None:
    with (tmp_path / "samples").open("w") as sink, pytest.raises(RequestError):
        Run(question(), Place.HOST, Effort.SMOKE, sink).sample("case", "rdmanet", value, "ms")


def test_an_interrupted_file_is_read_and_a_broken_one_is_not(tmp_path: Path) -> None:
    line = json.dumps({"place": "host", "case": "c", "contender": "rdmanet", "round": 0, "value": 1.0, "unit": "ms"})
    file = tmp_path / "samples.jsonl"
    file.write_text(line + "\n" + line[:20])
    assert len(read(file).samples) == 1
    file.write_text(line[:20] + "\n" + line + "\n")
    with pytest.raises(RequestError, match="line 1"):
        read(file)
