"""Pods as a container runtime makes them: a network namespace first, the container in it after CNI ADD.

A pod has its own mount, IPC, UTS, pid and cgroup namespaces, a cgroup, a read-only root (the machine's own files), and
a /dev with the usual nodes and just the RDMA nodes that it was granted. It has the capabilities that container
runtimes give by default, less CAP_MKNOD: what is not in its /dev stays out of reach.
"""

from __future__ import annotations

import stat
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rdmanet.errors import UnavailableError
from testbed.container import Cgroup, Completed, Container, Process, Specification
from testbed.container_init import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY
from testbed.session import session

if TYPE_CHECKING:
    from testbed.host import Host

#: capabilities(7) by number; the defaults of Docker, containerd and Podman without mknod (27).
CAPABILITIES = (
    0,  # chown
    1,  # dac_override
    3,  # fowner
    4,  # fsetid
    5,  # kill
    6,  # setgid
    7,  # setuid
    8,  # setpcap
    10,  # net_bind_service
    13,  # net_raw
    18,  # sys_chroot
    29,  # audit_write
    31,  # setfcap
)

#: Documentation/admin-guide/devices.txt
COMMON_NODES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A character device that a pod is granted: its path below /dev, and its numbers."""

    path: str
    major: int
    minor: int


def rdma_cm_node(sysfs: Path = Path("/sys/class/misc/rdma_cm/dev")) -> DeviceNode:
    """The connection manager's node, shared by all devices; UnavailableError when rdma_ucm is not loaded."""
    try:
        major, minor = sysfs.read_text().split(":")
    except FileNotFoundError as error:
        raise UnavailableError("this kernel has no rdma_cm node; load rdma_ucm: modprobe rdma_ucm") from error
    return DeviceNode("infiniband/rdma_cm", int(major), int(minor))


def rdma_nodes(uverbs: str, major: int, minor: int) -> tuple[DeviceNode, ...]:
    """What a runtime grants with an RDMA device: its own uverbs node and rdma_cm."""
    return (DeviceNode(f"infiniband/{uverbs}", major, minor), rdma_cm_node())


def hosts_file(name: str, hosts: Mapping[str, str]) -> str:
    """An /etc/hosts: loopback, the pod itself, and `hosts` (name to address)."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", *(f"{a} {n}" for n, a in hosts.items())]
    if name not in hosts:
        lines.append(f"127.0.0.1 {name}")
    return "\n".join(lines) + "\n"


def actions(name: str, nodes: Sequence[DeviceNode], hosts: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """What the first process does to the pod's mount namespace, in order (container_init.act)."""
    quiet = MS_NOSUID | MS_NODEV | MS_NOEXEC
    # The pts instance needs its ptmx reachable as /dev/ptmx; everything is made before /dev is what it says.
    result: list[tuple[Any, ...]] = [
        ("read_only", "/", True),
        ("mask", "/var/lib/rdmanet"),
        ("umount", "/run"),
        ("mount", "tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64m"),
        ("mkdir", "/run/tmp"),
        ("write", "/run/hosts", hosts_file(name, hosts)),
        ("mount", "/run/hosts", "/etc/hosts", "", MS_BIND, ""),
        ("umount", "/dev"),
        ("mount", "tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k"),
    ]
    directories = ["/dev/pts", "/dev/shm"]
    directories += sorted({str(Path("/dev", node.path).parent) for node in nodes})
    result += [("mkdir", directory) for directory in directories]
    for node in [*(DeviceNode(path, *numbers) for path, numbers in COMMON_NODES.items()), *nodes]:
        result.append(("mknod", f"/dev/{node.path}", stat.S_IFCHR | 0o666, node.major, node.minor))
    result += [
        ("mount", "devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"),
        ("mount", "tmpfs", "/dev/shm", "tmpfs", quiet, "mode=1777,size=256m"),
        ("symlink", "pts/ptmx", "/dev/ptmx"),
        ("symlink", "/proc/self/fd", "/dev/fd"),
        ("symlink", "/proc/self/fd/0", "/dev/stdin"),
        ("symlink", "/proc/self/fd/1", "/dev/stdout"),
        ("symlink", "/proc/self/fd/2", "/dev/stderr"),
        ("umount", "/proc"),
        ("mount", "proc", "/proc", "proc", quiet, ""),
        ("mount", "/proc/sys", "/proc/sys", "", MS_BIND, ""),
        ("read_only", "/proc/sys", False),
        # A sysfs mounted inside shows the namespace's own network and, in exclusive mode, RDMA devices.
        ("umount", "/sys"),
        ("mount", "sysfs", "/sys", "sysfs", quiet | MS_RDONLY, ""),
    ]
    return result


@dataclass
class Pod:
    """One pod on `host`. Create, CNI ADD with `netns` and `container_id`, start, stop, CNI DEL, destroy."""

    host: Host
    name: str
    namespace: str
    netns: str  # path, bound in the host's mount namespace
    container_id: str
    cgroup: Cgroup
    ifname: str = "eth0"
    container: Container | None = field(default=None, init=False)

    @classmethod
    def create(cls, host: Host, name: str, *, namespace: str = "default", container_id: str | None = None) -> Pod:
        """Make the network namespace, as a runtime does before CNI ADD."""
        netns = host.create_netns(name)
        return cls(
            host,
            name,
            namespace,
            netns,
            container_id or uuid.uuid4().hex,
            session().cgroup(f"{host.name}-{name}"),
        )

    def start(
        self,
        nodes: Sequence[DeviceNode] = (),
        *,
        hosts: Mapping[str, str] | None = None,
        capabilities: tuple[int, ...] | None = CAPABILITIES,
    ) -> Pod:
        """Start the container: its first process, in place and ready for `exec` when this returns."""
        self.cgroup.create()
        try:
            self.container = Container.start(
                self.name,
                Specification(
                    unshare=("mnt", "ipc", "uts", "pid", "cgroup"),
                    join_netns=self.netns,
                    actions=tuple(actions(self.name, nodes, hosts or {})),
                    hostname=self.name,
                    memlock_unlimited=True,
                    capabilities=capabilities,
                ),
                inside=self.host.container,
                cgroup=self.cgroup,
            )
        except BaseException:
            self.cgroup.remove()
            raise
        self.container.environment = {**self.container.environment, "TMPDIR": "/run/tmp", "HOME": "/run/tmp"}
        return self

    @property
    def running(self) -> Container:
        """The container; UnavailableError before `start` and after `stop`."""
        if self.container is None:
            raise UnavailableError(f"pod {self.name} is not started")
        return self.container

    def exec(self, argv: Sequence[str], **options: Any) -> Completed:
        """Run a command in the pod to its end (testbed.container.Container.exec)."""
        return self.running.exec(argv, **options)

    def popen(self, argv: Sequence[str], **options: Any) -> Process:
        """Start a command in the pod (testbed.container.Container.popen)."""
        return self.running.popen(argv, **options)

    def stop(self) -> None:
        """End every process of the pod and remove its cgroup; the network namespace stays. Idempotent."""
        if self.container is not None:
            self.container.stop()
            self.container = None
        self.cgroup.remove()

    def destroy(self) -> None:
        """Stop, and remove the network namespace; idempotent."""
        self.stop()
        self.host.delete_netns(self.netns)

    def __enter__(self) -> Pod:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()
