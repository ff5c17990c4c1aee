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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rdmanet.datapath import bpf, migration, near, programs, sockets
from rdmanet.datapath.artifact import DEVICE_MAP, HOOKS, Artifact, Layout, MapDefinition
from rdmanet.datapath.kept import NEXT, RUNNING, Kept, explained
from rdmanet.datapath.migration import Move
from rdmanet.errors import BpfError, StateError, UnavailableError

_NEW = "~new"


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
        exchange = _Exchange.load(artifact, maps, moves, pinned.directory, stack)
        for move in moves:
            exchange.fill(move)
            if move.name in near.HASHES:
                migration.fill_near(maps, artifact.maps, move.name)
        if pinned.kept is not None:
            pinned.kept.begin(artifact)
        for move in moves:
            bpf.pin(move.new, pinned.directory / f"{move.name}{_NEW}")
        exchange.put()
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


@dataclass(slots=True)
class _Exchange:
    """Programs that take the places of those that run. Where the table of flows is made anew there are two sets:
    the ``bridging`` ones look into the old table for what the new one lacks, and come first."""

    directory: Path
    array: int
    moves: list[Move]
    loaded: programs.Loaded
    bridging: programs.Loaded | None

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        maps: Mapping[str, int],
        moves: list[Move],
        directory: Path,
        stack: ExitStack,
        *,
        again: bool = False,
    ) -> _Exchange:
        """Nothing that runs changes; the descriptors are the stack's."""
        bridge = migration.bridge(moves, maps)
        bridging = None if bridge is None else programs.load_all(artifact, bridge, directory, stack, again=True)
        # All of those that are bridged are replaced again.
        loaded = programs.load_all(artifact, maps, directory, stack, again=again or bridging is not None)
        return cls(directory, maps[programs.ARRAY], moves, loaded, bridging)

    def fill(self, move: Move) -> None:
        """Before. The table of flows stays empty until nobody changes the old one: a copy of a flow whose ends begin
        anew meanwhile would hide what the old table says of them."""
        if self._is_bridged(move):
            migration.require_room(move)
        else:
            migration.fill(move)

    def put(self) -> None:
        """Into the places."""
        for move in self.moves:
            # What comes in from here on is missing until programs have been exchanged: there is no time to lose.
            if not self._is_bridged(move):
                migration.catch_up(move)
        if self.bridging is not None:
            self.bridging.put(self.array, self.directory)
            migration.wait_for_programs()
            for move in filter(self._is_bridged, self.moves):
                migration.fill_rest(move)
        self.loaded.put(self.array, self.directory)

    def _is_bridged(self, move: Move) -> bool:
        return self.bridging is not None and move.name == migration.FLOWS


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
        used = programs.maps_in_use(directory)
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
        _Exchange.load(following, maps, moves, directory, stack, again=True).put()
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
    if layout is None and (same or name in near.HASHES):
        layout = artifact.layouts[name]
    if layout is not None and found.name == name and name != programs.ARRAY and found.type == definition.type:
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
        array = bpf.get(directory / programs.ARRAY)
        if array is None:
            return None
        stack.callback(os.close, array)
        name = programs.running(array, "pod")
    return None if name is None else kept.find(name.partition("_")[2])


def _runs(directory: Path, artifact: Artifact) -> bool:
    """Whether every slot has the artifact's program."""
    with ExitStack() as stack:
        return programs.run_all(_get(directory / programs.ARRAY, stack), artifact)


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
        descriptor = programs.load(artifact, name, name, maps)
        try:
            bpf.pin(descriptor, directory / name)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def attach_sockets(pinned: Pinned, cgroup: Path) -> None:
    """Attaches the socket programs to the root cgroup, as ``sockets.attach`` does; those that are stay. Idempotent."""
    with locked(pinned.directory), explained(pinned.kept), ExitStack() as stack:
        loaded = {}
        for program in sockets.missing(pinned.directory, cgroup):
            loaded[program] = programs.load_socket_program(pinned.artifact, program, pinned.maps)
            stack.callback(os.close, loaded[program])
        sockets.attach(pinned.directory, cgroup, loaded)


def running(pinned: Pinned) -> dict[str, str]:
    """Hook → name of the program in its slot, if any: ``HOOK_HASH``, the first 8 digits of its artifact's hash."""
    found = {hook: programs.running(pinned.maps[programs.ARRAY], hook) for hook in HOOKS}
    return {hook: name for hook, name in found.items() if name is not None}
