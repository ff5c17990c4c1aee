"""Row `rdma-core-tests`: rdma-core's own tests on a pod's device, beside the same on a hand-made rxe.

They are those of the distribution's python3-pyverbs, unpacked (its documentation has them compressed) and otherwise as
they are, run by their own run_tests.py inside a pod. The other device was made with `rdma link add` in the namespace of
a pod without an agent. The row is good when no test does worse on the pod's device.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.peers import namespaces
from benchmarks.peers.namespaces import End
from rdmanet.errors import UnavailableError
from testbed.paths import BUILD
from testbed.rows import Figure, StepError, need

#: The distribution's Python has pyverbs.
PYTHON = "/usr/bin/python3"
#: Where the package has them, and where `make setup` unpacks them on systems that leave documentation out.
PLACES = (Path("/usr/share/doc/rdma-core/tests"), BUILD / "rdma-core-tests")
TIMEOUT_S = 1200.0
#: unittest -v (TextTestResult); a test may print something before its outcome.
_BEGIN = re.compile(r"^(test_\w+) \((\S+?)\)", re.MULTILINE)
_OUTCOME = re.compile(r"(?:^|\.\.\. |\s)(ok|FAIL|ERROR|skipped .*|expected failure|unexpected success)$", re.MULTILINE)
#: From good to bad: what counts as worse.
_RANKS = {"ok": 0, "expected failure": 0, "skipped": 1, "FAIL": 2, "ERROR": 2, "unexpected success": 2}


@contextlib.contextmanager
def unpacked() -> Iterator[Path]:
    """A directory with the tests, which pods can read; UnavailableError where the distribution's are not installed."""
    found = next((place for place in PLACES if (place / "run_tests.py").exists()), None)
    if found is None:
        raise UnavailableError(f"rdma-core's tests are not in {' or '.join(map(str, PLACES))}; run: make setup")
    with tempfile.TemporaryDirectory(prefix="rdma-core-tests-") as name:
        directory = Path(name) / "tests"
        directory.mkdir()
        for file in found.iterdir():
            if file.suffix == ".gz":
                with gzip.open(file) as packed, (directory / file.stem).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
            elif file.suffix == ".py":
                shutil.copy(file, directory)
        Path(name).chmod(0o755)
        yield directory


def outcomes(printed: str) -> dict[str, str]:
    """Test → "ok", "FAIL", "ERROR" or "skipped", with the reason, from what unittest -v has printed.

    The lists of failures that follow begin with a line of "=".
    """
    printed = printed.partition("\n" + "=" * 70)[0].partition("\n" + "-" * 70 + "\nRan ")[0]
    found = {}
    begins = list(_BEGIN.finditer(printed))
    for begin, following in zip(begins, [*(match.start() for match in begins[1:]), len(printed)], strict=True):
        ends = _OUTCOME.findall(printed[begin.end() : following])
        # Since Python 3.11 the class's name ends with the method's.
        place = begin[2] if begin[2].endswith(f".{begin[1]}") else f"{begin[2]}.{begin[1]}"
        found[place.removeprefix("tests.")] = ends[-1] if ends else "ERROR"
    return found


def kind(outcome: str) -> str:
    """Without the reason of a skip."""
    return outcome.split(" '")[0].split(' "')[0] if outcome.startswith("skipped") else outcome


def run(end: End, directory: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """The tests (all, or those of these names) on an end's device; StepError when they did not come to their end."""
    argv = [PYTHON, str(directory / "run_tests.py"), "--dev", end.device, "--port", "1"]
    argv += ["--gid", str(end.gid_index(4)), "-v", *(f"tests.{name}" for name in names)]
    done = end.pod.exec(argv, timeout_s=TIMEOUT_S, check=False, cwd=str(directory.parent))
    printed = done.stdout + done.stderr
    found = outcomes(printed)
    ran = re.search(r"^Ran (\d+) tests", printed, re.MULTILINE)
    if done.returncode is None or ran is None:
        how = f"within {TIMEOUT_S:g} s" if done.returncode is None else f"but with status {done.returncode}"
        raise StepError(f"rdma-core's tests on {end.device} did not come to their end {how}: {printed.strip()[-300:]}")
    need(len(found) == int(ran[1]), f"{ran[1]} tests ran on {end.device}, and {len(found)} outcomes were understood")
    return found


def differences(ours: Mapping[str, str], hand_made: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Test → outcome on each device, where they are of different kinds."""
    return {
        name: {"pod": ours.get(name, "not run"), "hand-made": hand_made.get(name, "not run")}
        for name in sorted({*ours, *hand_made})
        if kind(ours.get(name, "not run")) != kind(hand_made.get(name, "not run"))
    }


def worse(difference: Mapping[str, str]) -> bool:
    """Whether the pod's device did worse in one of `differences`."""
    ranks = {where: _RANKS.get(kind(outcome), 2) for where, outcome in difference.items()}
    return ranks["pod"] > ranks["hand-made"]


def counts(found: Mapping[str, str]) -> dict[str, int]:
    """Passed, failed, skipped."""
    kinds = Counter(kind(outcome) for outcome in found.values())
    passed, skipped = kinds["ok"] + kinds["expected failure"], kinds["skipped"]
    return {"passed": passed, "failed": len(found) - passed - skipped, "skipped": skipped}


def both(names: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """On a pod's device and on a hand-made one, at the same time."""
    with (
        unpacked() as directory,
        namespaces.agent_host("core") as host,
        namespaces.ours(host, "core") as pair,
        namespaces.one_veth("hand") as hand_made,
        ThreadPoolExecutor(2) as threads,
    ):
        runs = [threads.submit(run, end, directory, names) for end in (pair.client, hand_made.client)]
        return runs[0].result(), runs[1].result()


def measure() -> Figure:
    """All of them. What differs is tried once more on both devices, alone: some depend on time."""
    ours, hand_made = both()
    again = {}
    differing = differences(ours, hand_made)
    if differing:
        again = differences(*both(sorted(differing)))
    lost = {name: again[name] for name in differing if name in again and worse(again[name])}
    need(not lost, f"{len(lost)} tests do worse on a pod's device than on a hand-made rxe: {lost}")
    need(counts(ours)["passed"] > 0, "no test passed")
    figures, base = counts(ours), counts(hand_made)
    return Figure(
        figures["passed"],
        "tests",
        f"of rdma-core passed on a pod's device, {figures['failed']} failed, {figures['skipped']} were skipped; on a "
        f"hand-made rxe {base['passed']}, {base['failed']} and {base['skipped']}; {len(differing)} differed at first, "
        f"{len(again)} again",
        {
            "pod": figures,
            "hand-made": base,
            "failed": {name: outcome for name, outcome in ours.items() if kind(outcome) in ("FAIL", "ERROR")},
            "differences": differing,
            "differences again": again,
            "tests": {name: {"pod": outcome, "hand-made": hand_made.get(name)} for name, outcome in ours.items()},
        },
    )
