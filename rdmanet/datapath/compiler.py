"""Compiles bpf/ to an artifact with bcc; the only module that imports it.

``python -m rdmanet.datapath.compiler --output DIRECTORY`` writes ``datapath-KEY.json`` and ``datapath.json`` (the same,
for whoever looks for the newest) and prints the first one's path. What is there already is not compiled again.

bcc makes the maps while it compiles (and they vanish with it), so this needs root (CAP_BPF) like loading does.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

from rdmanet.datapath import artifact as artifacts
from rdmanet.datapath import source
from rdmanet.datapath.artifact import (
    INSTRUCTION_BYTES,
    Artifact,
    Layout,
    MapDefinition,
    Program,
    Relocation,
)
from rdmanet.errors import NotFoundError, RdmanetError, StateError, UnavailableError

#: bcc's own helpers leave unused variables and shadowed macros behind; our parts are checked by their tests.
FLAGS = ("-Wno-unused-variable", "-Wno-macro-redefined", "-Wno-unused-function")

HEADERS_VARIABLE = "BCC_KERNEL_SOURCE"

#: bcc's names of C types, with their sizes in bytes.
_BASE_TYPES = {
    "char": 1,
    "unsigned char": 1,
    "short": 2,
    "unsigned short": 2,
    "int": 4,
    "unsigned int": 4,
    "long long": 8,
    "unsigned long long": 8,
}

_LOAD_64_BIT_IMMEDIATE = 0x18
_PSEUDO_MAP_FD = 1


def compile_datapath(output: Path, directory: Path | None = None) -> Path:
    """Compiles the source in ``directory`` (``bpf/`` by default) and returns the artifact's path below ``output``.

    Raises UnavailableError without bcc or kernel headers, StateError when the source does not compile.
    """
    directory = source.default_directory() if directory is None else directory
    text = source.join(directory)
    headers = _headers()
    lib, version = _bcc()
    compiler = f"bcc {version}, {os.uname().machine}, headers of {headers}"
    key = hashlib.sha256("\0".join((text, *FLAGS, compiler, str(artifacts.FORMAT))).encode()).hexdigest()
    path = output / f"datapath-{key[:16]}.json"
    artifact = _cached(path)
    if artifact is None:
        artifact = _compile(lib, text, key, compiler)
        artifacts.save(artifact, path)
    artifacts.save(artifact, output / artifacts.NEWEST)
    return path


def _cached(path: Path) -> Artifact | None:
    """What an earlier run left; a damaged file is made anew."""
    try:
        return Artifact.load(path)
    except (NotFoundError, StateError):
        return None


def _headers() -> str:
    """The release of the kernel headers that bcc will read."""
    named = os.environ.get(HEADERS_VARIABLE)
    place = Path(named) if named else Path("/lib/modules", os.uname().release, "build")
    try:
        words = (place / "include/generated/utsrelease.h").read_text(encoding="utf-8").split('"')
        return words[1]
    except (OSError, IndexError) as error:
        raise UnavailableError(
            f"Kernel headers are needed to compile the datapath and {place} has none; set {HEADERS_VARIABLE} to the "
            "tree of any recent linux-headers package, its common and its architecture's part merged.",
            operation="compile",
            subject=str(place),
        ) from error


def _bcc() -> tuple[Any, str]:
    """libbcc with the argument types that bcc declares, and its version."""
    try:
        from bcc import __version__
        from bcc.libbcc import lib
    except ImportError as error:
        raise UnavailableError(
            "Compiling the datapath needs bcc for this Python; install python3-bpfcc and use /usr/bin/python3, "
            "or bring an artifact that was compiled elsewhere.",
            operation="import bcc",
        ) from error
    # What bcc's Python side never calls and so never declares.
    for function in ("bpf_num_tables", "bpf_table_key_size_id", "bpf_table_leaf_size_id"):
        getattr(lib, function).restype = ctypes.c_ulonglong
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_fd_id.restype = ctypes.c_int
    return lib, __version__


def _compile(lib: Any, text: str, key: str, compiler: str) -> Artifact:
    reasons = source.drop_reasons(text)
    flags = (ctypes.c_char_p * len(FLAGS))(*(flag.encode() for flag in FLAGS))
    # The C function below bcc.BPF(): that class keeps an exit handler and raises nothing narrower than Exception.
    created = lib.bpf_module_create_c_from_string(text.encode(), 0, flags, len(FLAGS), True, None)
    if not created:
        raise StateError(
            "The datapath does not compile; the compiler's messages are above. Root is needed as well: bcc makes the "
            "maps while it compiles.",
            operation="compile",
        )
    module = ctypes.c_void_p(created)
    try:
        maps, names = _maps(lib, module)
        layouts = {name: _layout(lib, module, name) for name in maps}
        programs = {}
        for name in source.programs(text):
            programs[name] = _program(name, _instructions(lib, module, name), names)
        return Artifact(
            hash=key,
            compiler=compiler,
            license=lib.bpf_module_license(module).decode(),
            drop_reasons=reasons,
            maps=maps,
            layouts=layouts,
            programs=programs,
        )
    finally:
        lib.bpf_module_destroy(module)


def _maps(lib: Any, module: ctypes.c_void_p) -> tuple[dict[str, MapDefinition], dict[int, str]]:
    """Map definitions by name, and names by the descriptors that bcc wrote into the instructions."""
    maps, names = {}, {}
    for index in range(lib.bpf_num_tables(module)):
        table = ctypes.c_ulonglong(index)
        name = lib.bpf_table_name(module, table).decode()
        maps[name] = MapDefinition(
            name=name,
            type=lib.bpf_table_type_id(module, table),
            key_size=lib.bpf_table_key_size_id(module, table),
            value_size=lib.bpf_table_leaf_size_id(module, table),
            max_entries=lib.bpf_table_max_entries_id(module, table),
            flags=lib.bpf_table_flags_id(module, table),
        )
        names[lib.bpf_table_fd_id(module, table)] = name
    return maps, names


def _layout(lib: Any, module: ctypes.c_void_p, name: str) -> Layout:
    key = json.loads(lib.bpf_table_key_desc(module, name.encode()))
    value = json.loads(lib.bpf_table_leaf_desc(module, name.encode()))
    return Layout(key=_places(key), value=_places(value))


def _places(described: Any) -> dict[str, tuple[int, int]]:
    """bcc describes a struct as [name, fields, "struct_packed"], padding written out as fields; a field as
    [name, type] or [name, type, [elements]]."""
    if isinstance(described, str):
        return {"value": (0, _size(described))}
    places, offset = {}, 0
    for field in described[1]:
        size = _size(field[1]) * math.prod(field[2] if len(field) > 2 else [1])
        if not field[0].lstrip("_").startswith("pad"):
            places[field[0]] = (offset, size)
        offset += size
    return places


def _size(described: Any) -> int:
    if isinstance(described, str):
        return _BASE_TYPES[described]
    return sum(_size(field[1]) * math.prod(field[2] if len(field) > 2 else [1]) for field in described[1])


def _instructions(lib: Any, module: ctypes.c_void_p, name: str) -> bytes:
    start = lib.bpf_function_start(module, name.encode())
    if not start:
        raise StateError(f"The datapath's source has no program {name}.", operation="compile", subject=name)
    return ctypes.string_at(start, lib.bpf_function_size(module, name.encode()))


def _program(name: str, instructions: bytes, names: dict[int, str]) -> Program:
    """Takes the map descriptors out of 64-bit loads (opcode 0x18, source register 1; RFC 9669 5.4)."""
    code = bytearray(instructions)
    relocations = []
    offset = 0
    while offset < len(code):
        opcode, registers, _, immediate = struct.unpack_from("=BBhi", code, offset)
        if opcode == _LOAD_64_BIT_IMMEDIATE and registers >> 4 == _PSEUDO_MAP_FD:
            relocations.append(Relocation(offset // INSTRUCTION_BYTES, names[immediate]))
            struct.pack_into("=i", code, offset + 4, 0)
        offset += 2 * INSTRUCTION_BYTES if opcode == _LOAD_64_BIT_IMMEDIATE else INSTRUCTION_BYTES
    return Program(name=name, instructions=bytes(code), relocations=tuple(relocations))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rdmanet.datapath.compiler", description="Compile the datapath.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the artifact; also the cache")
    parser.add_argument("--source", type=Path, default=None, help="directory with the C source (default: bpf/)")
    options = parser.parse_args(arguments)
    try:
        path = compile_datapath(options.output, options.source)
    except RdmanetError as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
