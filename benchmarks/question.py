"""What a question is, and the run in which it is measured.

Every sample is a cost: of less of it there is always more to like. A rate is given as time per unit of work.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from rdmanet.errors import RequestError
from testbed.progress import Ticker

T = TypeVar("T")

#: The contender that every other one of a case is compared with.
OURS = "rdmanet"
#: The contender whose value is not measured but asked for: an absolute goal, to be compared as all others are.
LIMIT = "limit"


class Place(enum.StrEnum):
    """Where a question is measured."""

    HOST = "host"  # the running kernel, in scratch hosts
    VM = "vm"  # a kernel whose network namespaces have rxe devices of their own: here, or in the virtual machine
    ICOUNT = "icount"  # the virtual machine with one CPU whose time counts instructions: 1 ns is one instruction


class Effort(enum.StrEnum):
    """How much of a question is measured."""

    FULL = "full"
    QUICK = "quick"  # all questions within ten minutes
    SMOKE = "smoke"  # one iteration: whether it works at all


class Statistic(enum.StrEnum):
    """What a comparison compares."""

    P50 = "p50"  # the median of the rounds' ratios, each of the medians in its round
    P99 = "p99"  # of all rounds' samples together


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio to reach: at most ``limit`` times ``peer``. ``case`` and ``peer`` are patterns (fnmatch)."""

    case: str
    peer: str
    limit: float
    statistic: Statistic = Statistic.P50


@dataclass(frozen=True, slots=True)
class Question:
    """One question; its module's first line says it in words. ``measure`` takes samples in each of ``places``."""

    name: str
    text: str
    places: tuple[Place, ...]
    measure: Callable[[Run], None]
    goals: tuple[Goal, ...] = ()
    statistics: tuple[Statistic, ...] = (Statistic.P50,)
    #: Memory of the virtual machine, where one is needed.
    memory_mb: int = 4096
    #: After so long a place counts as failed, per effort; what was sampled until then is kept.
    timeout_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured value."""

    place: Place
    case: str
    contender: str
    round: int
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A contender that could not do a case, and why."""

    place: Place
    case: str
    contender: str
    sentence: str


class Run:
    """One measuring of a question in one place. Each sample is on disk as soon as it is taken."""

    def __init__(self, question: Question, place: Place, effort: Effort, sink: IO[str]):
        self.question = question
        self.place = place
        self.effort = effort
        self._sink = sink
        self._round = 0
        self._ticker = Ticker(f"{question.name} ({place})")

    def pick(self, full: T, quick: T, smoke: T) -> T:
        """A size, by how much is to be measured."""
        return {Effort.FULL: full, Effort.QUICK: quick, Effort.SMOKE: smoke}[self.effort]

    def rounds(self, full: int, quick: int, smoke: int = 1) -> Iterator[int]:
        """Numbers of rounds; in each, every contender has its turn (`turns`)."""
        count = self.pick(full, quick, smoke)
        for number in range(count):
            self._round = number
            self.tell(f"round {number + 1} of {count}")
            yield number

    def turns(self, contenders: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """The contenders in this round's order: turned by one in each round, so that drift meets all alike."""
        names = list(contenders)
        for position in range(len(names)):
            name = names[(position + self._round) % len(names)]
            yield name, contenders[name]

    def sample(self, case: str, contender: str, value: float, unit: str) -> None:
        """Keeps one measured cost. RequestError where it is no figure."""
        if not math.isfinite(value) or value < 0:
            raise RequestError(f"{contender} in {case}: {value} is no figure", subject=self.question.name)
        self._write(
            {
                "place": self.place,
                "case": case,
                "contender": contender,
                "round": self._round,
                "value": value,
                "unit": unit,
            }
        )
        self._ticker.tick(f"{case} {contender}")

    def failed(self, case: str, contender: str, sentence: str) -> None:
        """Keeps that a contender could not do a case: the table will say so."""
        self._write({"place": self.place, "case": case, "contender": contender, "failure": sentence})
        self.tell(f"{case} {contender} FAILED: {sentence}")

    def environment(self, values: Mapping[str, Any]) -> None:
        """Keeps what a figure depends on (versions, kernel)."""
        self._write({"place": self.place, "environment": dict(values)})

    def tell(self, sentence: str) -> None:
        """Progress, for a person who waits."""
        self._ticker.tick(sentence)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._sink.write(json.dumps(line) + "\n")
        self._sink.flush()


@dataclass(frozen=True, slots=True)
class Record:
    """What a samples file holds."""

    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...]
    environments: Mapping[Place, Mapping[str, Any]]


def read(path: Path) -> Record:
    """A samples file. The last line may be cut off (an interrupted run); RequestError for another broken one."""
    samples, failures = [], []
    environments: dict[Place, Mapping[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines, 1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                break
            raise RequestError(f"{path.name}, line {number} is no sample: {text[:80]}", subject=path.name) from error
        place = Place(line.pop("place"))
        if "environment" in line:
            environments[place] = line["environment"]
        elif "failure" in line:
            failures.append(Failure(place, line["case"], line["contender"], line["failure"]))
        else:
            samples.append(Sample(place=place, **line))
    return Record(tuple(samples), tuple(failures), environments)
