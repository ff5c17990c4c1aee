"""`rdmanet run` on a host, watched while it runs, and what is left of jobs: what its tests and rows share."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rdmanet.errors import UnavailableError
from testbed.container import cgroup2_root
from testbed.host import CNI_EXECUTABLE, Host
from testbed.paths import REPOSITORY

JOBS = "/run/rdmanet/jobs"
NETNS = "/run/netns"
#: Of the directory of jobs' cgroups, on the whole machine.
CGROUPS = "rdmanet-run"
#: Emulated on a busy machine.
TIMEOUT_S = 300.0

_GATE = """#!/bin/sh
if [ "$CNI_COMMAND" = {command} ]; then
	echo "$CNI_CONTAINERID" > {directory}/reached
	read -r line < {directory}/go
fi
exec {executable}
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a job left: its exit code, negative for a signal to the launcher itself, and its output."""

    code: int
    stdout: str
    stderr: str

    def of(self, rank: int) -> list[str]:
        """A rank's lines on standard output, without the prefix."""
        prefix = f"[{rank}] "
        return [line.removeprefix(prefix) for line in self.stdout.splitlines() if line.startswith(prefix)]

    def json(self, rank: int) -> Any:
        """A rank's last line, as JSON."""
        return json.loads(self.of(rank)[-1])


class Job:
    """A running launcher; `end` waits for it, `close` kills it."""

    def __init__(self, host: Host, *words: str, plugin: str = str(CNI_EXECUTABLE), stdout: int | None = None):
        argv = [sys.executable, "-m", "rdmanet", "run", "--config", host._config_file(), "--plugin", plugin, *words]
        self._host = host
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = host.popen(
            argv,
            cwd=str(REPOSITORY),
            environment={"PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=self._stderr.fileno(),
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, name="job-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    @property
    def stderr(self) -> str:
        """What it has complained of so far."""
        return os.pread(self._stderr.fileno(), 1 << 26, 0).decode(errors="replace")

    def wait_for(self, *words: str) -> None:
        """Until each of these was in a line of output; UnavailableError when the output ends before."""
        missing = {word for word in words if not any(word in line for line in self._said)}
        while missing:
            try:
                line = self._lines.get(timeout=TIMEOUT_S)
            except queue.Empty:
                line = None
            if line is None:
                raise UnavailableError(f"the job never said {missing}: {self._said} {self.stderr}")
            self._said.append(line)
            missing = {word for word in missing if word not in line}

    def signal(self, number: int) -> None:
        """To the launcher alone."""
        self.process.signal(number)

    def end(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Waits for the launcher's end."""
        code = self.process.wait(timeout_s)
        while (line := self._lines.get(timeout=TIMEOUT_S)) is not None:
            self._said.append(line)
        self._reader.join()
        self.process.close()
        ended = Ended(code, "".join(self._said), self.stderr)
        self._stderr.close()
        return ended

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.pidfd >= 0:  # it was not ended: what it has goes all the same
            self.process.close()
            run(self._host, "--cleanup")


def run(host: Host, *words: str, **options: Any) -> Ended:
    """A job from its beginning to its end."""
    with Job(host, *words, **options) as job:
        return job.end()


def left(host: Host) -> list[str]:
    """Everything on a host that a job has: records, network namespaces, cgroups with their processes, attachments."""
    found = [f"record {path.name}" for path in _entries(host.path(JOBS))]
    found += [f"namespace {path.name}" for path in _entries(host.path(NETNS)) if path.name.startswith("rdmanet-")]
    for group in _directories(cgroup2_root() / CGROUPS):
        pids = [pid for procs in group.rglob("cgroup.procs") for pid in procs.read_text().split()]
        found.append(f"cgroup {group.name} with {len(pids)} processes")
    if host.agent is not None:
        host.settle()
        rows = host.api("GET", "/v1/status")["attachments"]
        found += [f"attachment {row['pod']}" for row in rows if row["network"] == "rdmanet-run"]
    return found


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _directories(directory: Path) -> list[Path]:
    return [path for path in _entries(directory) if path.is_dir()]


class Gate:
    """A CNI executable that waits before it does one of the commands, so that a launcher can be hit in the middle."""

    def __init__(self, host: Host, command: str, name: str):
        self.directory = f"/run/gate-{name}"
        self.plugin = f"{self.directory}/rdmanet"
        script = _GATE.format(command=command, directory=self.directory, executable=CNI_EXECUTABLE)
        host.container.act(("mkdir", self.directory), ("write", self.plugin, script))
        host.path(self.plugin).chmod(0o755)
        paths = [host.path(f"{self.directory}/{fifo}") for fifo in ("reached", "go")]
        for path in paths:
            os.mkfifo(path)
        # Both ways: who opens an end of it never waits.
        self._reached, self._go = (os.open(path, os.O_RDWR) for path in paths)

    def wait(self, timeout_s: float = TIMEOUT_S) -> None:
        """Until a call has come to it; UnavailableError where none does."""
        poll = select.poll()
        poll.register(self._reached, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise UnavailableError(f"no call came to {self.plugin} within {timeout_s:g} s")
        while os.read(self._reached, 1) != b"\n":
            pass

    def go(self, calls: int = 1) -> None:
        """Lets so many calls go on that wait, or will."""
        os.write(self._go, b"go\n" * calls)

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._reached)
        os.close(self._go)


def python(program: str) -> Sequence[str]:
    """The end of a command line that runs a program in each rank."""
    return ("--", sys.executable, "-c", program)
