"""A cgroup for each pod of a job: what the agent limits devices by, and what ends processes that are left."""

from __future__ import annotations

import contextlib
import select
import time
from pathlib import Path

from rdmanet.errors import KernelError

#: Processes that were killed end when the kernel has time; one that waits for a device takes as long as that.
END_TIMEOUT_S = 60.0


def root(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path | None:
    """Where the cgroup2 hierarchy is mounted; None where it is not."""
    for line in reversed(mountinfo.read_text(encoding="utf-8").splitlines()):
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] == "cgroup2":  # the last: earlier ones may lie hidden below later mounts
            return Path(fields.split()[4])
    return None


def create(group: Path) -> None:
    """Makes it with what is above it. Raises KernelError."""
    try:
        group.mkdir(parents=True)
    except OSError as error:
        raise KernelError(
            "A cgroup for the job cannot be made.", operation="mkdir", subject=str(group), errno=error.errno
        ) from error


def remove(group: Path) -> None:
    """Ends every process below a directory and removes it, and the one above it if that is empty; idempotent.

    Raises KernelError where a process does not end.
    """
    if group.is_dir():
        end_processes(group)
        below = [path for path in group.rglob("*") if path.is_dir()]
        for directory in sorted(below, key=lambda path: -len(path.parts)):
            _rmdir(directory)
        _rmdir(group)
    with contextlib.suppress(OSError):  # not empty: other jobs are there
        group.parent.rmdir()


def end_processes(group: Path) -> None:
    """Ends every process below a directory, which need not be there. KernelError where one does not end."""
    if not group.is_dir():
        return
    with (group / "cgroup.events").open(encoding="ascii") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        (group / "cgroup.kill").write_text("1", encoding="ascii")
        while "populated 1" in events.read():
            if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                raise KernelError(
                    f"Processes of a pod do not end within {END_TIMEOUT_S:g} s.", operation="kill", subject=str(group)
                )
            events.seek(0)


def _rmdir(directory: Path) -> None:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise KernelError(
            "A job's cgroup cannot be removed.", operation="rmdir", subject=str(directory), errno=error.errno
        ) from error
