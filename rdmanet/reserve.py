"""Disk space that is kept for taking things back: a full disk refuses ADDs, and never a DEL.

A file in the state directory holds 1 MiB (``posix_fallocate``). Whoever frees something and finds the disk full gives
it up, once; it is made again as soon as there is room. The executable does the same for the queue of DELs
(``cni/queue.h``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from rdmanet.errors import StateError

log = logging.getLogger(__name__)

FILE = "reserve"
SIZE_BYTES = 1 << 20
_SIZES = (SIZE_BYTES, SIZE_BYTES // 4, SIZE_BYTES // 16)
#: What there must be besides for an ADD: rows, and the write-ahead log's next pages.
ROOM_BYTES = 1 << 20


class Reserve:
    """The file of a state directory, which is there already. Thread-safe: each call is one or two system calls."""

    def __init__(self, state_dir: Path):
        self._path = state_dir / FILE

    def require(self) -> None:
        """Makes the file where it is missing. Raises StateError where there is no room for it, or none besides."""
        if not self.make() or self._free_bytes() < ROOM_BYTES:
            raise StateError(
                f"The disk of {self._path.parent} is full, and nothing was begun: ADDs need {ROOM_BYTES >> 20} MiB"
                f" there, besides the {SIZE_BYTES >> 20} MiB that are kept for DELs. Free space and ask again.",
                operation="reserve",
                subject=str(self._path),
                errno=errno.ENOSPC,
            )

    def make(self) -> bool:
        """Whether the whole file is there, made now where it was not; as much of it as there is room for."""
        held = self._size()
        for size in _SIZES:
            if held >= size:
                break
            if self._allocate(size):
                held = size
                break
        return held == SIZE_BYTES

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def _allocate(self, size: int) -> bool:
        # Under another name first: what is there under its own is whole.
        part = self._path.with_name(f"{FILE}.part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
            part.rename(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            return False
        return True

    def give_up(self) -> bool:
        """Frees the space; False where that has been done before."""
        try:
            self._path.unlink()
        except OSError:
            return False
        log.warning("The disk of %s is full: the space that was reserved for DELs is used now", self._path.parent)
        return True

    def give_up_if_full(self) -> None:
        """Before something that needs space and is not an ADD."""
        if self._free_bytes() < ROOM_BYTES:
            self.give_up()

    def _free_bytes(self) -> int:
        found = os.statvfs(self._path.parent)
        return found.f_bavail * found.f_frsize
