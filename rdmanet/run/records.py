"""What jobs have on the host, on disk before it is there: a directory per job, whose locks say what of it lives.

::

    /run/rdmanet/jobs/             locked for a moment by whoever makes, takes over or removes a job's directory
        train/
            job.json               the plan (rdmanet.run.job.Plan)
            launcher               locked by the launcher as long as it lives; then by whoever takes the job back
            processes              locked by pods' first processes and CNI calls as well: free when all have ended

Locks are flock(2)'s: the kernel lets go of them, however a process ends, and no process id is ever trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rdmanet.errors import ConflictError, StateError
from rdmanet.run.job import Plan

PLAN, LAUNCHER, PROCESSES = "job.json", "launcher", "processes"


class Record:
    """A job's directory, held by this process. ``processes`` is the descriptor that children inherit."""

    def __init__(self, directory: Path, launcher: int):
        self._directory = directory
        self._launcher = launcher
        self.processes = -1

    @classmethod
    def begin(cls, jobs: Path, plan: Plan) -> Record:
        """Writes a job's record. ConflictError while there is one of its name, StateError when it cannot be written."""
        directory = jobs / plan.name
        try:
            with _held(jobs):
                if directory.exists():
                    raise ConflictError(f"There is a job {plan.name} already: it runs, or is being taken back.")
                directory.mkdir(mode=0o700)
                record = cls(directory, _lock(directory / LAUNCHER))
                record.processes = os.open(directory / PROCESSES, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(record.processes, fcntl.LOCK_SH)
                part = directory / f"{PLAN}.part"
                part.write_text(plan.to_json(), encoding="utf-8")
                part.rename(directory / PLAN)
        except OSError as error:
            raise StateError(
                f"The job's record cannot be written: {error.strerror}.",
                operation="write",
                subject=str(directory),
                errno=error.errno,
            ) from error
        return record

    def plan(self) -> Plan | None:
        """As it was written; None where its launcher ended before that, and has done nothing."""
        path = self._directory / PLAN
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path)) if path.exists() else None

    def wait_for_processes(self) -> None:
        """Returns when all processes of a launcher that is gone have ended. Blocks: for a worker thread."""
        self.processes = os.open(self._directory / PROCESSES, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.processes, fcntl.LOCK_EX)

    def forget(self) -> None:
        """Removes the directory: there is nothing left of the job."""
        with _held(self._directory.parent):
            shutil.rmtree(self._directory)
            _remove_if_empty(self._directory.parent)
        self.close()

    def close(self) -> None:
        """Lets go; the directory stays for the next one who takes jobs back. Idempotent."""
        for descriptor in (self.processes, self._launcher):
            if descriptor >= 0:
                os.close(descriptor)
        self.processes = self._launcher = -1


def left(jobs: Path) -> Iterator[Record]:
    """The records of jobs whose launchers are gone, each held while the caller has it."""
    try:
        names = sorted(entry.name for entry in jobs.iterdir())
    except FileNotFoundError:
        return
    for name in names:
        with _held(jobs):
            try:
                launcher = _lock(jobs / name / LAUNCHER)
            except (FileNotFoundError, NotADirectoryError, BlockingIOError):
                continue  # gone by now, or its launcher lives
        yield Record(jobs / name, launcher)
    if not names:
        with _held(jobs):
            _remove_if_empty(jobs)


def _remove_if_empty(jobs: Path) -> None:
    with contextlib.suppress(OSError):  # other jobs are there
        jobs.rmdir()


def _lock(path: Path) -> int:
    """A descriptor of the locked file. BlockingIOError while another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _held(jobs: Path) -> Iterator[None]:
    """The directory of jobs, there and locked: for moments only."""
    while True:
        jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # removed by one who found it empty
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else it was removed before it was locked
                yield
                return
        finally:
            os.close(descriptor)
