"""Which cgroup is a pod's, in the cgroup2 hierarchy (pure or beside version 1): reading names, apart from looking.

Names as runtimes give them: ``kubepods/burstable/pod<uid>`` (kubelet with cgroupfs),
``kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _ for ->.slice`` (with systemd), below them or
on their own ``cri-containerd-<id>.scope``, ``crio-<id>.scope``, ``docker-<id>.scope``, ``libpod-<id>.scope``, or the
bare id. Paths here begin with ``/``, which is the hierarchy's root.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rdmanet.errors import KernelError, NotFoundError, UnavailableError
from rdmanet.model import NetnsId, PodCgroup

#: How far below the root the kubelet's cgroups are looked for: its own may be in those of a --cgroup-root.
_DEPTH = 5
_QOS = ("burstable", "besteffort", "guaranteed")
#: Shorter ids may be part of any name.
_ID_CHARACTERS = 12


# Reading


def hierarchy(mountinfo: str) -> str | None:
    """Where the cgroup2 hierarchy is mounted, from /proc/PID/mountinfo (proc(5)); None without one. The last, as later
    mounts hide earlier ones."""
    found = None
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split()[:1] == ["cgroup2"]:
            found = fields.split()[4]
    return found


def path_of(text: str) -> str | None:
    """The path in the cgroup2 hierarchy from /proc/PID/cgroup (cgroups(7)); None without one, or when it is deleted."""
    for line in text.splitlines():
        if line.startswith("0::"):
            path = line.removeprefix("0::")
            return None if path.endswith(" (deleted)") else path
    return None


def named_part(path: str, container_id: str, pod_uid: str | None) -> str | None:
    """The topmost part of a path that carries the pod's uid, or the container's id; None where no part does."""
    names = [container_id] if len(container_id) >= _ID_CHARACTERS else []
    if pod_uid:
        names += [f"pod{pod_uid}", f"pod{pod_uid.replace('-', '_')}"]
    parts = path.split("/")[1:]
    for number, part in enumerate(parts, 1):
        if any(name in part for name in names):
            return "/" + "/".join(parts[:number])
    return None


def expanded(path: str) -> str:
    """A cgroup path as runtimes pass it on (``cgroupPath``): a systemd slice alone stands for those above it as well
    (systemd.slice(5)), ``a-b.slice`` for ``/a.slice/a-b.slice``."""
    if not path.endswith(".slice") or "/" in path.strip("/"):
        return "/" + path.strip("/")
    words = path.strip("/").removesuffix(".slice").split("-")
    return "/" + "/".join(f"{'-'.join(words[: n + 1])}.slice" for n in range(len(words)))


def refusal(path: str, own: str) -> str | None:
    """Why nothing is done to this cgroup, whoever is in it; ``own`` is the agent's."""
    if path == "/":
        return "it is in the root cgroup, with the whole host"
    if ".." in path.split("/"):
        return "its cgroup is outside of the agent's cgroup namespace; run the agent in the host's"
    if own == path or own.startswith(f"{path}/"):
        return f"its cgroup {path} is the agent's own, or above it"
    return None


def _is_kubelets(name: str) -> bool:
    return ("kube" in name and "-pod" not in name and not name.startswith("pod")) or name in _QOS


# Looking


class Cgroups:
    """The cgroup2 hierarchy as this process sees it. Reads only."""

    def __init__(self, root: Path, proc: Path = Path("/proc")):
        self.root = root
        self._proc = proc

    @classmethod
    def here(cls) -> Cgroups:
        """Raises UnavailableError where no cgroup2 hierarchy is mounted."""
        root = hierarchy(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
        if root is None:
            raise UnavailableError(
                "This host has no cgroup2 hierarchy mounted, on which pods' RDMA devices and objects are limited; mount"
                " one with `mount -t cgroup2 none /sys/fs/cgroup`.",
                operation="mountinfo",
            )
        return cls(Path(root))

    def directory(self, path: str) -> Path:
        """Of a cgroup, by its path in the hierarchy."""
        return self.root / path.removeprefix("/")

    def exists(self, cgroup: PodCgroup) -> bool:
        """Whether it is still the one that was found, not a later one of that name."""
        try:
            return self.directory(cgroup.path).stat().st_ino == cgroup.id
        except FileNotFoundError:
            return False

    def of_pod_uid(self, uid: str) -> str | None:
        """The cgroup that the kubelet has made for the pod with this uid, or None."""
        for directory in self._kubelets(self.root, 0):
            stem = directory.name.removesuffix(".slice")
            for name in (f"pod{uid}", f"{stem}-pod{uid.replace('-', '_')}.slice"):
                if (directory / name).is_dir():
                    return "/" + str((directory / name).relative_to(self.root))
        return None

    def _kubelets(self, directory: Path, depth: int) -> Iterator[Path]:
        if depth == _DEPTH:
            return
        try:
            with os.scandir(directory) as entries:
                below = sorted(e.name for e in entries if _is_kubelets(e.name) and e.is_dir(follow_symlinks=False))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return  # gone since: the pod is in none that is
        for name in below:
            yield directory / name
            yield from self._kubelets(directory / name, depth + 1)

    def of_process(self, pid: int, netns: NetnsId, container_id: str, pod_uid: str | None) -> tuple[str, bool]:
        """The pod's cgroup by one of its processes, and whether its name says that it is the pod's.

        Raises UnavailableError where the pid is not that of a process in the pod's network namespace (any more): a pid
        may be another process's by now, and only one of the pod's own speaks for the pod.
        """
        gone = UnavailableError(
            f"Process {pid}, which spoke for the pod, has ended or is not in the pod's network namespace.",
            operation="pidfd",
            subject=str(pid),
        )
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise gone from error
        try:
            path = path_of((self._proc / str(pid) / "cgroup").read_text(encoding="utf-8"))
            inside = self._netns(pid)
            ended = select.select([pidfd], [], [], 0)[0]
        except OSError as error:
            raise gone from error
        finally:
            os.close(pidfd)
        if ended or inside != netns:
            raise gone
        if path is None:
            raise UnavailableError(f"Process {pid} is in no cgroup2 cgroup.", operation="cgroup", subject=str(pid))
        named = named_part(path, container_id, pod_uid)
        return (path, False) if named is None else (named, True)

    def checked(self, path: str, foreign: Callable[[NetnsId], bool]) -> PodCgroup:
        """The cgroup, when it may be limited. Raises UnavailableError with the reason otherwise: it is the root, the
        agent's own or above it, or a process is in it whose network namespace is ``foreign``."""
        own = path_of((self._proc / "self/cgroup").read_text(encoding="utf-8")) or "/"
        why = refusal(path, own)
        if why is None:
            pid = self._foreigner(path, foreign)
            why = None if pid is None else f"process {pid}, which is not the pod's, is in its cgroup {path} as well"
        if why is not None:
            raise UnavailableError(f"The pod's RDMA devices and objects are not limited: {why}.", subject=path)
        try:
            return PodCgroup(path, self.directory(path).stat().st_ino)
        except FileNotFoundError as error:
            raise NotFoundError(f"The cgroup {path} is gone.", operation="stat", subject=path) from error

    def _foreigner(self, path: str, foreign: Callable[[NetnsId], bool]) -> int | None:
        for pid in self._processes(path):
            try:
                if foreign(self._netns(pid)):
                    return pid
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since
        return None

    def _netns(self, pid: int) -> NetnsId:
        status = (self._proc / str(pid) / "ns/net").stat()
        return NetnsId(status.st_dev, status.st_ino)

    def _processes(self, path: str) -> Sequence[int]:
        """Of the cgroup and all below it."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.directory(path)):
            try:
                text = (Path(directory) / "cgroup.procs").read_text(encoding="ascii")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise KernelError(
                    f"The processes of the cgroup {directory} cannot be read (a threaded one has none).",
                    operation="read",
                    subject=directory,
                    errno=error.errno,
                ) from error
            found += map(int, text.split())
        return found


def character_majors(devices: str) -> set[int]:
    """The majors of RDMA's character devices, from /proc/devices: uverbs, umad and issm nodes. 231 is theirs by
    Documentation/admin-guide/devices.txt, the others are given out when the modules are loaded."""
    majors = {231}
    for line in devices.partition("Block devices:")[0].splitlines():
        words = line.split()
        if len(words) == 2 and words[1].startswith("infiniband"):
            majors.add(int(words[0]))
    return majors
