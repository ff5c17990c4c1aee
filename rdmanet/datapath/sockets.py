"""The socket programs (bpf/socket.c) on the root cgroup: each held by a link that is pinned beside the maps.

A link outlives the agent as its pin does, and a program goes with its link: what is pinned is what is attached, so
nothing else records it. Nobody's sockets are touched but those of the namespaces in the map ``namespaces``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rdmanet.datapath import bpf
from rdmanet.datapath.artifact import SOCKET_PROGRAMS
from rdmanet.errors import BpfError, UnavailableError

#: The inode of the hierarchy's root (fs/kernfs/mount.c); a cgroup namespace shows another cgroup in its place.
ROOT_INODE = 1


def program_name(program: str, artifact_hash: str) -> str:
    """What it is called in the kernel, in 15 bytes: ``conn4_`` and the first 8 digits of its artifact's hash."""
    return f"{program[:4]}{program[-1]}_{artifact_hash[:8]}"


def program_ids(directory: Path) -> dict[str, int]:
    """Program → its number in the kernel, of those whose link is pinned below ``directory``."""
    found = {}
    for program in SOCKET_PROGRAMS:
        with _link(directory, program) as link:
            number = 0 if link is None else bpf.link_info(link).program_id
        if number:
            found[program] = number
    return found


def attached(directory: Path) -> dict[str, str]:
    """Program → its name in the kernel, of those."""
    found = {}
    for program, number in program_ids(directory).items():
        descriptor = bpf.program_by_id(number)
        if descriptor is not None:
            try:
                found[program] = bpf.program_info(descriptor).name
            finally:
                os.close(descriptor)
    return found


def root_cgroup(cgroup: Path) -> Path:
    """The same, if it is the root of the host's hierarchy. Raises UnavailableError otherwise."""
    try:
        number = cgroup.stat().st_ino
    except OSError as error:
        raise UnavailableError(
            f"The cgroup {cgroup} cannot be looked at: services work for no socket.",
            operation="stat",
            subject=str(cgroup),
            errno=error.errno,
        ) from error
    if number != ROOT_INODE:
        raise UnavailableError(
            f"{cgroup} is not the root of the host's cgroups: services work for no socket; run the agent in the host's"
            " cgroup namespace (podman and docker: --cgroupns host).",
            operation="stat",
            subject=str(cgroup),
        )
    return cgroup


def missing(directory: Path, cgroup: Path) -> list[str]:
    """Programs that are not attached to this cgroup."""
    wanted = root_cgroup(cgroup).stat().st_ino
    found = []
    for program in SOCKET_PROGRAMS:
        with _link(directory, program) as link:
            if link is None or bpf.link_info(link).cgroup_id != wanted:
                found.append(program)
    return found


def attach(directory: Path, cgroup: Path, programs: Mapping[str, int]) -> None:
    """Attaches programs (by name, their descriptors) to the root cgroup and pins their links; a link that is pinned
    already but leads elsewhere, or was detached by somebody, makes room.

    Raises UnavailableError where ``cgroup`` is not the hierarchy's root, or another program keeps all others away.
    """
    parent = os.open(root_cgroup(cgroup), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for program, descriptor in programs.items():
            path = _path(directory, program)
            path.unlink(missing_ok=True)
            link = _create(parent, descriptor, program)
            try:
                bpf.pin(link, path)
            finally:
                os.close(link)
    finally:
        os.close(parent)


def replace(directory: Path, programs: Mapping[str, int]) -> None:
    """Puts other programs in the place of those that are attached: in one step each, no socket meets none."""
    for program, descriptor in programs.items():
        with _link(directory, program) as link:
            if link is not None:
                bpf.update_link(link, descriptor)


def detach(directory: Path) -> None:
    """Takes the programs away from their cgroup and unpins the links: at once, where an unpinned link would only go
    after the kernel has got round to it. Open connections go on. Idempotent."""
    for program in SOCKET_PROGRAMS:
        with _link(directory, program) as link:
            if link is not None:
                bpf.detach_link(link)
        _path(directory, program).unlink(missing_ok=True)


def _path(directory: Path, program: str) -> Path:
    return directory / f"link_{program}"


@contextmanager
def _link(directory: Path, program: str) -> Iterator[int | None]:
    descriptor = bpf.get(_path(directory, program))
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _create(cgroup: int, program: int, name: str) -> int:
    try:
        return bpf.link_to_cgroup(cgroup, program, SOCKET_PROGRAMS[name])
    except BpfError as error:
        raise UnavailableError(
            f"The program {name} cannot be attached to the root cgroup, where another one may keep all others away"
            " (`bpftool cgroup tree` shows it): services work for no socket.",
            operation=error.operation,
            subject=name,
            errno=error.errno,
        ) from error
