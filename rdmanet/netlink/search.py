"""Where a network namespace is, of which only the number is known that ours has for it (a link's IFLA_LINK_NETNSID)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import NotFoundError, RdmanetError
from rdmanet.model import NetnsId
from rdmanet.netlink import messages, namespace
from rdmanet.netlink.batch import BatchSocket

_MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """A path that leads to the namespace, and which one that is."""

    path: str
    netns_id: NetnsId


def find(wanted: Mapping[int, str | None]) -> dict[int, Place]:
    """The namespaces with these numbers, each perhaps with the path at which it was; those that are nowhere are left
    out. Looks there, then at what is bound anywhere, as runtimes do, then at every process."""
    found: dict[int, Place] = {}
    seen = {namespace.own()}
    with BatchSocket() as host:
        for path in _paths(wanted):
            try:
                with namespace.opened(path) as descriptor:
                    identity = namespace.identify(descriptor)
                    if identity in seen:
                        continue
                    seen.add(identity)
                    (reply,) = host.send([messages.get_nsid(descriptor)])
            except (NotFoundError, RdmanetError):
                continue
            number = messages.nsid(reply.payloads[0])
            if number is not None and number in wanted and number not in found:
                found[number] = Place(path, identity)
                if len(found) == len(wanted):
                    break
    return found


def _paths(wanted: Mapping[int, str | None]) -> Iterator[str]:
    yield from filter(None, wanted.values())
    yield from _bound(_MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"))
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    yield from (f"/proc/{pid}/ns/net" for pid in sorted(processes))


def _bound(mounts: str) -> Iterator[str]:
    """Where namespaces are mounted, by mountinfo (proc_pid_mountinfo(5)), whose paths have blanks as \\040."""
    for line in mounts.splitlines():
        front, _, back = line.partition(" - ")
        if back.startswith("nsfs "):
            yield _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), front.split(" ")[4])
