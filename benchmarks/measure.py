"""``python -m benchmarks.measure QUESTION --place PLACE --effort EFFORT --samples FILE``: one question in one place.

`benchmarks.bench` runs this, on the host or in the virtual machine, and reads the file when it is over.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

from benchmarks import environment, questions
from benchmarks.question import Effort, Place, Question, Run
from rdmanet.errors import RdmanetError, RequestError
from testbed.container import CommandError
from testbed.progress import say
from testbed.session import end_session


def names() -> list[str]:
    """Every question, in the order in which they build on each other."""
    order = ["cni", "datapath", "services", "rdma", "lease", "agent", "churn"]
    found = {module.name for module in pkgutil.iter_modules(questions.__path__)}
    return [name for name in order if name in found] + sorted(found - set(order))


def find(name: str) -> Question:
    """The question of that name. RequestError where there is none."""
    if name not in names():
        raise RequestError(f"There is no question {name}; there are {', '.join(names())}.", subject=name)
    question = importlib.import_module(f"benchmarks.questions.{name}").QUESTION
    assert isinstance(question, Question)
    return question


def measure(name: str, place: Place, effort: Effort, samples: Path) -> None:
    """Measures one question in one place; appends its samples to a file."""
    question = find(name)
    with samples.open("a", encoding="utf-8") as sink:
        run = Run(question, place, effort, sink)
        run.environment(environment.describe())
        question.measure(run)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when it was measured, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--place", type=Place, choices=list(Place), required=True)
    parser.add_argument("--effort", type=Effort, choices=list(Effort), default=Effort.FULL)
    parser.add_argument("--samples", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        measure(options.question, options.place, options.effort, options.samples)
    except CommandError as error:
        say(f"{options.question}: {error}\n{error.completed.stdout[-2000:]}{error.completed.stderr[-2000:]}")
        return 1
    except RdmanetError as error:
        say(f"{options.question}: {error}")
        return 1
    finally:
        end_session()
    return 0


if __name__ == "__main__":
    sys.exit(main())
