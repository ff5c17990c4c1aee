"""An artifact's programs: loaded against maps, put into the slots of the pinned array, and which ones are there."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rdmanet.datapath import bpf, sockets
from rdmanet.datapath.artifact import CONTINUATIONS, HOOKS, INSTRUCTION_BYTES, SOCKET_PROGRAMS, Artifact

#: The map with the slots.
ARRAY = "programs"
#: In such an order that who sees an answer is new before who lets flows begin: old ones do not look into new maps.
_ORDER = ("monitor", "parts", "collect", "uplink", "outside", "host", "pod", "nodeport")
_SLOTS = dict(sorted((CONTINUATIONS | HOOKS).items(), key=lambda place: _ORDER.index(place[0])))


@dataclass(slots=True)
class Loaded:
    """Programs that are loaded and not in their places yet."""

    slots: list[tuple[int, int | None]]  # None: the slot is emptied
    sockets: dict[str, int]

    def put(self, array: int, directory: Path) -> None:
        """Into their places, one after the other."""
        for slot, descriptor in self.slots:
            key = struct.pack("=I", slot)
            if descriptor is None:
                bpf.delete(array, key)
            else:
                bpf.update(array, key, struct.pack("=I", descriptor))
        sockets.replace(directory, self.sockets)


def load_all(
    artifact: Artifact, maps: Mapping[str, int], directory: Path, stack: ExitStack, *, again: bool = False
) -> Loaded:
    """Loads what does not run yet, or everything ``again``; the descriptors are the stack's."""
    loaded = Loaded([], {})
    found = {hook: running(maps[ARRAY], hook) for hook in _SLOTS}
    # Empty ones come first, which others go on in; who goes on in another version's is replaced before it is emptied.
    for hook, slot in sorted(_SLOTS.items(), key=lambda place: found[place[0]] is not None):
        if hook in artifact.programs:
            name = _slot_name(artifact, hook)
            if again or found[hook] != name:
                descriptor = load(artifact, hook, name, maps)
                stack.callback(os.close, descriptor)
                loaded.slots.append((slot, descriptor))
    for hook, slot in CONTINUATIONS.items():
        if hook not in artifact.programs and found[hook] is not None:
            loaded.slots.append((slot, None))
    for program, name in sockets.attached(directory).items():
        if program in artifact.programs and name != sockets.program_name(program, artifact.hash):
            loaded.sockets[program] = load_socket_program(artifact, program, maps)
            stack.callback(os.close, loaded.sockets[program])
    return loaded


def load_socket_program(artifact: Artifact, program: str, maps: Mapping[str, int]) -> int:
    """A descriptor of one for the root cgroup."""
    name = sockets.program_name(program, artifact.hash)
    return load(artifact, program, name, maps, bpf.PROG_TYPE_CGROUP_SOCK_ADDR, SOCKET_PROGRAMS[program])


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


def _slot_name(artifact: Artifact, hook: str) -> str:
    """The program's name in the kernel tells which artifact it came from; names have 15 bytes (BPF_OBJ_NAME_LEN)."""
    return f"{hook}_{artifact.hash[:8]}"[:15]


def running(array: int, hook: str) -> str | None:
    """The name of the program in a slot, ``HOOK_HASH`` with the first 8 digits of its artifact's hash; or None."""
    with reached(array, hook) as descriptor:
        return None if descriptor is None else bpf.program_info(descriptor).name


@contextmanager
def reached(array: int, hook: str) -> Iterator[int | None]:
    """A descriptor of the program in a slot; None where there is none."""
    raw = bpf.lookup(array, struct.pack("=I", _SLOTS[hook]), 4)
    descriptor = None if raw is None else bpf.program_by_id(struct.unpack("=I", raw)[0])
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def run_all(array: int, artifact: Artifact) -> bool:
    """Whether every slot has the artifact's program."""
    return all(running(array, hook) == _slot_name(artifact, hook) for hook in _SLOTS if hook in artifact.programs)


def maps_in_use(directory: Path) -> set[int]:
    """Kernel ids of the maps of all programs that packets or sockets reach."""
    used: set[int] = set()
    with ExitStack() as stack:
        numbers = list(sockets.program_ids(directory).values())
        array = bpf.get(directory / ARRAY)
        if array is not None:
            stack.callback(os.close, array)
            for slot in _SLOTS.values():
                raw = bpf.lookup(array, struct.pack("=I", slot), 4)
                numbers += [] if raw is None else [struct.unpack("=I", raw)[0]]
        for number in numbers:
            descriptor = bpf.program_by_id(number)
            if descriptor is not None:
                stack.callback(os.close, descriptor)
                used |= bpf.maps_of_program(descriptor)
    return used
