"""``python -m testbed.suite``: every check and test, in the right place each, and one summary line at the end.

Two lanes run side by side, of about the same length: checks, the tests of the running kernel and tests/rdma in
exclusive mode; and tests/rdma in shared mode. tests/rdma needs rxe in network namespaces: it runs in a virtual machine,
or here on a capable kernel. Results are JUnit files in build/test.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from rdmanet.errors import RdmanetError, UnavailableError
from rdmanet.model import RdmaMode
from testbed import vm
from testbed.kernel import why_not_here
from testbed.paths import BUILD, REPOSITORY
from testbed.progress import say

RESULTS = BUILD / "test"
_VM_TIMEOUT_S = 4500.0
#: After this much silence a line says that a run goes on.
_SILENCE_S = 10.0


@dataclass(slots=True)
class Outcome:
    """What a run counted; ``failures`` name what failed, ``skips`` count by reason."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds_s: float = 0.0

    def add(self, other: Outcome) -> None:
        """Sum up."""
        self.passed += other.passed
        self.failures += other.failures
        self.skips += other.skips

    @property
    def exit_code(self) -> int:
        """Zero only when something passed and nothing failed."""
        return 0 if self.passed and not self.failures else 1

    def summary(self) -> list[str]:
        """The closing lines: failures, skips by reason, and the counts alone on the last one."""
        lines = [f"failed: {name}" for name in self.failures]
        lines += [f"skipped {count}: {reason}" for reason, count in self.skips.most_common()]
        skipped = sum(self.skips.values())
        return [*lines, f"{self.passed} passed, {len(self.failures)} failed, {skipped} skipped"]


def parse_junit(text: str) -> Outcome:
    """A pytest JUnit file. A test that failed and whose clean-up failed too counts as one failure."""
    outcome = Outcome()
    failed: dict[str, None] = {}
    passed: set[str] = set()
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed[name] = None
        elif skip is not None:
            outcome.skips[skip.get("message") or "without a reason"] += 1
        else:
            passed.add(name)
    outcome.passed = len(passed - failed.keys())
    outcome.failures = list(failed)
    return outcome


@dataclass(frozen=True, slots=True)
class Run:
    """One command of the suite; ``start(log)`` runs it with its output in ``log``."""

    name: str
    start: Callable[[BinaryIO], Outcome]


def _tool(name: str, argv: list[str]) -> Run:
    def start(log: BinaryIO) -> Outcome:
        done = subprocess.run(argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        return Outcome(passed=1) if done.returncode == 0 else Outcome(failures=[name])

    return Run(name, start)


def checks() -> list[Run]:
    """ruff, mypy and clang-format over the whole repository."""
    tool = str(Path(sys.executable).parent) + "/"
    folders = ("bpf", "cni", "benchmarks")
    sources = sorted(str(path) for folder in folders for path in (REPOSITORY / folder).glob("*.[ch]"))
    return [
        _tool("check: ruff", [tool + "ruff", "check", "."]),
        _tool("check: ruff format", [tool + "ruff", "format", "--check", "."]),
        _tool("check: mypy", [tool + "mypy"]),
        _tool("check: clang-format", [tool + "clang-format", "--dry-run", "-Werror", *sources]),
    ]


def _finish(name: str, returncode: int, results: Path) -> Outcome:
    """A pytest run's outcome: its JUnit file, or a failure of its own where it left none or ran nothing."""
    outcome = parse_junit(results.read_text()) if results.is_file() else Outcome()
    if returncode not in (0, 1):
        what = {2: "was interrupted", 3: "broke inside pytest", 4: "was called wrongly", 5: "found no tests"}
        outcome.failures.append(f"{name} {what.get(returncode, f'ended with status {returncode}')}")
    elif returncode == 1 and not outcome.failures:
        outcome.failures.append(f"{name} failed without naming a test")
    return outcome


def _pytest(words: list[str], results: Path) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}", *words]


def host_tests(folder: str, words: list[str]) -> Run:
    """pytest on the running kernel."""
    name = f"tests/{folder}"
    results = RESULTS / f"{folder}.xml"

    def start(log: BinaryIO) -> Outcome:
        argv = _pytest([name, *words], results)
        done = subprocess.run(argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        return _finish(name, done.returncode, results)

    return Run(name, start)


def rdma_tests(mode: RdmaMode, words: list[str]) -> Run:
    """pytest tests/rdma where namespaces can have rxe in ``mode``: here, else in the virtual machine."""
    name = f"tests/rdma ({mode.value} mode)"
    results = RESULTS / f"rdma-{mode.value}.xml"
    marker = "exclusive or both_modes" if mode is RdmaMode.EXCLUSIVE else "not exclusive"

    def start(log: BinaryIO) -> Outcome:
        # Hypothesis' plugin imports all of it at the end: ten seconds where it is emulated, and nothing here uses it.
        argv = _pytest(["tests/rdma", "-p", "no:hypothesispytest", "-m", marker, *words], results)
        if not why_not_here(mode):
            done = subprocess.run(argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
            return _finish(name, done.returncode, results)
        # Collecting here leaves pytest's rewritten bytecode for the guest, where rewriting is slow.
        _collected(marker)
        try:
            status = vm.run(argv, rdma_mode=mode, timeout_s=_VM_TIMEOUT_S, stdout=log, stderr=log)
        except UnavailableError as error:
            reason = f"rxe in network namespaces: {why_not_here(mode)}; no virtual machine: {error.sentence}"
            log.write(reason.encode() + b"\n")
            return Outcome(skips=collections.Counter({reason: _collected(marker)}))
        except RdmanetError as error:
            log.write(str(error).encode() + b"\n")
            outcome = _finish(name, 0, results)
            outcome.failures.append(f"{name}: {error.sentence.splitlines()[0]}")
            return outcome
        return _finish(name, status, results)

    return Run(name, start)


def _collected(marker: str) -> int:
    """How many tests a run has."""
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-qq", "tests/rdma"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    shown = subprocess.run(
        [*argv, "-m", marker], cwd=REPOSITORY, capture_output=True, text=True, env=env, check=False
    ).stdout
    return sum(int(line.rpartition(":")[2]) for line in shown.splitlines() if line.rpartition(":")[2].strip().isdigit())


class _Lane(threading.Thread):
    """Runs one after another; each run's output is in a file of its own."""

    def __init__(self, runs: list[Run]):
        super().__init__(daemon=True)  # Ctrl-C ends all: QEMU never outlives this process
        self.runs = runs
        self.finished = [threading.Event() for _ in runs]
        self.logs = [RESULTS / (re.sub(r"\W+", "-", run.name).strip("-") + ".log") for run in runs]
        self.outcomes: list[Outcome] = []
        for log in self.logs:
            log.write_bytes(b"")

    def run(self) -> None:
        for run, log, finished in zip(self.runs, self.logs, self.finished, strict=True):
            began = time.monotonic()
            outcome = Outcome(failures=[f"{run.name} did not finish"])
            try:
                with log.open("wb") as handle:
                    outcome = run.start(handle)
            finally:
                outcome.seconds_s = time.monotonic() - began
                self.outcomes.append(outcome)
                finished.set()


def _follow(lanes: list[_Lane]) -> None:
    """Print each run's output, lane by lane, while it is written."""
    for lane in lanes:
        for number, run in enumerate(lane.runs):
            print(f"\n==> {run.name}", flush=True)
            began = heard = time.monotonic()
            whole_line = True
            with lane.logs[number].open("rb") as log:
                while True:
                    last = lane.finished[number].wait(0.5)
                    if text := log.read():
                        sys.stdout.buffer.write(text)
                        sys.stdout.buffer.flush()
                        heard, whole_line = time.monotonic(), text.endswith(b"\n")
                    elif not last and time.monotonic() - heard >= _SILENCE_S:
                        if not whole_line:  # pytest is in the middle of its dots
                            print(flush=True)
                        say(f"{run.name} goes on: {time.monotonic() - began:.0f} s")
                        heard, whole_line = time.monotonic(), True
                    if last:
                        break
            outcome = lane.outcomes[number]
            counted = outcome.summary()[-1]
            print(f"==> {run.name}: {counted.replace(', 0 skipped', '')} in {outcome.seconds_s:.0f} s", flush=True)


def run_lanes(lanes: Iterable[list[Run]], follow: Callable[[list[_Lane]], None] = _follow) -> Outcome:
    """Run the lanes side by side; the sum of all outcomes."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for stale in RESULTS.glob("*.xml"):
        stale.unlink()
    threads = [_Lane(runs) for runs in lanes if runs]
    for thread in threads:
        thread.start()
    follow(threads)
    total = Outcome()
    for thread in threads:
        thread.join()
        for outcome in thread.outcomes:
            total.add(outcome)
    return total


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when something passed and nothing failed."""
    parts = ("check", "unit", "bpf", "kernel", "shared", "exclusive")
    parser = argparse.ArgumentParser(prog="python -m testbed.suite", description=__doc__)
    parser.add_argument("--only", choices=parts, action="append", help="just this part (can be given again)")
    parser.add_argument("words", nargs="*", help="further words for pytest, after --")
    options = parser.parse_args(arguments)
    wanted = options.only or parts
    host = checks() if "check" in wanted else []
    host += [host_tests(folder, options.words) for folder in ("unit", "bpf", "kernel") if folder in wanted]
    rdma = {mode: [rdma_tests(mode, options.words)] if mode.value in wanted else [] for mode in RdmaMode}
    began = time.monotonic()
    try:
        outcome = run_lanes([[*host, *rdma[RdmaMode.EXCLUSIVE]], rdma[RdmaMode.SHARED]])
    except KeyboardInterrupt:
        print("\ninterrupted")
        return 130
    print(f"\nall of it: {time.monotonic() - began:.0f} s; details in {RESULTS}")
    print("\n".join(outcome.summary()), flush=True)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
