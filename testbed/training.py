"""examples/train under `rdmanet run`: the job, and whether all ranks learned what one process learns."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rdmanet.errors import InputError
from testbed.host import Host
from testbed.jobs import TIMEOUT_S, Job
from testbed.paths import REPOSITORY

SCRIPT = REPOSITORY / "examples/train/train.py"
#: A missing or doubled share of a float64 gradient is ten orders of magnitude above it.
ROUNDING = 1e-12
#: What is left to a pod of a Kubernetes Job: the index, and what its manifest says.
AS_KUBERNETES = """
export JOB_COMPLETION_INDEX=$RANK
for name in $(env | grep -E '^(RANK|LOCAL_|GROUP_|OMPI_COMM|PMI_|RDMANET_PEER)' | cut -d= -f1); do unset $name; done
exec "$@"
"""


def command(*options: str, kubernetes: bool = False) -> list[str]:
    """The end of a command line; for `kubernetes` without the variables that only other launchers set."""
    argv = [sys.executable, str(SCRIPT), *options]
    return ["--", "sh", "-c", AS_KUBERNETES, "sh", *argv] if kubernetes else ["--", *argv]


def alone(host: Host, *options: str) -> tuple[dict[str, Any], Any]:
    """The report and the parameters of one process on the host."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "alone.npy"
        argv = [sys.executable, str(SCRIPT), *options, "--save", str(file)]
        done = host.exec(argv, cwd=str(REPOSITORY), timeout_s=TIMEOUT_S)
        return done.json(), np.load(file)


def trained(job: Job, pods: int, file: Path, one: tuple[dict[str, Any], Any]) -> tuple[list[dict[str, Any]], float]:
    """Waits for a job that saves to `file`: its reports by rank, and how far its parameters are from one process'.

    InputError unless all ended with 0, with the same bits, within rounding of `one`, and better than they began.
    """
    ended = job.end()
    if ended.code != 0:
        raise InputError(f"the job ended with {ended.code}: {ended.stderr}")
    reports = [ended.json(rank) for rank in range(pods)]
    digests = {report["parameters_sha256"] for report in reports}
    if len(digests) != 1:
        raise InputError(f"{len(digests)} different results of {pods} ranks")
    difference = float(np.abs(np.load(file) - one[1]).max())
    if not difference < ROUNDING:
        raise InputError(f"{difference:.3g} from one process alone")
    if not reports[0]["last_loss"] < reports[0]["first_loss"]:
        raise InputError("nothing was learned")
    return reports, difference
