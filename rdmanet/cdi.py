"""CDI files: what a container gets with a slot, for the runtime to read (Container Device Interface 0.5).

A slot is the CDI device RESOURCE=slot-N. Its file is written when its device is there, and removed with it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import StateError

#: The first with all that is used here; podman 4, CRI-O 1.23 and containerd 1.7 know it.
VERSION = "0.5.0"
_SLOT = re.compile(r"slot-(0|[1-9][0-9]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Node:
    """A character device: its path in the container, and its numbers."""

    path: str
    major: int
    minor: int


def slot_id(number: int) -> str:
    """What kubelet calls a slot."""
    return f"slot-{number}"


def slot_number(identity: str) -> int | None:
    """Which slot that is; None where it is none."""
    found = _SLOT.fullmatch(identity)
    return None if found is None else int(found.group(1))


def qualified(resource: str, identity: str) -> str:
    """The CDI device of a slot."""
    return f"{resource}={identity}"


def file_name(device: str) -> str:
    """Of a CDI device's file: no two have the same, as neither ``/`` nor ``=`` is in their parts."""
    kind, _, name = device.partition("=")
    return f"{kind.replace('/', '-')}-{name}.json"


def document(device: str, nodes: Sequence[Node], variables: Mapping[str, str]) -> dict[str, object]:
    """The file's content."""
    kind, _, name = device.partition("=")
    return {
        "cdiVersion": VERSION,
        "kind": kind,
        "devices": [
            {
                "name": name,
                "containerEdits": {
                    "env": [f"{key}={value}" for key, value in variables.items()],
                    # With type and numbers the runtime need not find the node on the host.
                    "deviceNodes": [
                        {
                            "path": node.path,
                            "type": "c",
                            "major": node.major,
                            "minor": node.minor,
                            "fileMode": 0o666,
                            "permissions": "rw",
                        }
                        for node in nodes
                    ],
                },
            }
        ],
    }


def make(directory: Path) -> None:
    """The directory of CDI files, as packages make it. Raises StateError."""
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(
            f"The directory of CDI files {directory} cannot be made: {error}. Check kubernetes.cdi_dir.",
            operation="mkdir",
            subject=str(directory),
            errno=error.errno,
        ) from error


def write(directory: Path, device: str, content: Mapping[str, object]) -> None:
    """Writes the file at once and whole: whoever reads the directory meanwhile finds the old one, the new one or none.

    Raises StateError.
    """
    path = directory / file_name(device)
    beside = path.with_name(f".{path.name}.new")  # CDI reads names that end in .json or .yaml
    make(directory)  # at a boot it goes with the rest of /run
    try:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise StateError(
            f"The CDI file {path} cannot be written: {error}. Check kubernetes.cdi_dir, free space and permissions.",
            operation="write",
            subject=str(path),
            errno=error.errno,
        ) from error


def remove(directory: Path, device: str) -> None:
    """Removes the file, if there is one. Raises StateError."""
    path = directory / file_name(device)
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return
    except OSError as error:
        raise StateError(
            f"The CDI file {path} cannot be removed: {error}.", operation="unlink", subject=str(path), errno=error.errno
        ) from error


def holders(directory: Path, variable: str) -> dict[str, str]:
    """What slots' files say: the value of an environment variable → the CDI device. Others are left out."""
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*-slot-*.json")) if directory.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            (device,) = content["devices"]
            name = qualified(content["kind"], device["name"])
            for text in device["containerEdits"]["env"]:
                key, _, value = text.partition("=")
                if key == variable and path.name == file_name(name):
                    found[value] = name
    return found


def strangers(directory: Path, resource: str, known: Collection[str]) -> list[Path]:
    """Files of the resource's slots, half-written ones too, that are of none of the ``known`` devices."""
    kept = {file_name(device) for device in known}
    shape = re.compile(
        rf"\.?{re.escape(file_name(qualified(resource, '')).removesuffix('.json'))}slot-[0-9]+\.json(\.new)?"
    )
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if shape.fullmatch(path.name) and path.name not in kept)
