"""A compiled datapath as a file: programs with relocations, map definitions, drop reasons.

The file is JSON, so that a node needs neither bcc nor LLVM nor kernel headers to read it. ``integrity`` is the SHA-256
of everything else in canonical form (sorted keys, no white space); it finds damage, it does not prove origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdmanet.errors import InputError, NotFoundError, StateError

FORMAT = 1
#: The newest artifact of a directory.
NEWEST = "datapath.json"
#: Bytes of one eBPF instruction (RFC 9669 3).
INSTRUCTION_BYTES = 8
#: Programs that a filter enters through a dispatcher, and their slots in the program array (enum hook in bpf/hook.h).
HOOKS: dict[str, int] = {"pod": 0, "host": 1, "uplink": 2}
#: Programs that go on where those stop, by tail call.
CONTINUATIONS: dict[str, int] = {"outside": 3, "nodeport": 4, "monitor": 5, "parts": 6, "collect": 7}
#: Programs on sockets (BPF_PROG_TYPE_CGROUP_SOCK_ADDR), and what they are attached as (enum bpf_attach_type).
SOCKET_PROGRAMS: Mapping[str, int] = {
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
}
#: The program for pods' cgroups (bpf/device.c). It is in no slot: each pod's is loaded with a map of its own.
DEVICE_PROGRAM = "device"
DEVICE_MAP = "pod_devices"


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What a map must look like; ``type`` is the kernel's enum bpf_map_type, sizes are bytes."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


#: Field name → (offset, size) in bytes, padding left out; a bare number is a field named ``value``.
Places = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the C compiler laid out a map's key and value."""

    key: Places
    value: Places


@dataclass(frozen=True, slots=True)
class Relocation:
    """The instruction (by index) that loads a map's descriptor."""

    instruction: int
    map: str


@dataclass(frozen=True, slots=True)
class Program:
    """One tc program; map descriptors are zero where the relocations point."""

    name: str
    instructions: bytes
    relocations: tuple[Relocation, ...]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled datapath. ``hash`` is that of source, flags and compiler, in hexadecimal."""

    hash: str
    compiler: str
    license: str
    drop_reasons: tuple[str, ...]  # the reason with number 1 first
    maps: Mapping[str, MapDefinition]
    layouts: Mapping[str, Layout]
    programs: Mapping[str, Program]

    def sized(self, sizes: Mapping[str, int]) -> Artifact:
        """The same with other maximum numbers of entries, by map; maps that it does not have are passed over. Its hash
        is another one where a size is: the hash says what is pinned and runs.

        Raises InputError for a size that no map can have.
        """
        changed = {
            name: replace(self.maps[name], max_entries=entries)
            for name, entries in sizes.items()
            if name in self.maps and self.maps[name].max_entries != entries
        }
        for definition in changed.values():
            if not 1 <= definition.max_entries < 2**31:
                raise InputError(
                    f"A map cannot hold {definition.max_entries} entries.", operation="size", subject=definition.name
                )
        if not changed:
            return self
        words = json.dumps([self.hash, {name: one.max_entries for name, one in changed.items()}], sort_keys=True)
        return replace(self, hash=hashlib.sha256(words.encode()).hexdigest(), maps={**self.maps, **changed})

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Reads an artifact file, or the newest one of a directory that the compiler wrote into.

        Raises NotFoundError without one, StateError when it is damaged or of another format.
        """
        file = path / NEWEST if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise NotFoundError(
                f"There is no compiled datapath at {file}; "
                "make one with `python -m rdmanet.datapath.compiler --output DIRECTORY`.",
                subject=str(file),
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(str(file), f"it cannot be read ({error})") from error
        return decode(text, str(file))


def encode(artifact: Artifact) -> str:
    """The artifact as the text of its file."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "hash": artifact.hash,
        "compiler": artifact.compiler,
        "license": artifact.license,
        "drop_reasons": list(artifact.drop_reasons),
        "maps": {
            name: {
                "type": definition.type,
                "key_size": definition.key_size,
                "value_size": definition.value_size,
                "max_entries": definition.max_entries,
                "flags": definition.flags,
            }
            for name, definition in artifact.maps.items()
        },
        "layouts": {
            name: {"key": _places(layout.key), "value": _places(layout.value)}
            for name, layout in artifact.layouts.items()
        },
        "programs": {
            name: {
                "instructions": base64.b64encode(program.instructions).decode("ascii"),
                "relocations": [[r.instruction, r.map] for r in program.relocations],
            }
            for name, program in artifact.programs.items()
        },
    }
    return json.dumps({**body, "integrity": _integrity(body)}, indent=1, sort_keys=True) + "\n"


def decode(text: str, origin: str = "artifact") -> Artifact:
    """Reads the text of an artifact file; ``origin`` names it in errors.

    Raises StateError when it is not an artifact, of another format, damaged, or contradicts itself.
    """
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unusable(origin, f"it is not JSON ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _unusable(origin, f"it is not of format {FORMAT}")
    if body.pop("integrity", None) != _integrity(body):
        raise _unusable(origin, "its integrity hash does not match, the file is damaged")
    try:
        maps = {name: MapDefinition(name=name, **definition) for name, definition in body["maps"].items()}
        layouts = {
            name: Layout(
                key={field: (offset, size) for field, (offset, size) in layout["key"].items()},
                value={field: (offset, size) for field, (offset, size) in layout["value"].items()},
            )
            for name, layout in body["layouts"].items()
        }
        programs = {
            name: Program(
                name=name,
                instructions=base64.b64decode(program["instructions"], validate=True),
                relocations=tuple(Relocation(index, target) for index, target in program["relocations"]),
            )
            for name, program in body["programs"].items()
        }
        artifact = Artifact(
            hash=body["hash"],
            compiler=body["compiler"],
            license=body["license"],
            drop_reasons=tuple(body["drop_reasons"]),
            maps=maps,
            layouts=layouts,
            programs=programs,
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise _unusable(origin, f"a field is missing or of the wrong type ({error!r})") from error
    _check(artifact, origin)
    return artifact


def save(artifact: Artifact, path: Path) -> None:
    """Writes an artifact file in one step: a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(encode(artifact))
        os.chmod(temporary, 0o644)  # noqa: PTH101 - a name, not yet a path of ours
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _places(places: Places) -> dict[str, list[int]]:
    return {name: [offset, size] for name, (offset, size) in places.items()}


def _integrity(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check(artifact: Artifact, origin: str) -> None:
    """What the loader relies on."""
    wanted = [*HOOKS, *(f"dispatch_{hook}" for hook in HOOKS), DEVICE_PROGRAM]
    missing = [name for name in wanted if name not in artifact.programs]
    if missing or "programs" not in artifact.maps:
        raise _unusable(origin, f"it lacks {', '.join(missing) or 'the map programs'}")
    if artifact.layouts.keys() != artifact.maps.keys():
        raise _unusable(origin, "its layouts are not those of its maps")
    for program in artifact.programs.values():
        count, rest = divmod(len(program.instructions), INSTRUCTION_BYTES)
        if rest or not count:
            raise _unusable(origin, f"program {program.name} is not made of whole instructions")
        for relocation in program.relocations:
            if relocation.map not in artifact.maps or not 0 <= relocation.instruction < count:
                raise _unusable(origin, f"program {program.name} has a relocation that leads nowhere")


def _unusable(origin: str, why: str) -> StateError:
    return StateError(
        f"The compiled datapath in {origin} is not usable: {why}; "
        "make it anew with `python -m rdmanet.datapath.compiler --output DIRECTORY`.",
        subject=origin,
    )
