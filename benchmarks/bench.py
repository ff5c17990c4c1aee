"""``python -m benchmarks.bench``, or ``make bench [ONLY=name,name] [QUICK=1] [KEEP=1]``: questions and answers.

Results go to build/bench: samples-QUESTION.jsonl (as they come), results.json (a row per comparison),
environment.json, the figures as PNG and SVG, and table.md, which is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, plots
from benchmarks.measure import find, names
from benchmarks.question import Effort, Place, Question, Record, read
from benchmarks.results import Comparison, compare, table
from rdmanet.errors import RdmanetError
from rdmanet.model import RdmaMode
from testbed import vm
from testbed.kernel import why_not_here
from testbed.paths import BUILD, REPOSITORY
from testbed.progress import say

OUTPUT = BUILD / "bench"
ACCEPTED = Path(__file__).with_name("RESULTS.md")
#: In RESULTS.md, what stands between these lines is written here; the rest is people's.
BEGIN, END = "<!-- the last accepted run -->", "<!-- end of the last accepted run -->"


def places_of(question: Question, effort: Effort) -> list[Place]:
    """Where a question is measured. A smoke run stays on the running kernel, and leaves out what that cannot do."""
    here = effort is not Effort.SMOKE or not why_not_here(RdmaMode.SHARED)
    return [place for place in question.places if place is not Place.VM or here]


def run_place(question: Question, place: Place, effort: Effort, samples: Path) -> str:
    """Measures a question in one place; returns what went wrong, or nothing."""
    argv = [sys.executable, "-m", "benchmarks.measure", question.name, "--place", place, "--effort", effort]
    argv += ["--samples", str(samples)]
    here = place is Place.HOST or effort is Effort.SMOKE
    if here or (place is Place.VM and not why_not_here(RdmaMode.SHARED)):
        try:
            status = subprocess.run(argv, cwd=REPOSITORY, check=False, timeout=question.timeout_s).returncode
        except subprocess.TimeoutExpired:
            return f"not over after {question.timeout_s:.0f} s"
    else:
        icount = place is Place.ICOUNT
        try:
            status = vm.run(argv, icount=icount, memory_mb=question.memory_mb, timeout_s=question.timeout_s)
        except RdmanetError as error:
            return str(error)
    return f"ended with status {status}; the lines above say why" if status else ""


def answer(name: str, effort: Effort, output: Path) -> tuple[Question, Record, list[Comparison], list[str]]:
    """Measures one question everywhere it is asked; its comparisons, and what went wrong."""
    question = find(name)
    samples = output / f"samples-{name}.jsonl"
    samples.write_text("")
    wrong = []
    for place in places_of(question, effort):
        began = time.monotonic()
        say(f"{name}: {question.text} ({place})")
        if why := run_place(question, place, effort, samples):
            wrong.append(f"{name} ({place}): {why}")
        say(f"{name} ({place}): {time.monotonic() - began:.0f} s{', FAILED: ' + why if why else ''}")
    record = read(samples)
    wrong += [f"{name} ({f.place}): {f.contender} in {f.case}: {f.sentence}" for f in record.failures]
    if not record.samples:
        wrong.append(f"{name}: no samples")
    return question, record, compare(question, record), wrong


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and all that came of it; ``here`` is the machine as it was before."""

    here: Mapping[str, Any]
    question: Question
    record: Record
    comparisons: list[Comparison]
    wrong: list[str]


def ask_one(name: str, effort: Effort, output: Path) -> Asked:
    """Measures one question."""
    here = environment.describe()
    return Asked(here, *answer(name, effort, output))


def ask(wanted: Sequence[str], effort: Effort, output: Path, processors: int) -> Iterator[Asked]:
    """Measures the questions; each answer as it comes.

    Where instructions are counted, what runs beside does not count, and the virtual machine keeps one processor busy:
    first come as many such questions at once as there are processors, then the others, each with nothing beside it.
    """
    counting = [name for name in wanted if effort is not Effort.SMOKE and set(find(name).places) == {Place.ICOUNT}]
    waiting = iter(counting)
    next_one = threading.Lock()
    answers: queue.SimpleQueue[Asked | BaseException] = queue.SimpleQueue()

    def work() -> None:
        while True:
            with next_one:
                name = next(waiting, None)
            if name is None:
                return
            try:
                answers.put(ask_one(name, effort, output))
            except BaseException as error:  # noqa: BLE001 - carried over to the main thread, which raises it
                answers.put(error)

    for _ in range(min(processors, len(counting))):
        threading.Thread(target=work, daemon=True).start()  # Ctrl-C ends all: QEMU never outlives this process
    for _ in counting:
        found = answers.get()
        if isinstance(found, BaseException):
            raise found
        yield found
    for name in wanted:
        if name not in counting:
            yield ask_one(name, effort, output)


@dataclass(frozen=True, slots=True)
class Answer:
    """A question's comparisons, what went wrong, and where and when that was."""

    name: str
    title: str
    comparisons: list[Comparison]
    wrong: list[str]

    def section(self) -> list[str]:
        """The answer for people, as Markdown."""
        failed = [f"- failed: {sentence}" for sentence in self.wrong]
        return [
            f"### {self.name}",
            "",
            self.title,
            "",
            *table(self.comparisons),
            *([""] if failed else []),
            *failed,
            "",
        ]


def conclude(answers: list[Answer]) -> list[str]:
    """All answers, with goals counted, and what went wrong last."""
    lines = [line for one in answers for line in one.section()]
    comparisons = [comparison for one in answers for comparison in one.comparisons]
    asked = [comparison for comparison in comparisons if comparison.goal is not None]
    missed = [comparison for comparison in asked if not comparison.met]
    lines.append(f"{len(comparisons)} comparisons; {len(asked) - len(missed)} of {len(asked)} goals met.")
    lines += [f"missed: {c.question}, {c.case} {c.statistic} / {c.peer}: {c.verdict}" for c in missed]
    return lines + [f"failed: {sentence}" for one in answers for sentence in one.wrong]


def title_of(here: Mapping[str, Any], record: Record, effort: Effort) -> str:
    """One line about the machine and the version."""
    kernels = sorted({f"{place}: kernel {values['kernel']}" for place, values in record.environments.items()})
    return (
        f"Commit {here['commit']}, {time.strftime('%Y-%m-%d')}, effort {effort}. {here['processors']} x"
        f" {here['processor']}, {here['memory_mb'] // 1024} GiB, {here['distribution']}; {', '.join(kernels)};"
        f" load average at the start {here['load_average']:.1f}."
    )


def keep(answers: list[Answer]) -> None:
    """Puts the answers into RESULTS.md, each in place of the one to its question before."""
    before, _, rest = ACCEPTED.read_text(encoding="utf-8").partition(BEGIN)
    kept, _, after = rest.partition(END)
    sections = {part.partition("\n")[0]: f"### {part}".strip().split("\n") for part in kept.split("### ")[1:]}
    sections |= {one.name: one.section()[:-1] for one in answers}
    order = [name for name in names() if name in sections]
    lines = [line for name in order for line in ["", *sections[name]]]
    ACCEPTED.write_text("\n".join([before + BEGIN, *lines, "", END]) + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when all was measured, whatever the figures; 1 when something could not be; 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"questions, with commas between: {', '.join(names())}")
    parser.add_argument("--effort", type=Effort, choices=list(Effort), default=Effort.FULL)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--keep", action="store_true", help="make the answers the accepted ones, in RESULTS.md")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.only.replace(",", " ").split() if name] or names()
    options.output.mkdir(parents=True, exist_ok=True)
    environments: dict[str, Any] = {}
    answers: list[Answer] = []
    try:
        for asked in ask(wanted, options.effort, options.output, os.cpu_count() or 1):
            name, record = asked.question.name, asked.record
            environments |= {f"{name} ({place})": dict(values) for place, values in record.environments.items()}
            title = title_of(asked.here, record, options.effort)
            answers.append(Answer(name, title, asked.comparisons, asked.wrong))
            answers.sort(key=lambda one: wanted.index(one.name))
            rows = [comparison.row() for one in answers for comparison in one.comparisons]
            _write(options.output / "results.json", rows)
            plots.draw(asked.question, record, asked.comparisons, options.output)
    except RdmanetError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; what was sampled until now is in {options.output}")
        return 130
    _write(options.output / "environment.json", environments)
    lines = conclude(answers)
    (options.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)
    if options.keep:
        keep(answers)
    return 1 if any(one.wrong for one in answers) else 0


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
