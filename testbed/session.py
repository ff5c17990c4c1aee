"""What one process of the testbed leaves on the machine while it runs, and how the next one finds what a crash left.

A session is a directory ``/run/rdmanet-testbed/ID`` whose lock file its process holds. Namespaces are bound below it
and cgroups carry its ID, so whatever belongs to a session that nobody holds can be removed by anybody.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rdmanet.errors import KernelError
from testbed.container import Cgroup, cgroup2_root

ROOT = Path("/run/rdmanet-testbed")
MNT_DETACH = 2


@dataclass(frozen=True)
class Session:
    """This process's part of the machine. `netns` is where namespaces are bound."""

    id: str
    path: Path
    lock: TextIO

    @property
    def netns(self) -> Path:
        """The directory of bound network namespaces."""
        return self.path / "netns"

    def cgroup(self, name: str) -> Cgroup:
        """The (not yet created) cgroup of a container of this session."""
        return Cgroup(f"{self.id}-{name}")


def unmount(path: Path) -> None:
    """Detach what is mounted at `path` in this process's mount namespace; nothing happens when nothing is."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), MNT_DETACH) < 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise KernelError("cannot unmount", operation="umount2", subject=str(path), errno=number)


def _remove(directory: Path) -> None:
    for group in (cgroup2_root() / "rdmanet-testbed").glob(f"{directory.name}-*"):
        Cgroup(group.name).remove()
    for bound in (directory / "netns").glob("*"):
        unmount(bound)
    shutil.rmtree(directory, ignore_errors=True)


def sweep() -> list[str]:
    """Remove what sessions of ended processes left; returns their IDs."""
    swept = []
    for directory in ROOT.glob("*/"):
        try:
            lock = (directory / "lock").open()
        except FileNotFoundError:
            continue  # being made or removed right now
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process lives
            _remove(directory)
            swept.append(directory.name)
    with contextlib.suppress(OSError):  # not empty: others are at work
        ROOT.rmdir()
    return swept


@functools.cache
def session() -> Session:
    """This process's session, made at the first call, after sweeping up what crashed processes left."""
    sweep()
    id = secrets.token_hex(4)
    path = ROOT / id
    (path / "netns").mkdir(parents=True)
    # Named only once it is held: a sweep in another process must never find it free.
    lock = (path / "lock.new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (path / "lock.new").rename(path / "lock")
    return Session(id, path, lock)


def end_session() -> None:
    """Remove this process's session; its containers must have ended. Idempotent."""
    if session.cache_info().currsize:
        held = session()
        session.cache_clear()
        _remove(held.path)
        held.lock.close()
        with contextlib.suppress(OSError):
            ROOT.rmdir()
