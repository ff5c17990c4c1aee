"""Brings an artifact into the kernel: maps, programs, pins, the program array.

What is pinned outlives the agent. Every effect is either whole or absent (a map that is not pinned yet vanishes with
its descriptor), and opening again does just what is missing, so a crash at any point needs no other repair.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rdmanet.datapath import bpf, sockets
from rdmanet.datapath.artifact import (
    CONTINUATIONS,
    DEVICE_MAP,
    HOOKS,
    INSTRUCTION_BYTES,
    SOCKET_PROGRAMS,
    Artifact,
    MapDefinition,
)
from rdmanet.errors import BpfError, NotFoundError, StateError, UnavailableError

_PROGRAM_ARRAY = "programs"


@dataclass(slots=True)
class Pinned:
    """Descriptors of what is pinned below ``directory``; whoever holds this closes them."""

    directory: Path
    artifact: Artifact
    maps: dict[str, int]
    dispatchers: dict[str, int]

    def close(self) -> None:
        """Gives the descriptors back; what is pinned stays. Idempotent."""
        for descriptors in (self.maps, self.dispatchers):
            while descriptors:
                os.close(descriptors.popitem()[1])


def open_pins(artifact: Artifact, directory: Path) -> Pinned:
    """Loads and pins the artifact below ``directory``, adopting what is pinned there already.

    Maps keep their contents, after their layout was checked; programs that a slot already runs from this very artifact
    stay, others are swapped. Raises UnavailableError when ``directory`` is in no bpffs or eBPF is refused, StateError
    when a pinned map has another layout.
    """
    _make_directory(directory)
    with ExitStack() as undo, _locked(directory):
        pinned = Pinned(directory, artifact, {}, {})
        undo.callback(pinned.close)
        _open_maps(pinned, artifact)
        for hook in HOOKS:
            pinned.dispatchers[hook] = _open_dispatcher(artifact, directory, hook, pinned.maps)
        _fill_slots(artifact, pinned.maps, pinned.directory)
        undo.pop_all()
        return pinned


def swap(pinned: Pinned, artifact: Artifact) -> None:
    """Puts another artifact's programs into the slots: all are loaded first, then one map update each.

    Maps that only the new artifact has are made; the others must have the layout that is pinned, or StateError is
    raised and nothing has changed. The dispatchers stay.
    """
    with _locked(pinned.directory):
        _open_maps(pinned, artifact)
        _fill_slots(artifact, pinned.maps, pinned.directory)
        pinned.artifact = artifact


def remove(directory: Path) -> None:
    """Unpins everything below ``directory`` and removes it. Idempotent.

    The caller has removed the filters before: an attached dispatcher of a pod drops everything from here on.
    """
    try:
        names = sorted(directory.iterdir())
    except FileNotFoundError:
        return
    if not bpf.is_bpffs(directory):
        raise UnavailableError(f"{directory} is not in a bpffs; nothing was removed there.", subject=str(directory))
    sockets.detach(directory)
    for path in names:
        path.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except FileNotFoundError:
        return


def _make_directory(directory: Path) -> None:
    try:
        if not bpf.is_bpffs(directory if directory.exists() else directory.parent):
            raise UnavailableError(
                f"{directory} is not in a bpffs, where programs and maps are pinned; "
                "mount one with `mount -t bpf bpf /sys/fs/bpf`.",
                operation="statfs",
                subject=str(directory),
            )
        directory.mkdir(mode=0o700, exist_ok=True)
    except (OSError, BpfError) as error:
        raise UnavailableError(
            f"The directory for pins, {directory}, cannot be made; "
            "is a bpffs mounted there (`mount -t bpf bpf /sys/fs/bpf`)?",
            operation="mkdir",
            subject=str(directory),
            errno=error.errno,
        ) from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One loader at a time; the lock goes with its descriptor, so a crash leaves none."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_maps(pinned: Pinned, artifact: Artifact) -> None:
    """Opens the artifact's maps; checks all layouts before it makes the first that is missing."""
    opened: dict[str, int] = {}
    with ExitStack() as undo:
        wanted = {name: definition for name, definition in artifact.maps.items() if name != DEVICE_MAP}
        for name, definition in wanted.items():
            if name in pinned.maps:
                _check_layout(pinned.maps[name], definition, pinned.directory / name)
                continue
            descriptor = bpf.get(pinned.directory / name)
            if descriptor is not None:
                undo.callback(os.close, descriptor)
                _check_layout(descriptor, definition, pinned.directory / name)
                opened[name] = descriptor
        for name, definition in wanted.items():
            if name not in pinned.maps and name not in opened:
                descriptor = create_map(definition)
                undo.callback(os.close, descriptor)
                bpf.pin(descriptor, pinned.directory / name)
                opened[name] = descriptor
        undo.pop_all()
    pinned.maps.update(opened)


def create_map(definition: MapDefinition) -> int:
    """A new map's descriptor. Raises UnavailableError where eBPF is refused."""
    try:
        return bpf.create_map(
            definition.name,
            definition.type,
            definition.key_size,
            definition.value_size,
            definition.max_entries,
            definition.flags,
        )
    except BpfError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise UnavailableError(
                error.sentence, operation=error.operation, subject=error.subject, errno=error.errno
            ) from error
        raise


def _check_layout(descriptor: int, definition: MapDefinition, path: Path) -> None:
    info = bpf.map_info(descriptor)
    found = MapDefinition(info.name, info.type, info.key_size, info.value_size, info.max_entries, info.flags)
    if found == definition:
        return
    differences = ", ".join(
        f"{field} {getattr(found, field)} instead of {getattr(definition, field)}"
        for field in ("name", "type", "key_size", "value_size", "max_entries", "flags")
        if getattr(found, field) != getattr(definition, field)
    )
    raise StateError(
        f"The pinned map {path} has another layout than this version's ({differences}); "
        "remove the pods, run `rdmanet uninstall` and start the agent again.",
        subject=str(path),
    )


def _open_dispatcher(artifact: Artifact, directory: Path, hook: str, maps: dict[str, int]) -> int:
    name = f"dispatch_{hook}"
    descriptor = bpf.get(directory / name)
    if descriptor is None:
        descriptor = load(artifact, name, name, maps)
        try:
            bpf.pin(descriptor, directory / name)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _fill_slots(artifact: Artifact, maps: dict[str, int], directory: Path) -> None:
    """Loads what no slot runs yet, all before the first slot changes."""
    with ExitStack() as loaded:
        updates = []
        # Those that others go on in come first.
        for hook, slot in (CONTINUATIONS | HOOKS).items():
            if hook not in artifact.programs:
                continue
            name = _slot_name(artifact, hook)
            if _running(maps[_PROGRAM_ARRAY], slot) != name:
                descriptor = load(artifact, hook, name, maps)
                loaded.callback(os.close, descriptor)
                updates.append((slot, descriptor))
        replaced = {}
        for program, name in sockets.attached(directory).items():
            if name != sockets.program_name(program, artifact.hash):
                replaced[program] = _load_socket_program(artifact, program, maps)
                loaded.callback(os.close, replaced[program])
        for slot, descriptor in updates:
            bpf.update(maps[_PROGRAM_ARRAY], struct.pack("=I", slot), struct.pack("=I", descriptor))
        sockets.replace(directory, replaced)


def attach_sockets(pinned: Pinned, cgroup: Path) -> None:
    """Attaches the socket programs to the root cgroup, as ``sockets.attach`` does; those that are stay. Idempotent."""
    with _locked(pinned.directory), ExitStack() as loaded:
        programs = {}
        for program in sockets.missing(pinned.directory, cgroup):
            programs[program] = _load_socket_program(pinned.artifact, program, pinned.maps)
            loaded.callback(os.close, programs[program])
        sockets.attach(pinned.directory, cgroup, programs)


def _load_socket_program(artifact: Artifact, program: str, maps: Mapping[str, int]) -> int:
    name = sockets.program_name(program, artifact.hash)
    return load(artifact, program, name, maps, bpf.PROG_TYPE_CGROUP_SOCK_ADDR, SOCKET_PROGRAMS[program])


def _slot_name(artifact: Artifact, hook: str) -> str:
    """The program's name in the kernel tells which artifact it came from; names have 15 bytes (BPF_OBJ_NAME_LEN)."""
    return f"{hook}_{artifact.hash[:8]}"[:15]


def _running(program_array: int, slot: int) -> str | None:
    """The name of the program in a slot, or None."""
    raw = bpf.lookup(program_array, struct.pack("=I", slot), 4)
    if raw is None:
        return None
    descriptor = bpf.program_by_id(struct.unpack("=I", raw)[0])
    if descriptor is None:
        return None
    try:
        return bpf.program_info(descriptor).name
    finally:
        os.close(descriptor)


def load(
    artifact: Artifact,
    program_name: str,
    name: str,
    maps: Mapping[str, int],
    type_: int = bpf.PROG_TYPE_SCHED_CLS,
    expected_attach_type: int = 0,
) -> int:
    """Patches map descriptors into the first half of 64-bit loads and loads the program."""
    program = artifact.programs[program_name]
    code = bytearray(program.instructions)
    for relocation in program.relocations:
        struct.pack_into("=i", code, relocation.instruction * INSTRUCTION_BYTES + 4, maps[relocation.map])
    return bpf.load_program(name, bytes(code), artifact.license, type_, expected_attach_type)


def running(pinned: Pinned) -> dict[str, str]:
    """Hook → name of the program in its slot (``HOOK_HASH``: the first 8 digits of its artifact's hash).

    Raises NotFoundError for an empty slot.
    """
    names = {}
    for hook, slot in HOOKS.items():
        name = _running(pinned.maps[_PROGRAM_ARRAY], slot)
        if name is None:
            raise NotFoundError(f"The slot for the {hook} program is empty; start the agent to fill it.", subject=hook)
        names[hook] = name
    return names
