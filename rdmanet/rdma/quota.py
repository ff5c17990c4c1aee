"""Hard limits on verbs objects: the kernel's RDMA cgroup controller (Documentation/admin-guide/cgroup-v2.rst, "RDMA").

``rdma.max`` has a line ``NAME hca_handle=H hca_object=O`` for each device: open contexts, and objects of all kinds. A
pod that wants more gets EAGAIN from the verb; ``rdma.events`` (Linux 7.1 and later) counts that.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rdmanet.errors import KernelError, UnavailableError

RESOURCES = ("hca_handle", "hca_object")
CONTROLLER = "rdma"
#: In ``rdma.max``: not limited.
UNLIMITED = "max"


@dataclass(frozen=True, slots=True)
class Quota:
    """What one pod may have of a device at a time; 0 is not limited."""

    max_handles: int = 0
    max_objects: int = 0

    def __bool__(self) -> bool:
        return bool(self.max_handles or self.max_objects)

    def line(self, device: str, before: Mapping[str, str]) -> str:
        """What to write to rdma.max. A limit that was there before and is lower stays (a runtime's own)."""
        wanted = {"hca_handle": self.max_handles, "hca_object": self.max_objects}
        return line(device, {name: _lower(before.get(name, UNLIMITED), wanted[name]) for name in RESOURCES})


def line(device: str, values: Mapping[str, str]) -> str:
    """One device's line of rdma.max."""
    return " ".join([device, *(f"{name}={values.get(name, UNLIMITED)}" for name in RESOURCES)])


def _lower(before: str, wanted: int) -> str:
    if not wanted:
        return before
    return str(wanted if before == UNLIMITED else min(wanted, int(before)))


def parse(text: str) -> dict[str, dict[str, str]]:
    """Device → its values, of any of the controller's files."""
    found = {}
    for row in text.splitlines():
        name, *words = row.split()
        found[name] = dict(word.split("=", 1) for word in words if "=" in word)
    return found


def refused(events: str) -> dict[tuple[str, str], int]:
    """(device, resource) → how often a process was refused one more, from the text of rdma.events."""
    return {
        (device, name): int(values[f"{name}.alloc_fail"])
        for device, values in parse(events).items()
        for name in RESOURCES
        if f"{name}.alloc_fail" in values
    }


def read(cgroup: Path, file: str) -> str | None:
    """One of the controller's files; None where the cgroup, the controller or this kernel's file is not there."""
    try:
        return (cgroup / file).read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENODEV:  # the cgroup is being removed
            return None
        raise KernelError(
            f"{cgroup / file} cannot be read.", operation="read", subject=str(cgroup / file), errno=error.errno
        ) from error


def limits_of(cgroup: Path, device: str) -> dict[str, str]:
    """What rdma.max says of a device now, as text; empty where it says nothing."""
    return parse(read(cgroup, "rdma.max") or "").get(device, {})


def write_limits(cgroup: Path, text: str) -> None:
    """Writes a line to rdma.max. Idempotent. Raises UnavailableError where the controller is not enabled."""
    path = cgroup / "rdma.max"
    if not path.exists():
        raise UnavailableError(
            f"The cgroup {cgroup} has no RDMA controller, so that verbs objects are not limited; let the agent enable"
            " it (rdma.cgroup_controller = true).",
            operation="rdma.max",
            subject=str(cgroup),
        )
    _write(path, text, "the RDMA controller does not know the device, or its name is not unique on the host")


def restore_limits(cgroup: Path, device: str, before: Mapping[str, str]) -> None:
    """Writes back what was there. Idempotent: nothing is done without the cgroup, the controller or the device."""
    if not limits_of(cgroup, device):
        return
    try:
        write_limits(cgroup, line(device, before))
    except (KernelError, UnavailableError):
        if limits_of(cgroup, device):  # else one of them went just now
            raise


def above(path: str) -> Iterator[str]:
    """The cgroups that must hand the controller down for one at ``path`` to have it: the root first."""
    return (str(parent) for parent in reversed(PurePosixPath(path).parents))


def enable(root: Path, path: str, record: Callable[[str], None]) -> None:
    """Hands the controller down to the cgroup at ``path``; ``record`` is told each cgroup above it before it is
    changed. Raises UnavailableError where the hierarchy does not have the controller, KernelError where the kernel
    refuses (EBUSY: processes are in a cgroup above the pod's)."""
    if CONTROLLER not in _words(root / "cgroup.controllers"):
        raise UnavailableError(
            "The cgroup2 hierarchy of this host has no RDMA controller, so that verbs objects are not limited; the"
            " kernel needs CONFIG_CGROUP_RDMA, and no version 1 hierarchy may hold it.",
            operation="cgroup.controllers",
            subject=str(root),
        )
    for parent in above(path):
        file = root / parent.removeprefix("/") / "cgroup.subtree_control"
        if CONTROLLER not in _words(file):
            record(parent)
            _write(file, f"+{CONTROLLER}", "processes are in that cgroup itself, and not in those below it alone")


def disable(root: Path, path: str) -> bool:
    """Takes the controller back from what is below ``path``; False while others below use it. Idempotent."""
    file = root / path.removeprefix("/") / "cgroup.subtree_control"
    try:
        file.write_text(f"-{CONTROLLER}", encoding="ascii")
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise KernelError(
            f"The RDMA controller cannot be taken back from {file}.",
            operation="write",
            subject=str(file),
            errno=error.errno,
        ) from error
    return True


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError as error:
        raise KernelError(f"{path} cannot be read.", operation="read", subject=str(path), errno=error.errno) from error


def _write(path: Path, text: str, why: str) -> None:
    try:
        path.write_text(text, encoding="ascii")
    except OSError as error:
        raise KernelError(
            f"The kernel did not take `{text}` in {path}: {why}.",
            operation="write",
            subject=str(path),
            errno=error.errno,
        ) from error
