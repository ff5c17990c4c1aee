"""Brings an artifact into the kernel: maps, programs, pins, the program array.

What is pinned outlives the agent. Every effect is either whole or absent (a map that is not pinned yet vanishes with
its descriptor), and opening again does just what is missing, so a crash at any point needs no other repair.

A map whose definition has changed is made anew (``rdmanet.datapath.migration``): filled, pinned as ``NAME~new``, used
by the new programs, and only then pinned as ``NAME``. After a crash in between the next start looks which of the two
the programs use, and finishes or takes back.
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

from rdmanet.datapath import bpf, migration, sockets
from rdmanet.datapath.artifact import (
    CONTINUATIONS,
    DEVICE_MAP,
    HOOKS,
    INSTRUCTION_BYTES,
    SOCKET_PROGRAMS,
    Artifact,
    Layout,
    MapDefinition,
)
from rdmanet.datapath.kept import NEXT, RUNNING, Kept, explained
from rdmanet.datapath.migration import Move
from rdmanet.errors import BpfError, StateError, UnavailableError

_PROGRAM_ARRAY, _NEW = "programs", "~new"
#: In such an order that who sees an answer is new before who lets flows begin: old ones do not look into new maps.
_ORDER = ("monitor", "parts", "uplink", "outside", "host", "pod", "nodeport")
_SLOTS = dict(sorted((CONTINUATIONS | HOOKS).items(), key=lambda place: _ORDER.index(place[0])))


@dataclass(slots=True)
class Pinned:
    """Descriptors of what is pinned below ``directory``; whoever holds this closes them. A map that is made anew keeps
    its descriptor's number, so that whoever reads or writes it goes on."""

    directory: Path
    artifact: Artifact
    maps: dict[str, int]
    dispatchers: dict[str, int]
    kept: Kept | None = None

    def close(self) -> None:
        """Gives the descriptors back; what is pinned stays. Idempotent."""
        for descriptors in (self.maps, self.dispatchers):
            while descriptors:
                os.close(descriptors.popitem()[1])


def open_pins(artifact: Artifact, directory: Path, kept: Kept | None = None) -> Pinned:
    """Loads and pins the artifact below ``directory``, adopting what is pinned there already.

    Maps keep their contents; those whose definition has changed are made anew with it, by the layouts of ``kept``.
    Programs that a slot already runs from this very artifact stay, others are swapped. Raises UnavailableError when
    ``directory`` is in no bpffs or eBPF is refused, StateError when a pinned map cannot be carried over.
    """
    _make_directory(directory)
    with ExitStack() as undo, locked(directory), explained(kept):
        pinned = Pinned(directory, artifact, {}, {}, kept)
        undo.callback(pinned.close)
        _finish(pinned)
        _bring(pinned, artifact)
        undo.pop_all()
        return pinned


def swap(pinned: Pinned, artifact: Artifact) -> None:
    """Puts another artifact's programs into the slots: all are loaded first, then one map update each.

    Maps that only the new artifact has are made, those whose definition differs are made anew; StateError is raised
    where that cannot be, VerifierError where a program is refused, and nothing has changed. The dispatchers stay.
    """
    with locked(pinned.directory), explained(pinned.kept):
        _finish(pinned)
        _bring(pinned, artifact)
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
def locked(directory: Path) -> Iterator[None]:
    """One loader at a time; the lock goes with its descriptor, so a crash leaves none."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bring(pinned: Pinned, artifact: Artifact) -> None:
    """What ``artifact`` wants: maps, dispatchers, programs in their slots."""
    with ExitStack() as stack:
        maps, moves = _open_maps(pinned, artifact, stack)
        if not pinned.dispatchers:
            for hook in HOOKS:
                pinned.dispatchers[hook] = _open_dispatcher(artifact, pinned.directory, hook, maps)
        programs = _load_programs(artifact, maps, pinned.directory, stack)
        bridge = migration.bridge(moves, maps)
        bridging = None if bridge is None else _load_programs(artifact, bridge, pinned.directory, stack)
        for move in moves:
            migration.fill(move)
            if move.name in migration.NEAR:
                migration.fill_near(maps, artifact.maps, move.name)
        if pinned.kept is not None:
            pinned.kept.begin(artifact)
        for move in moves:
            bpf.pin(move.new, pinned.directory / f"{move.name}{_NEW}")
        for move in moves:
            # What comes in from here on is missing until programs have been exchanged: there is no time to lose.
            migration.catch_up(move)
        if bridging is not None:
            bridging.put(maps[_PROGRAM_ARRAY], pinned.directory)
            migration.wait_for_programs()
            migration.catch_up(next(move for move in moves if move.name == migration.FLOWS))
        programs.put(maps[_PROGRAM_ARRAY], pinned.directory)
        # Before what is left is carried over, so that nothing is written to the old ones after that. Those that were
        # open keep their numbers.
        for name, descriptor in maps.items():
            if name in pinned.maps:
                if any(move.name == name for move in moves):
                    os.dup2(descriptor, pinned.maps[name], inheritable=False)
            else:
                pinned.maps[name] = os.dup(descriptor)
        _settle(pinned, moves)
        for name in pinned.maps.keys() - maps.keys():
            os.close(pinned.maps.pop(name))
        _unpin_others(pinned, artifact)


def _settle(pinned: Pinned, moves: list[Move]) -> None:
    """The new programs run: carries over what the old ones wrote last and makes the new pins the only ones."""
    if moves:
        migration.wait_for_programs()
        for move in moves:
            migration.catch_up(move)
        for move in moves:
            (pinned.directory / f"{move.name}{_NEW}").rename(pinned.directory / move.name)
    if pinned.kept is not None:
        pinned.kept.commit()


def _finish(pinned: Pinned) -> None:
    """Goes on where a process that was killed had stopped: maps that programs use already take their places, others
    are forgotten."""
    directory, kept = pinned.directory, pinned.kept
    halves = [path for path in directory.iterdir() if path.name.endswith(_NEW)]
    if not halves:
        if kept is not None:
            following = kept.load(NEXT)
            if following is not None and _runs(directory, following):
                kept.commit()
            kept.take_back()
        return
    with ExitStack() as stack:
        descriptors = {path.name.removesuffix(_NEW): _get(path, stack) for path in halves}
        used = maps_in_use(directory)
        if not used & {bpf.map_info(descriptor).id for descriptor in descriptors.values()}:
            for path in halves:
                path.unlink(missing_ok=True)
            if kept is not None:
                kept.take_back()
            return
        following = None if kept is None else kept.load(NEXT)
        if following is None:
            raise StateError(
                f"A swap was interrupted and the datapath that it put in place is not known; what is pinned in "
                f"{directory} cannot be finished: remove the pods, run `rdmanet uninstall` and start the agent again.",
                operation="swap",
                subject=str(directory),
            )
        running = None if kept is None else kept.load(RUNNING)
        maps, moves = {}, []
        for name, definition in following.maps.items():
            if name == DEVICE_MAP:
                continue
            if name in descriptors:
                maps[name] = descriptors[name]
                old = _get(directory / name, stack)
                moves.append(_move(name, old, maps[name], definition, following, running))
            else:
                maps[name] = _get(directory / name, stack)
        _load_programs(following, maps, directory, stack, again=True).put(maps[_PROGRAM_ARRAY], directory)
        _settle(pinned, moves)


def _get(path: Path, stack: ExitStack) -> int:
    descriptor = bpf.get(path)
    if descriptor is None:
        raise StateError(
            f"The pin {path} is gone: something else removed it.", operation="BPF_OBJ_GET", subject=str(path)
        )
    stack.callback(os.close, descriptor)
    return descriptor


def _open_maps(pinned: Pinned, artifact: Artifact, stack: ExitStack) -> tuple[dict[str, int], list[Move]]:
    """The artifact's maps, and which of them are made anew; the descriptors are the stack's. All are looked at before
    the first is made."""
    maps: dict[str, int] = {}
    moved: list[tuple[str, int, Layout]] = []
    running = _running_artifact(pinned.directory, pinned.kept)
    wanted = {name: definition for name, definition in artifact.maps.items() if name != DEVICE_MAP}
    for name, definition in wanted.items():
        descriptor = bpf.get(pinned.directory / name)
        if descriptor is None:
            continue
        stack.callback(os.close, descriptor)
        found = _definition(descriptor)
        known = None if running is None or running.maps.get(name) != found else running.layouts[name]
        if found == definition and known in (None, artifact.layouts[name]):
            maps[name] = descriptor
            continue
        layout = _movable(name, found, known, definition, artifact, pinned.directory / name)
        moved.append((name, descriptor, layout))
    for name, definition in wanted.items():
        if name not in maps and all(name != one for one, _, _ in moved):
            maps[name] = create_map(definition)
            stack.callback(os.close, maps[name])
            bpf.pin(maps[name], pinned.directory / name)
    moves = []
    for name, old, layout in moved:
        maps[name] = create_map(wanted[name])
        stack.callback(os.close, maps[name])
        moves.append(Move(name, old, maps[name], _definition(old), wanted[name], layout, artifact.layouts[name]))
    return maps, moves


def _move(
    name: str, old: int, new: int, definition: MapDefinition, artifact: Artifact, running: Artifact | None
) -> Move:
    """A move that was begun before: nothing is known of what was copied."""
    found = _definition(old)
    known = None if running is None or running.maps.get(name) != found else running.layouts[name]
    layout = migration.old_layout(name, found, known, artifact.layouts[name]) or artifact.layouts[name]
    return Move(name, old, new, found, definition, layout, artifact.layouts[name], resumed=True)


def _movable(
    name: str, found: MapDefinition, known: Layout | None, definition: MapDefinition, artifact: Artifact, path: Path
) -> Layout:
    """The layout of a pinned map that is to become another. Raises StateError where it cannot be carried over."""
    same = (found.key_size, found.value_size) == (definition.key_size, definition.value_size)
    layout = migration.old_layout(name, found, known, artifact.layouts[name])
    if layout is None and (same or name in migration.NEAR):
        layout = artifact.layouts[name]
    if layout is not None and found.name == name and name != _PROGRAM_ARRAY and found.type == definition.type:
        return layout
    differences = ", ".join(
        f"{field} {getattr(found, field)} instead of {getattr(definition, field)}"
        for field in ("name", "type", "key_size", "value_size", "max_entries", "flags")
        if getattr(found, field) != getattr(definition, field)
    )
    raise StateError(
        f"The pinned map {path} has another layout than this version's ({differences}), and cannot be carried over; "
        "remove the pods, run `rdmanet uninstall` and start the agent again.",
        subject=str(path),
    )


def _definition(descriptor: int) -> MapDefinition:
    info = bpf.map_info(descriptor)
    return MapDefinition(info.name, info.type, info.key_size, info.value_size, info.max_entries, info.flags)


def _running_artifact(directory: Path, kept: Kept | None) -> Artifact | None:
    """The kept artifact of which the pod program is, where that is kept."""
    if kept is None:
        return None
    with ExitStack() as stack:
        programs = bpf.get(directory / _PROGRAM_ARRAY)
        if programs is None:
            return None
        stack.callback(os.close, programs)
        name = _running(programs, HOOKS["pod"])
    return None if name is None else kept.find(name.partition("_")[2])


def _runs(directory: Path, artifact: Artifact) -> bool:
    """Whether every slot has the artifact's program."""
    with ExitStack() as stack:
        programs = _get(directory / _PROGRAM_ARRAY, stack)
        return all(
            _running(programs, slot) == _slot_name(artifact, hook)
            for hook, slot in _SLOTS.items()
            if hook in artifact.programs
        )


def maps_in_use(directory: Path) -> set[int]:
    """Kernel ids of the maps of all programs that packets or sockets reach."""
    used: set[int] = set()
    with ExitStack() as stack:
        numbers = list(sockets.program_ids(directory).values())
        programs = bpf.get(directory / _PROGRAM_ARRAY)
        if programs is not None:
            stack.callback(os.close, programs)
            for slot in _SLOTS.values():
                raw = bpf.lookup(programs, struct.pack("=I", slot), 4)
                numbers += [] if raw is None else [struct.unpack("=I", raw)[0]]
        for number in numbers:
            descriptor = bpf.program_by_id(number)
            if descriptor is not None:
                stack.callback(os.close, descriptor)
                used |= bpf.maps_of_program(descriptor)
    return used


def _unpin_others(pinned: Pinned, artifact: Artifact) -> None:
    """Maps that no program uses any more: those of a version that had other ones."""
    for path in pinned.directory.iterdir():
        if path.name not in artifact.maps and not path.name.startswith(("dispatch_", "link_")):
            path.unlink(missing_ok=True)


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


@dataclass(slots=True)
class _Loaded:
    """Programs that are loaded and not in their places yet."""

    slots: list[tuple[int, int | None]]  # None: the slot is emptied
    sockets: dict[str, int]

    def put(self, program_array: int, directory: Path) -> None:
        for slot, descriptor in self.slots:
            key = struct.pack("=I", slot)
            if descriptor is None:
                bpf.delete(program_array, key)
            else:
                bpf.update(program_array, key, struct.pack("=I", descriptor))
        sockets.replace(directory, self.sockets)


def _load_programs(
    artifact: Artifact, maps: Mapping[str, int], directory: Path, stack: ExitStack, *, again: bool = False
) -> _Loaded:
    """Loads what does not run yet, or everything ``again``."""
    loaded = _Loaded([], {})
    found = {hook: _running(maps[_PROGRAM_ARRAY], slot) for hook, slot in _SLOTS.items()}
    # Empty ones come first, which others go on in; who goes on in another version's is replaced before it is emptied.
    for hook, slot in sorted(_SLOTS.items(), key=lambda place: found[place[0]] is not None):
        if hook in artifact.programs:
            name = _slot_name(artifact, hook)
            if again or found[hook] != name:
                descriptor = load(artifact, hook, name, maps)
                stack.callback(os.close, descriptor)
                loaded.slots.append((slot, descriptor))
    for hook, slot in CONTINUATIONS.items():
        if hook not in artifact.programs and _running(maps[_PROGRAM_ARRAY], slot) is not None:
            loaded.slots.append((slot, None))
    for program, name in sockets.attached(directory).items():
        if program in artifact.programs and name != sockets.program_name(program, artifact.hash):
            loaded.sockets[program] = _load_socket_program(artifact, program, maps)
            stack.callback(os.close, loaded.sockets[program])
    return loaded


def attach_sockets(pinned: Pinned, cgroup: Path) -> None:
    """Attaches the socket programs to the root cgroup, as ``sockets.attach`` does; those that are stay. Idempotent."""
    with locked(pinned.directory), explained(pinned.kept), ExitStack() as loaded:
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
    """Hook → name of the program in its slot, if any: ``HOOK_HASH``, the first 8 digits of its artifact's hash."""
    found = {hook: _running(pinned.maps[_PROGRAM_ARRAY], slot) for hook, slot in HOOKS.items()}
    return {hook: name for hook, name in found.items() if name is not None}
