"""inotify(7): what vanishes from folders, and what comes."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from rdmanet.errors import KernelError

IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IN_UNMOUNT, IN_Q_OVERFLOW, IN_IGNORED = 0x2000, 0x4000, 0x8000
IN_ONLYDIR = 0x01000000
_WANTED = IN_MOVED_FROM | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
_ENDED = IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT | IN_IGNORED
_EVENT = struct.Struct("=iIII")
_READ_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Vanished:
    """``name`` is no longer in the folder; without a name the folder itself is not there any more."""

    folder: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Appeared:
    """``name`` is in the folder now, or anew."""

    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class Lost:
    """More has happened than could be kept."""


class Folders:
    """Watched folders; give them back with ``close``. ``coming``: also for what appears. Not thread-safe."""

    def __init__(self, *, coming: bool = False) -> None:
        self._wanted = _WANTED | IN_CREATE | IN_MOVED_TO if coming else _WANTED
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise _failed("inotify_init1", "")
        self._watches: dict[str, int] = {}

    def fileno(self) -> int:
        """The descriptor to watch."""
        return int(self._descriptor)

    def watch(self, folder: str) -> bool:
        """Watches a folder from now on; False where there is none. Idempotent. Raises KernelError, where there are
        too many watches (fs.inotify.max_user_watches) too."""
        if folder in self._watches:
            return True
        number = _libc.inotify_add_watch(self._descriptor, os.fsencode(folder), self._wanted)
        if number < 0:
            if ctypes.get_errno() in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise _failed("inotify_add_watch", folder)
        self._watches[folder] = number  # another path to a folder that is watched has its number
        return True

    def forget(self, folder: str) -> None:
        """Watches it no longer. Idempotent."""
        number = self._watches.pop(folder, None)
        if number is not None and number not in self._watches.values():
            _libc.inotify_rm_watch(self._descriptor, number)  # the kernel may have done so

    def read(self) -> list[Vanished | Appeared | Lost]:
        """Everything that has happened; never waits."""
        found: list[Vanished | Appeared | Lost] = []
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return found
        place = 0
        while place + _EVENT.size <= len(data):
            number, mask, _, length = _EVENT.unpack_from(data, place)
            name = data[place + _EVENT.size : place + _EVENT.size + length].rstrip(b"\0")
            place += _EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                found.append(Lost())
                continue
            folders = [folder for folder, one in self._watches.items() if one == number]
            if mask & (IN_DELETE | IN_MOVED_FROM):
                found += [Vanished(folder, os.fsdecode(name)) for folder in folders]
            elif mask & (IN_CREATE | IN_MOVED_TO):
                found += [Appeared(folder, os.fsdecode(name)) for folder in folders]
            elif mask & _ENDED:
                found += [Vanished(folder) for folder in folders]
                for folder in folders:
                    self.forget(folder)
        return found

    def close(self) -> None:
        """Gives the descriptor back. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _failed(operation: str, subject: str) -> KernelError:
    return KernelError(
        "The kernel does not let the agent watch folders; see fs.inotify in sysctl(8).",
        operation=operation,
        subject=subject,
        errno=ctypes.get_errno(),
    )
