"""benchmarks.bench, measure, plots and environment: what does not need a measurement."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import bench, environment, plots
from benchmarks.measure import find, names
from benchmarks.question import LIMIT, OURS, Effort, Failure, Goal, Place, Question, Record, Sample, Statistic
from benchmarks.results import Comparison, compare
from rdmanet.errors import RequestError
from testbed.paths import REPOSITORY

PNG = b"\x89PNG\r\n\x1a\n"


def a_record(places: int = 3) -> Record:
    samples = [
        Sample(Place.HOST, case, contender, number, value + number / 10, "ms")
        for case in ("add/1", "del/1")
        for contender, value in ((OURS, 2.0), ("ptp", 4.0), (LIMIT, 5.0))
        for number in range(places)
    ]
    return Record(tuple(samples), (Failure(Place.HOST, "add/50", "ptp", "fork: no memory"),), {})


QUESTION = Question("sum", "Is it <less>?", (Place.HOST,), lambda run: None, (Goal("add/*", "ptp", 0.35),))


def test_every_question_says_what_it_asks() -> None:
    for name in names():
        question = find(name)
        assert question.name == name
        module = (REPOSITORY / "benchmarks" / "questions" / f"{name}.py").read_text(encoding="utf-8")
        first = module.splitlines()[0].strip('"')
        assert first.endswith("?"), f"{name} does not ask: {first}"
        assert question.text == first
        assert question.places


def test_no_question_of_another_name() -> None:
    with pytest.raises(RequestError, match="there are"):
        find("weather")


def test_both_figures_are_drawn_in_both_formats(tmp_path: Path) -> None:
    files = plots.draw(QUESTION, a_record(), compare(QUESTION, a_record()), tmp_path)
    assert {file.name for file in files} == {
        f"sum-{what}{suffix}" for what in ("ratios", "samples") for suffix in (".png", ".svg")
    }
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(PNG)
        else:
            text = " ".join(ElementTree.fromstring(file.read_text()).itertext())
            assert QUESTION.text in text


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert plots.draw(QUESTION, Record((), (), {}), [], tmp_path) == []


def an_answer(name: str = "sum", *wrong: str, title: str = "title") -> bench.Answer:
    return bench.Answer(name, title, compare(QUESTION, a_record()), list(wrong))


def test_the_conclusion_counts_goals_and_says_failures() -> None:
    lines = bench.conclude([an_answer("sum", "sum (host): it rained"), an_answer("other")])
    assert lines[:3] == ["### sum", "", "title"]
    assert "10 comparisons; 0 of 4 goals met." in lines
    assert lines[-1] == "failed: sum (host): it rained"
    assert "missed: sum, add/1 p50 / ptp: rdmanet wins" in lines
    missed = next(line for line in lines if "MISSED: rdmanet" in line)
    assert "add/1" in missed


def test_keeping_replaces_the_answers_to_the_same_questions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(f"# Before\n\n{bench.BEGIN}\n{bench.END}\n\n## After\n")
    monkeypatch.setattr(bench, "ACCEPTED", file)
    monkeypatch.setattr(bench, "names", lambda: ["first", "second"])
    bench.keep([an_answer("second", title="old"), an_answer("first", title="kept")])
    first = file.read_text()
    bench.keep([an_answer("second", "it rained", title="new")])
    second = file.read_text()
    assert first.startswith(f"# Before\n\n{bench.BEGIN}\n\n### first\n\nkept\n\n| case")
    assert first.endswith(f"|\n\n{bench.END}\n\n## After\n")
    assert "### second\n\nold\n" in first
    assert second == first.replace("\nold\n", "\nnew\n").replace(
        f"|\n\n{bench.END}", f"|\n\n- failed: it rained\n\n{bench.END}"
    )


def test_the_accepted_results_have_their_marks() -> None:
    text = bench.ACCEPTED.read_text(encoding="utf-8")
    assert text.count(bench.BEGIN) == 1
    assert text.index(bench.BEGIN) < text.index(bench.END)


def test_a_question_that_fails_is_told_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring process ends with an error after its first sample."""
    line = {"place": "host", "case": "c", "contender": OURS, "round": 0, "value": 1.0, "unit": "ms"}

    def run_place(question: Question, place: Place, effort: object, samples: Path) -> str:
        samples.write_text(json.dumps(line) + "\n" + json.dumps({**line, "contender": "ptp", "value": 2.0}) + "\n")
        return "ended with status 1"

    monkeypatch.setattr(bench, "run_place", run_place)
    monkeypatch.setattr(bench, "names", lambda: ["sum"])
    monkeypatch.setattr(bench, "find", lambda name: QUESTION)
    assert bench.main(["--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["ratio"] for row in rows] == [0.5]
    assert "failed: sum (host): ended with status 1" in (tmp_path / "table.md").read_text()


def test_only_questions_that_count_instructions_run_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"timed": Place.HOST, "one": Place.ICOUNT, "two": Place.ICOUNT, "three": Place.ICOUNT, "again": Place.VM}
    questions = {name: Question(name, "Is it?", (place,), lambda run: None) for name, place in places.items()}
    running: set[str] = set()
    company: dict[str, set[str]] = {}
    both = threading.Barrier(2, timeout=30)
    ended: list[str] = []

    def answer(name: str, *rest: object) -> tuple[Question, Record, list[Comparison], list[str]]:
        running.add(name)
        if name in ("one", "two"):
            both.wait()
        company[name] = running - {name}
        if name in ("one", "two"):
            both.wait()
        running.remove(name)
        ended.append(name)
        return questions[name], a_record(), [], []

    monkeypatch.setattr(bench, "answer", answer)
    monkeypatch.setattr(bench, "find", questions.__getitem__)
    found = [asked.question.name for asked in bench.ask(list(places), Effort.QUICK, tmp_path, processors=2)]
    assert (company["one"], company["two"]) == ({"two"}, {"one"})
    assert (company["timed"], company["again"]) == (set(), set())
    assert found[3:] == ended[3:] == ["timed", "again"]
    company.clear()
    assert [one.question.name for one in bench.ask(["timed", "three"], Effort.SMOKE, tmp_path, 2)] == ["timed", "three"]


def test_what_breaks_beside_another_question_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def answer(*words: object) -> object:
        raise RequestError("A samples file is broken.")

    monkeypatch.setattr(bench, "answer", answer)
    monkeypatch.setattr(bench, "find", lambda name: Question(name, "Is it?", (Place.ICOUNT,), lambda run: None))
    monkeypatch.setattr(bench, "names", lambda: ["one", "two"])
    assert bench.main(["--effort", "quick", "--output", str(tmp_path)]) == 1
    assert "A samples file is broken." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("effort", "reason", "expected"),
    [
        (Effort.QUICK, "too old", ["host", "vm", "icount"]),
        (Effort.SMOKE, "too old", ["host", "icount"]),
        (Effort.SMOKE, "", ["host", "vm", "icount"]),
    ],
)
def test_a_smoke_run_leaves_out_what_the_running_kernel_cannot_do(
    effort: Effort, reason: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "why_not_here", lambda mode: reason)
    question = Question("q", "Is it?", (Place.HOST, Place.VM, Place.ICOUNT), lambda run: None)
    assert [str(place) for place in bench.places_of(question, effort)] == expected


def test_a_smoke_run_boots_no_virtual_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(argv: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        started.append(argv)
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert bench.run_place(QUESTION, Place.ICOUNT, Effort.SMOKE, tmp_path / "samples") == ""
    assert len(started) == 1


def test_an_unknown_question_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--only", "weather", "--output", str(tmp_path)]) == 1
    assert "There is no question weather" in capfd.readouterr().err


def test_the_environment_names_what_a_figure_depends_on() -> None:
    found = environment.describe()
    assert found["kernel"]
    assert found["processors"] >= 1
    assert found["memory_mb"] > 0
    assert found["packages"]["perftest"]
    assert not any(str(REPOSITORY) in str(value) for value in found.values())


def test_comparisons_without_ratio_have_a_verdict() -> None:
    lone = Comparison("q", "c", Statistic.P50, "ptp", "ms", 1.0, None, None, None, 0.5, "")
    assert lone.verdict == "nothing to compare"
    assert lone.met is False
