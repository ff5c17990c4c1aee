"""The C source of the datapath as one text: parts joined with ``#line``, and its drop reasons.

bcc rewrites map operations in the main file only (they fail inside an ``#include``d header with "unknown opcode 8d"),
so quoted includes are put in place here, each once; the compiler's messages still name the part and its line.
"""

from __future__ import annotations

import re
from pathlib import Path

from rdmanet.errors import NotFoundError, StateError

#: One entry file per hook, and the dispatcher that reaches those of packets.
ENTRY_FILES = (
    "pod.c",
    "outside.c",
    "host.c",
    "uplink.c",
    "nodeport.c",
    "monitor.c",
    "parts.c",
    "collect.c",
    "dispatcher.c",
    "device.c",
    "socket.c",
)

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_REASONS = re.compile(r"enum\s+drop_reason\s*\{(.*?)\}\s*;", re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_PROGRAM = re.compile(r"^int (\w+)\(struct (?:__sk_buff|bpf_sock_addr|bpf_cgroup_dev_ctx) \*\w+\)", re.MULTILINE)
_REASON = re.compile(r"DROP_([A-Z0-9_]+)(?:\s*=\s*(\d+))?")


def default_directory() -> Path:
    """``bpf/`` of the checkout that this package runs from."""
    return Path(__file__).resolve().parents[2] / "bpf"


def join(directory: Path) -> str:
    """All entry files and the parts they include, as one text for the compiler.

    Raises NotFoundError for a part that is not there.
    """
    seen: set[str] = set()
    return "".join(_expand(directory, name, seen, included_by="the list of entry files") for name in ENTRY_FILES)


def _expand(directory: Path, name: str, seen: set[str], included_by: str) -> str:
    if name in seen:
        return ""
    seen.add(name)
    try:
        lines = (directory / name).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"The datapath's source lacks {name}, which {included_by} names; "
            f"{directory} must be the bpf directory of a checkout.",
            subject=str(directory / name),
        ) from error
    out = [f'#line 1 "{name}"\n']
    for number, line in enumerate(lines, start=1):
        include = _INCLUDE.match(line)
        if include is None:
            out.append(line)
        else:
            out.append(_expand(directory, include[1], seen, included_by=name))
            out.append(f'#line {number + 1} "{name}"\n')
    return "".join(out)


def programs(text: str) -> tuple[str, ...]:
    """Names of all programs, in order: functions that take a hook's context."""
    return tuple(_PROGRAM.findall(_COMMENT.sub("", text)))


def drop_reasons(text: str) -> tuple[str, ...]:
    """Names of enum drop_reason in lower case without their prefix; the first has number 1.

    Raises StateError when the numbers are not 1, 2, 3 and so on: maps would be read wrongly.
    """
    found = _REASONS.search(text)
    if found is None:
        raise StateError("The datapath's source has no enum drop_reason.")
    names = []
    for name, number in _REASON.findall(_COMMENT.sub("", found[1])):
        names.append(name.lower())
        if number and int(number) != len(names):
            raise StateError(f"Drop reason {name.lower()} breaks the sequence; reasons are numbered from 1.")
    if not names:
        raise StateError("The datapath's enum drop_reason is empty.")
    return tuple(names)
