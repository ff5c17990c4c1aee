"""Whether everything is pinned still, and the slots of programs are filled; and pinning again what is not.

The agent holds maps and dispatchers open, so a pin that somebody has removed can be made again, and nothing is lost.
The links of socket programs are held by their pins alone: those programs are attached anew.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from rdmanet.datapath import bpf, loader, sockets
from rdmanet.datapath.artifact import CONTINUATIONS, HOOKS

_DISPATCHER = "dispatch_"
_LINK = "link_"


class Pins:
    """What lies below the datapath's directory."""

    def __init__(self, pinned: loader.Pinned):
        self._pinned = pinned

    def missing(self, cgroup: Path | None) -> set[str]:
        """Names of pins that are gone, or are something else's; ``cgroup`` is the root of the hierarchy, where socket
        programs are attached."""
        try:
            with loader.locked(self._pinned.directory):
                found = set(self._gone())
        except FileNotFoundError:
            found = {name for name, _, _ in self._wanted()}
        if cgroup is not None:
            found |= {_LINK + program for program in sockets.missing(self._pinned.directory, cgroup)}
        return found

    def restore(self, cgroup: Path | None) -> None:
        """Pins again what is missing; the directory is there. Idempotent."""
        with loader.locked(self._pinned.directory):
            for name in self._gone():
                path = self._pinned.directory / name
                path.unlink(missing_ok=True)
                bpf.pin(next(descriptor for one, descriptor, _ in self._wanted() if one == name), path)
        if cgroup is not None:
            loader.attach_sockets(self._pinned, cgroup)

    def empty_slots(self) -> set[str]:
        """Names of programs that nobody reaches, as their slots are empty."""
        programs = self._pinned.maps["programs"]
        return {
            hook
            for hook, slot in (CONTINUATIONS | HOOKS).items()
            if hook in self._pinned.artifact.programs and bpf.lookup(programs, struct.pack("=I", slot), 4) is None
        }

    def fill_slots(self) -> None:
        """Loads what is missing and puts it there. Idempotent."""
        loader.swap(self._pinned, self._pinned.artifact)

    def _wanted(self) -> Iterator[tuple[str, int, int]]:
        """Name, descriptor and the kernel's number of everything that the agent holds open."""
        for name, descriptor in self._pinned.maps.items():
            yield name, descriptor, bpf.map_info(descriptor).id
        for hook, descriptor in self._pinned.dispatchers.items():
            yield _DISPATCHER + hook, descriptor, bpf.program_info(descriptor).id

    def _gone(self) -> Iterator[str]:
        for name, _, number in list(self._wanted()):
            if _number(self._pinned.directory / name, program=name.startswith(_DISPATCHER)) != number:
                yield name


def _number(path: Path, *, program: bool) -> int | None:
    """The kernel's number of what is pinned there, or None."""
    descriptor = bpf.get(path)
    if descriptor is None:
        return None
    try:
        return bpf.program_info(descriptor).id if program else bpf.map_info(descriptor).id
    finally:
        os.close(descriptor)
