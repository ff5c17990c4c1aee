"""A host whose state directory is a small file system of its own, which can be filled to the last byte."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from testbed.host import Host

STATE = "/var/lib/rdmanet"
_FILLING = "filling"


def mount_small(host: Host, size_mib: int = 8) -> None:
    """Before an agent is started: a tmpfs of that size for its files."""
    host.container.act(("mount", "tmpfs", STATE, "tmpfs", 0, f"mode=700,size={size_mib}m"))


def fill(host: Host) -> None:
    """Not one byte is free afterwards, as another process than the agent sees it."""
    path = host.path(f"{STATE}/{_FILLING}")
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    if free_bytes(host):
        raise OSError(errno.EIO, "the file system is not full", str(path))


def free(host: Host) -> None:
    """There is room again."""
    host.path(f"{STATE}/{_FILLING}").unlink(missing_ok=True)


def free_bytes(host: Host) -> int:
    """What is left."""
    found = os.statvfs(host.path(STATE))
    return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def full(host: Host) -> Iterator[None]:
    """While the block runs the disk is full."""
    fill(host)
    yield
    free(host)
