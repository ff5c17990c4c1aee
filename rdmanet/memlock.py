"""How much memory a process may lock, and what container runtimes on this host let their containers lock.

The memory of every queue pair and memory region is locked, and counted per process against RLIMIT_MEMLOCK
(drivers/infiniband/core/umem.c, ib_umem_get); CAP_IPC_LOCK in the initial user namespace lifts that. A container has
the limit of the daemon that starts it, unless the runtime's configuration or the container itself says otherwise.
Standard library only: the library in pods and `rdmanet doctor` both look here.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Less than this is soon too little: UCX and MPI register tens of MiB when they start.
WANTED_BYTES = 64 << 20
#: capabilities(7)
_CAP_IPC_LOCK = 14
_WHOLE_USER_NAMESPACE = ["0", "0", str(2**32 - 1)]


@dataclass(frozen=True, slots=True)
class Limit:
    """A soft and a hard limit in bytes; None is none."""

    soft_bytes: int | None
    hard_bytes: int | None

    @property
    def enough(self) -> bool:
        """Whether the soft limit lets RDMA programs work."""
        return self.soft_bytes is None or self.soft_bytes >= WANTED_BYTES

    def __str__(self) -> str:
        return size_text(self.soft_bytes)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A container runtime of this host: what its containers get, by what, and how to give them more."""

    name: str
    limit: Limit
    source: str
    remedy: str


def size_text(size_bytes: int | None) -> str:
    """As people say it."""
    if size_bytes is None:
        return "unlimited"
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def here() -> Limit:
    """This process's own."""
    soft, hard = (None if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_MEMLOCK))
    return Limit(soft, hard)


def lifted(proc: Path = Path("/proc")) -> bool:
    """Whether this process has CAP_IPC_LOCK where the kernel asks for it: in the initial user namespace."""
    status = (proc / "self/status").read_text(encoding="ascii", errors="replace")
    effective = int(status.split("\nCapEff:", 1)[1].split(None, 1)[0], 16)
    whole = (proc / "self/uid_map").read_text(encoding="ascii").split() == _WHOLE_USER_NAMESPACE
    return whole and bool(effective >> _CAP_IPC_LOCK & 1)


def parse_limits(text: str) -> Limit:
    """RLIMIT_MEMLOCK in a /proc/PID/limits (proc_pid_limits(5)); ValueError where it is not there."""
    for line in text.splitlines():
        if line.startswith("Max locked memory"):
            soft, hard = (None if word == "unlimited" else int(word) for word in line.split()[3:5])
            return Limit(soft, hard)
    raise ValueError("no line 'Max locked memory'")


def docker_default(configuration: str) -> Limit | None:
    """`default-ulimits` of a daemon.json; None where it says nothing of memlock. ValueError when it is not JSON."""
    given = _table(_table(json.loads(configuration)).get("default-ulimits")).get("memlock")
    if given is None:
        return None
    values = _table(given)
    return Limit(*(_limit(values.get(name, values.get("Hard", 0))) for name in ("Soft", "Hard")))


def ulimits_default(lists: object) -> Limit | None:
    """memlock in a list like ``["memlock=-1:-1"]``, as containers.conf(5) and crio.conf(5) have it; None without."""
    for entry in lists if isinstance(lists, list) else []:
        name, _, values = str(entry).partition("=")
        if name.strip().lower() == "memlock":
            soft, _, hard = values.partition(":")
            return Limit(_limit(soft), _limit(hard or soft))
    return None


def runtimes(root: Path = Path("/")) -> Iterator[Runtime]:
    """The container runtimes found below `root`: daemons by their processes, podman by its program."""
    daemons = dict(_daemons(root / "proc", ("containerd", "dockerd", "crio")))
    if "containerd" in daemons:
        yield Runtime(
            "containerd",
            daemons["containerd"],
            "from containerd's own limit, as containers of Kubernetes do",
            "`systemctl edit containerd`, [Service] LimitMEMLOCK=infinity, then restart it",
        )
    if "dockerd" in daemons:
        chosen = _configured(root / "etc/docker/daemon.json", docker_default)
        yield Runtime(
            "docker",
            chosen or daemons.get("containerd", daemons["dockerd"]),
            "from default-ulimits in /etc/docker/daemon.json" if chosen else "from containerd's own limit",
            '`docker run --ulimit memlock=-1`, or "default-ulimits": {"memlock": {"Name": "memlock", "Soft": -1, '
            '"Hard": -1}} in /etc/docker/daemon.json',
        )
    if "crio" in daemons:
        files = [root / "etc/crio/crio.conf", *sorted((root / "etc/crio/crio.conf.d").glob("*.conf"))]
        chosen = _last(_configured(file, _crio_default) for file in files)
        yield Runtime(
            "cri-o",
            chosen or daemons["crio"],
            "from default_ulimits in its configuration" if chosen else "from crio's own limit",
            'default_ulimits = ["memlock=-1:-1"] under [crio.runtime] in /etc/crio/crio.conf.d, then restart it',
        )
    if shutil.which("podman", path=":".join(str(root / place) for place in ("usr/bin", "usr/local/bin", "bin"))):
        files = [root / "usr/share/containers/containers.conf", root / "etc/containers/containers.conf"]
        files += sorted((root / "etc/containers/containers.conf.d").glob("*.conf"))
        chosen = _last(_configured(file, _podman_default) for file in files)
        yield Runtime(
            "podman",
            chosen or here(),
            "from default_ulimits in containers.conf" if chosen else "from whoever starts it",
            '`podman run --ulimit memlock=-1`, or default_ulimits = ["memlock=-1:-1"] under [containers] in '
            "/etc/containers/containers.conf; without root no more than the user's own hard limit",
        )


def _podman_default(text: str) -> Limit | None:
    return ulimits_default(_table(tomllib.loads(text).get("containers")).get("default_ulimits"))


def _crio_default(text: str) -> Limit | None:
    return ulimits_default(_table(_table(tomllib.loads(text).get("crio")).get("runtime")).get("default_ulimits"))


def _daemons(proc: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Limit]]:
    for directory in proc.glob("[0-9]*"):
        # Processes come and go.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name = (directory / "comm").read_text(encoding="utf-8", errors="replace").strip()
            if name in names:
                yield name, parse_limits((directory / "limits").read_text(encoding="ascii"))


def _configured(file: Path, read: Any) -> Limit | None:
    """What a file says; None where there is none, or where the runtime could not read it either."""
    try:
        found: Limit | None = read(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def _last(limits: Iterator[Limit | None]) -> Limit | None:
    found = [limit for limit in limits if limit is not None]
    return found[-1] if found else None


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _limit(value: object) -> int | None:
    number = int(str(value))
    return None if number < 0 else number
