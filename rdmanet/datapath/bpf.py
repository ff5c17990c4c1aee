"""bpf(2) through ctypes: maps, programs, pins.

Structures are those of union bpf_attr in the kernel's include/uapi/linux/bpf.h. Every call raises BpfError with the
kernel's errno unless its docstring says otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rdmanet.errors import BpfError, UnavailableError, VerifierError

MAP_TYPE_HASH = 1
MAP_TYPE_ARRAY = 2
MAP_TYPE_PROG_ARRAY = 3
MAP_TYPE_PERCPU_HASH = 5
MAP_TYPE_LRU_HASH = 9
PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_CGROUP_DEVICE = 15
PROG_TYPE_CGROUP_SOCK_ADDR = 18
ATTACH_CGROUP_DEVICE = 6
#: Update whatever is there, or not.
ANY, NOEXIST = 0, 1

BPF_FS_MAGIC = 0xCAFE4A11

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_GET_NEXT_KEY, _PROG_LOAD, _OBJ_PIN, _OBJ_GET = range(8)
_PROG_ATTACH, _PROG_DETACH, _PROG_TEST_RUN = 8, 9, 10
_PROG_QUERY = 16
_MAP_LOOKUP_BATCH, _MAP_UPDATE_BATCH, _MAP_DELETE_BATCH = 24, 26, 27
_PROG_GET_FD_BY_ID = 13
_OBJ_GET_INFO_BY_FD = 15
_LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 28, 29, 34

_NAME_BYTES = 16  # BPF_OBJ_NAME_LEN, the closing zero included
_ATTR_BYTES = 152
_LOG_BYTES = 1 << 20
PERCPU_TYPES = (5, 6, 10)
#: The kernel allows 64 programs of a kind on a cgroup (include/linux/bpf-cgroup.h, BPF_CGROUP_MAX_PROGS).
_CGROUP_MAX_PROGS = 64
_F_ALLOW_MULTI, _F_REPLACE = 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MapInfo:
    """struct bpf_map_info, as far as a layout check needs it; sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """struct bpf_prog_info, as far as adoption and tests need it."""

    type: int
    id: int
    name: str
    verified_instructions: int  # that the verifier went through; it gives up at a million


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """struct bpf_link_info of a link to a cgroup."""

    program_id: int
    cgroup_id: int  # its inode; 0: the link was detached


@dataclass(frozen=True, slots=True)
class Run:
    """What a program did to a packet: its return value, the packet, struct __sk_buff, nanoseconds per run."""

    verdict: int
    packet: bytes
    context: bytes
    duration_ns: int


def create_map(name: str, type_: int, key_size: int, value_size: int, max_entries: int, flags: int = 0) -> int:
    """A new map's descriptor."""
    no_inner_map, no_node = 0, 0
    attr = struct.pack(
        "=IIIIIII16s", type_, key_size, value_size, max_entries, flags, no_inner_map, no_node, _name(name)
    )
    result, number = _call(_MAP_CREATE, attr)
    if result < 0:
        raise _failed("BPF_MAP_CREATE", name, number)
    return result


def lookup(descriptor: int, key: bytes, value_bytes: int) -> bytes | None:
    """The value under ``key``, or None; ``value_bytes`` is what ``buffer_bytes`` says."""
    keys, value = _buffer(key), ctypes.create_string_buffer(value_bytes)
    result, number = _call(_MAP_LOOKUP, _element(descriptor, keys, value))
    if result < 0:
        if number == errno.ENOENT:
            return None
        raise _failed("BPF_MAP_LOOKUP_ELEM", f"map descriptor {descriptor}", number)
    return value.raw


def update(descriptor: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Writes one entry."""
    keys, values = _buffer(key), _buffer(value)
    result, number = _call(_MAP_UPDATE, _element(descriptor, keys, values, flags))
    if result < 0:
        raise _failed("BPF_MAP_UPDATE_ELEM", f"map descriptor {descriptor}", number)


def update_batch(descriptor: int, keys: bytes, values: bytes, count: int) -> None:
    """Writes ``count`` entries, their keys and values one behind another, in one call (Linux 5.6, aa2e93b8e58e). What
    comes before the one that fails has been written."""
    if not count:
        return
    key_buffer, value_buffer = _buffer(keys), _buffer(values)
    attr = struct.pack(
        "=QQQQIIQQ", 0, 0, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), count, descriptor, ANY, 0
    )
    result, number = _call(_MAP_UPDATE_BATCH, attr)
    if result < 0:
        raise _failed("BPF_MAP_UPDATE_BATCH", f"map descriptor {descriptor}", number)


def delete_batch(descriptor: int, keys: bytes, key_bytes: int) -> None:
    """Removes the entries of these keys, one behind another; those that are not there are passed over."""
    key_buffer, first, count = _buffer(keys), 0, len(keys) // key_bytes
    while first < count:
        place = ctypes.addressof(key_buffer) + first * key_bytes
        attr = ctypes.create_string_buffer(
            struct.pack("=QQQQIIQQ", 0, 0, place, 0, count - first, descriptor, ANY, 0), _ATTR_BYTES
        )
        result, number = _call_buffer(_MAP_DELETE_BATCH, attr)
        if result >= 0:
            return
        if number != errno.ENOENT:
            raise _failed("BPF_MAP_DELETE_BATCH", f"map descriptor {descriptor}", number)
        # It says how many it has removed before the one that is not there.
        first += struct.unpack_from("=I", attr, 32)[0] + 1


def delete(descriptor: int, key: bytes) -> bool:
    """Removes one entry; False when it was not there."""
    keys = _buffer(key)
    result, number = _call(_MAP_DELETE, struct.pack("=IIQ", descriptor, 0, ctypes.addressof(keys)))
    if result < 0:
        if number == errno.ENOENT:
            return False
        raise _failed("BPF_MAP_DELETE_ELEM", f"map descriptor {descriptor}", number)
    return True


def keys(descriptor: int, key_bytes: int, max_entries: int) -> Iterator[bytes]:
    """Every key. Those added or removed meanwhile may be missed or come twice: the kernel starts again from the
    beginning when the key it stood at is gone, so the walk ends after as many steps as could be needed."""
    previous: ctypes.Array[ctypes.c_char] | None = None
    following = ctypes.create_string_buffer(key_bytes)
    for _ in range(2 * max_entries + 2):
        attr = struct.pack(
            "=IIQQ",
            descriptor,
            0,
            0 if previous is None else ctypes.addressof(previous),
            ctypes.addressof(following),
        )
        result, number = _call(_MAP_GET_NEXT_KEY, attr)
        if result < 0:
            if number == errno.ENOENT:
                return
            raise _failed("BPF_MAP_GET_NEXT_KEY", f"map descriptor {descriptor}", number)
        yield following.raw
        previous, following = following, ctypes.create_string_buffer(key_bytes)


def items(descriptor: int, key_bytes: int, value_bytes: int, at_once: int = 4096) -> Iterator[tuple[bytes, bytes]]:
    """Every key with its value, as ``batches`` reads them."""
    for keys, values in batches(descriptor, key_bytes, value_bytes, at_once):
        for at in range(len(keys) // key_bytes):
            key = keys[at * key_bytes : (at + 1) * key_bytes]
            yield key, values[at * value_bytes : (at + 1) * value_bytes]


def batches(descriptor: int, key_bytes: int, value_bytes: int, at_once: int = 4096) -> Iterator[tuple[bytes, bytes]]:
    """Every key with its value, ``at_once`` in each call (BPF_MAP_LOOKUP_BATCH: hashes from Linux 5.6, 057996380a42):
    keys one behind another, and their values. Those added or removed meanwhile may be missed or come twice."""
    token, done = ctypes.create_string_buffer(max(key_bytes, 8)), False
    first = True
    while not done:
        found, values = (ctypes.create_string_buffer(at_once * size) for size in (key_bytes, value_bytes))
        place, buffers = ctypes.addressof(token), (ctypes.addressof(found), ctypes.addressof(values))
        attr = ctypes.create_string_buffer(
            struct.pack("=QQQQIIQQ", 0 if first else place, place, *buffers, at_once, descriptor, ANY, 0), _ATTR_BYTES
        )
        result, number = _call_buffer(_MAP_LOOKUP_BATCH, attr)
        if result < 0 and number == errno.ENOSPC:  # less than what is in one bucket
            at_once *= 2
            continue
        done = result < 0
        if done and number != errno.ENOENT:
            raise _failed("BPF_MAP_LOOKUP_BATCH", f"map descriptor {descriptor}", number)
        count, first = struct.unpack_from("=I", attr, 32)[0], False
        yield found.raw[: count * key_bytes], values.raw[: count * value_bytes]


def load_program(
    name: str, instructions: bytes, license_: str, type_: int = PROG_TYPE_SCHED_CLS, expected_attach_type: int = 0
) -> int:
    """A loaded program's descriptor. The verifier's last words are in the error."""
    code, licenses = _buffer(instructions), ctypes.create_string_buffer(license_.encode())

    def attributes(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
        return struct.pack(
            "=IIQQIIQII16sII",
            type_,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licenses),
            0 if log is None else 1,
            0 if log is None else len(log),
            0 if log is None else ctypes.addressof(log),
            0,
            0,
            _name(name),
            0,
            expected_attach_type,
        )

    result, number = _call(_PROG_LOAD, attributes(None))
    if result >= 0:
        return result
    if number == errno.EPERM:
        raise _failed("BPF_PROG_LOAD", name, number)
    # Only a program that was refused is worth the log: it makes loading slower.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    result, number = _call(_PROG_LOAD, attributes(log))
    if result >= 0:
        return result
    text = log.value.decode(errors="replace").strip()
    raise VerifierError(
        f"The kernel's verifier refused program {name}: {' | '.join(text.splitlines()[-12:])}.",
        log=f"{name}\n{text}\n",
        operation="BPF_PROG_LOAD",
        subject=name,
        errno=number,
    )


def pin(descriptor: int, path: Path) -> None:
    """Gives a map or program a name in a bpffs; it then lives without us. FileExistsError where there is one."""
    name = _buffer(os.fsencode(path) + b"\0")
    result, number = _call(_OBJ_PIN, struct.pack("=QI", ctypes.addressof(name), descriptor))
    if result < 0:
        if number == errno.EEXIST:
            raise FileExistsError(number, os.strerror(number), str(path))
        raise _failed("BPF_OBJ_PIN", str(path), number)


def get(path: Path) -> int | None:
    """The descriptor of what is pinned at ``path``, or None."""
    name = _buffer(os.fsencode(path) + b"\0")
    result, number = _call(_OBJ_GET, struct.pack("=QI", ctypes.addressof(name), 0))
    if result < 0:
        if number == errno.ENOENT:
            return None
        raise _failed("BPF_OBJ_GET", str(path), number)
    return result


def program_by_id(number: int) -> int | None:
    """The descriptor of a loaded program by its kernel id, or None when it is gone."""
    result, code = _call(_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
    if result < 0:
        if code == errno.ENOENT:
            return None
        raise _failed("BPF_PROG_GET_FD_BY_ID", f"program {number}", code)
    return result


def attach_to_cgroup(cgroup: int, program: int, type_: int, replaced: int | None = None) -> None:
    """Adds a program to those of a cgroup (BPF_F_ALLOW_MULTI), or puts it in the place of one; it stays until it is
    detached or the cgroup goes."""
    flags = _F_ALLOW_MULTI | (0 if replaced is None else _F_REPLACE)
    attr = struct.pack("=IIIII", cgroup, program, type_, flags, replaced or 0)
    result, number = _call(_PROG_ATTACH, attr)
    if result < 0:
        raise _failed("BPF_PROG_ATTACH", f"program descriptor {program}", number)


def detach_from_cgroup(cgroup: int, program: int, type_: int) -> bool:
    """Takes a program away from a cgroup; False when it is not there."""
    result, number = _call(_PROG_DETACH, struct.pack("=III", cgroup, program, type_))
    if result < 0:
        if number == errno.ENOENT:
            return False
        raise _failed("BPF_PROG_DETACH", f"program descriptor {program}", number)
    return True


def programs_of_cgroup(cgroup: int, type_: int) -> list[int]:
    """Kernel ids of the programs that are attached to the cgroup itself, in the order in which they run."""
    ids = (ctypes.c_uint32 * _CGROUP_MAX_PROGS)()
    packed = struct.pack("=IIIIQI", cgroup, type_, 0, 0, ctypes.addressof(ids), len(ids))
    attr = ctypes.create_string_buffer(packed, _ATTR_BYTES)
    result, number = _call_buffer(_PROG_QUERY, attr)
    if result < 0:
        raise _failed("BPF_PROG_QUERY", f"cgroup descriptor {cgroup}", number)
    return list(ids[: struct.unpack_from("=I", attr, 24)[0]])


def link_to_cgroup(cgroup: int, program: int, type_: int) -> int:
    """Attaches a program to a cgroup, beside others' (Linux 5.7, af6eea57437a); returns the link, which holds it: it is
    detached when the last descriptor and pin of the link have gone."""
    result, number = _call(_LINK_CREATE, struct.pack("=IIII", program, cgroup, type_, 0))
    if result < 0:
        raise _failed("BPF_LINK_CREATE", f"program descriptor {program}", number)
    return result


def update_link(link: int, program: int) -> None:
    """Puts another program in the place of the link's, in one step."""
    result, number = _call(_LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0))
    if result < 0:
        raise _failed("BPF_LINK_UPDATE", f"link descriptor {link}", number)


def link_info(link: int) -> LinkInfo:
    """What the kernel knows of a cgroup's link."""
    program_id, cgroup_id = struct.unpack_from("=8xI4xQ", _info(link, 32))
    return LinkInfo(program_id, cgroup_id)


def detach_link(link: int) -> None:
    """Detaches the link's program now, whoever holds the link (Linux 5.9, 73b11c2ab072)."""
    result, number = _call(_LINK_DETACH, struct.pack("=I", link))
    if result < 0:
        raise _failed("BPF_LINK_DETACH", f"link descriptor {link}", number)


def map_info(descriptor: int) -> MapInfo:
    """What the kernel knows of a map."""
    raw = _info(descriptor, 88)
    type_, id_, key_size, value_size, max_entries, flags, name = struct.unpack_from("=IIIIII16s", raw)
    return MapInfo(type_, id_, key_size, value_size, max_entries, flags, _text(name))


def program_info(descriptor: int) -> ProgramInfo:
    """What the kernel knows of a program."""
    raw = _info(descriptor, 232)
    type_, id_ = struct.unpack_from("=II", raw)
    (name,) = struct.unpack_from("=16s", raw, 64)
    (verified,) = struct.unpack_from("=I", raw, 216)  # Linux 5.16, aba64c7da983
    return ProgramInfo(type_, id_, _text(name), verified)


def maps_of_program(descriptor: int) -> set[int]:
    """Kernel ids of the maps that a program uses."""
    room = (ctypes.c_uint32 * 64)()  # MAX_USED_MAPS
    info = ctypes.create_string_buffer(struct.pack("=52xIQ", len(room), ctypes.addressof(room)), 232)
    attr = struct.pack("=IIQ", descriptor, len(info), ctypes.addressof(info))
    result, number = _call(_OBJ_GET_INFO_BY_FD, attr)
    if result < 0:
        raise _failed("BPF_OBJ_GET_INFO_BY_FD", f"descriptor {descriptor}", number)
    return set(room[: struct.unpack_from("=I", info, 52)[0]])


def run_program(descriptor: int, packet: bytes, context: bytes = b"", repeat: int = 1) -> Run:
    """Runs a tc program on a packet (BPF_PROG_TEST_RUN); ``context`` is a struct __sk_buff or its beginning."""
    packet_in, context_in = _buffer(packet), _buffer(context)
    packet_out = ctypes.create_string_buffer(len(packet) + 512)
    context_out = ctypes.create_string_buffer(192)
    attr = ctypes.create_string_buffer(
        struct.pack(
            "=IIIIQQIIIIQQIII",
            descriptor,
            0,
            len(packet),
            len(packet_out),
            ctypes.addressof(packet_in),
            ctypes.addressof(packet_out),
            repeat,
            0,
            len(context),
            len(context_out),
            ctypes.addressof(context_in) if context else 0,
            ctypes.addressof(context_out),
            0,
            0,
            0,
        ),
        _ATTR_BYTES,
    )
    result, number = _call_buffer(_PROG_TEST_RUN, attr)
    if result < 0:
        raise _failed("BPF_PROG_TEST_RUN", f"{len(packet)} bytes", number)
    _, verdict, _, size, _, _, _, duration, _, context_size = struct.unpack_from("=IIIIQQIIII", attr)
    return Run(verdict, packet_out.raw[:size], context_out.raw[:context_size], duration)


def buffer_bytes(map_type: int, value_size: int) -> int:
    """Bytes that a look-up returns: per-CPU values come for every possible CPU, each padded to 8 bytes."""
    if map_type not in PERCPU_TYPES:
        return value_size
    return (value_size + 7) // 8 * 8 * possible_cpus()


@cache
def possible_cpus() -> int:
    """CPUs that the kernel has room for, plugged in or not."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(text.split(",")[-1].split("-")[-1]) + 1


def is_bpffs(path: Path) -> bool:
    """Whether ``path`` (which exists) is inside a bpffs."""
    status = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), status) != 0:
        number = ctypes.get_errno()
        raise BpfError(f"{path} cannot be looked at.", operation="statfs", subject=str(path), errno=number)
    # f_type comes first, a long on both architectures.
    return bool(struct.unpack_from("=q", status.raw)[0] == BPF_FS_MAGIC)


def _element(
    descriptor: int, key: ctypes.Array[ctypes.c_char], value: ctypes.Array[ctypes.c_char], flags: int = 0
) -> bytes:
    return struct.pack("=IIQQQ", descriptor, 0, ctypes.addressof(key), ctypes.addressof(value), flags)


def _info(descriptor: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    result, number = _call(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", descriptor, size, ctypes.addressof(info)))
    if result < 0:
        raise _failed("BPF_OBJ_GET_INFO_BY_FD", f"descriptor {descriptor}", number)
    return info.raw


def _call(command: int, attr: bytes) -> tuple[int, int]:
    return _call_buffer(command, ctypes.create_string_buffer(attr, _ATTR_BYTES))


def _call_buffer(command: int, attr: ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """(result, errno); the descriptors that come back are close-on-exec (the kernel sets it)."""
    result = _libc.syscall(ctypes.c_long(_syscall_number()), ctypes.c_long(command), attr, ctypes.c_long(len(attr)))
    return int(result), ctypes.get_errno()


@cache
def _syscall_number() -> int:
    machine = platform.machine()
    try:
        return _SYSCALL_NUMBERS[machine]
    except KeyError:
        raise UnavailableError(
            f"The datapath runs on {' and '.join(_SYSCALL_NUMBERS)}; this machine is {machine}."
        ) from None


def _failed(operation: str, subject: str, number: int) -> BpfError:
    if number in (errno.EPERM, errno.EACCES):
        sentence = "The kernel allows eBPF only to root in the host's namespaces (CAP_BPF and CAP_NET_ADMIN)."
    elif number == errno.ENOSYS:
        sentence = "This kernel was built without eBPF (CONFIG_BPF_SYSCALL)."
    elif number == errno.E2BIG:
        sentence = "The map is full."
    else:
        sentence = "The kernel refused an eBPF operation."
    return BpfError(sentence, operation=operation, subject=subject, errno=number)


def _name(name: str) -> bytes:
    encoded = name.encode("ascii")
    if len(encoded) >= _NAME_BYTES:
        raise ValueError(f"{name} is longer than the {_NAME_BYTES - 1} bytes of a BPF object's name")
    return encoded


def _buffer(content: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(content, max(len(content), 1))


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("ascii", errors="replace")
