"""The device programs of pods' cgroups (bpf/device.c): each loaded with a map of its own, found again by its name.

A program that is attached stays when the agent goes, and goes with its cgroup. Nothing of it is pinned: the kernel says
what is attached to a cgroup, and the program's name says for which numbers it was loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rdmanet.datapath import bpf, layout, loader, programs
from rdmanet.datapath.artifact import DEVICE_MAP, DEVICE_PROGRAM, Artifact
from rdmanet.errors import BpfError, KernelError, NotFoundError

#: (major, minor) of a character device.
Number = tuple[int, int]

_OURS = re.compile(r"rdmanet_[0-9a-f]{7}")


def restrict(pinned: loader.Pinned, cgroup: Path, numbers: Collection[Number]) -> None:
    """Lets the cgroup, and those below it, open no other RDMA devices than these. Idempotent: an equal program stays,
    one for other numbers is replaced without a gap.

    Raises NotFoundError where the cgroup is gone, BpfError where the kernel refuses (EPERM: a program above it was
    attached so that none may follow).
    """
    name = program_name(pinned.artifact, numbers)
    with _opened(cgroup) as descriptor, ExitStack() as stack:
        ours = _attached(descriptor, stack)
        if name not in ours:
            program = _load(pinned, name, numbers)
            stack.callback(os.close, program)
            replaced = ours.popitem()[1] if ours else None
            bpf.attach_to_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE, replaced)
        for other, program in ours.items():
            if other != name:
                bpf.detach_from_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE)


def release(cgroup: Path) -> None:
    """Takes our programs away from the cgroup. Idempotent; a cgroup that is gone has none."""
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_opened(cgroup))
            ours = _attached(descriptor, stack)
        except NotFoundError:
            return
        for program in ours.values():
            bpf.detach_from_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE)


def restricted(cgroup: Path) -> set[str]:
    """Names of our programs on the cgroup; what ``program_name`` gives."""
    with ExitStack() as stack:
        return set(_attached(stack.enter_context(_opened(cgroup)), stack))


def program_name(artifact: Artifact, numbers: Collection[Number]) -> str:
    """What the program for these numbers is called in the kernel: it tells artifact and numbers, in 15 bytes."""
    words = f"{artifact.hash} {sorted(set(numbers))}"
    return f"rdmanet_{hashlib.sha256(words.encode()).hexdigest()[:7]}"


def _load(pinned: loader.Pinned, name: str, numbers: Collection[Number]) -> int:
    """The loaded program holds its map; our descriptor of the map is not needed any more."""
    own = loader.create_map(pinned.artifact.maps[DEVICE_MAP])
    try:
        for number in numbers:
            bpf.update(own, layout.DEVICE_NUMBER.pack(*number), layout.U32.pack(1))
        maps = {**pinned.maps, DEVICE_MAP: own}
        return programs.load(pinned.artifact, DEVICE_PROGRAM, name, maps, bpf.PROG_TYPE_CGROUP_DEVICE)
    finally:
        os.close(own)


def _attached(cgroup: int, stack: ExitStack) -> dict[str, int]:
    """Our programs' descriptors by name, open as long as the stack. Raises NotFoundError where the cgroup has gone
    since it was opened (kernel/cgroup/cgroup.c, cgroup_get_from_fd)."""
    found = {}
    try:
        numbers = bpf.programs_of_cgroup(cgroup, bpf.ATTACH_CGROUP_DEVICE)
    except BpfError as error:
        if error.errno == errno.ENOENT:
            raise NotFoundError("The cgroup is gone.", operation=error.operation, errno=error.errno) from error
        raise
    for number in numbers:
        program = bpf.program_by_id(number)
        if program is None:
            continue  # detached since
        stack.callback(os.close, program)
        name = bpf.program_info(program).name
        if _OURS.fullmatch(name):
            found[name] = program
    return found


@contextmanager
def _opened(cgroup: Path) -> Iterator[int]:
    try:
        descriptor = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"The cgroup {cgroup} is gone.", operation="open", subject=str(cgroup), errno=error.errno
        ) from error
    except OSError as error:
        raise KernelError(
            f"The cgroup {cgroup} cannot be opened.", operation="open", subject=str(cgroup), errno=error.errno
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
