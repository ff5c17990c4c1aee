"""`rdmanet doctor`: what this host can and cannot do, line by line, and what to do about it.

Each check looks at the host itself and changes nothing.
"""

from __future__ import annotations

import enum
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rdmanet import memlock
from rdmanet.config import Config
from rdmanet.datapath import bpf, sockets
from rdmanet.datapath.artifact import Artifact
from rdmanet.errors import RdmanetError
from rdmanet.model import Backend, RdmaMode
from rdmanet.netlink import nldev
from rdmanet.netlink.route import RouteSocket
from rdmanet.node import find_uplinks, kernel_release
from rdmanet.rdma.cgroup import Cgroups
from rdmanet.rdma.rxe import wanted_release

#: PROC_PID_INIT_INO (include/linux/proc_ns.h)
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
ROCE_MTU_BYTES = 4200  # 4096 of path MTU and the headers around it


class Verdict(enum.StrEnum):
    """How a line ends."""

    OK = "ok"
    WARNING = "warning"  # works, with less
    MISSING = "missing"  # does not work until something is done


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    check: str
    verdict: Verdict
    sentence: str


def examine(config: Config) -> list[Finding]:
    """Runs every check. Never raises for what a host lacks: that is the answer."""
    findings = []
    for name, check in _CHECKS:
        try:
            findings += [Finding(name, verdict, sentence) for verdict, sentence in check(config)]
        except RdmanetError as error:
            findings.append(Finding(name, Verdict.MISSING, str(error)))
    return findings


Lines = Iterator[tuple[Verdict, str]]


def _root(config: Config) -> Lines:
    if os.geteuid() == 0:
        yield Verdict.OK, "running as root"
    else:
        yield Verdict.MISSING, "not root: the agent needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF); use sudo"


def _bpf(config: Config) -> Lines:
    filesystems = Path("/proc/filesystems").read_text(encoding="ascii")
    if "\tbpf\n" not in filesystems:
        yield Verdict.MISSING, "this kernel has no BPF file system (CONFIG_BPF_SYSCALL); use a distribution's kernel"
        return
    release = kernel_release()
    if release < (5, 14):
        yield Verdict.MISSING, f"Linux {platform.release()} is too old: 5.14 or newer is needed; Debian 12 has 6.1"
        return
    yield Verdict.OK, f"Linux {platform.release()} runs the datapath (redirect_peer, fib_lookup, netns cookies)"


def _pins(config: Config) -> Lines:
    yield pins(config.datapath.bpffs_dir.parent)


def pins(directory: Path, first: Path = Path("/proc/1")) -> tuple[Verdict, str]:
    """Whether what is pinned below a directory outlives the agent, as a bpffs of its container's own would not.

    ``first`` is of the host's first process, which is seen where the agent's container has the host's process ids.
    """
    try:
        own, hosts = (process.joinpath("ns/mnt").stat() for process in (Path("/proc/self"), first))
        if os.path.samestat(own, hosts):
            if Path("/proc/self/ns/pid").stat().st_ino == INITIAL_PID_NAMESPACE:
                return Verdict.OK, f"pins are the host's own at {directory}, where a bpffs is or will be mounted"
        elif _same_bpffs(directory, first / "root" / directory.absolute().relative_to("/")):
            return Verdict.OK, f"{directory} is the host's bpffs: pins outlive the agent"
        else:
            return (
                Verdict.WARNING,
                f"{directory} is not the host's bpffs: pins, and with them pods' traffic, would end with the agent's"
                f" container; mount the host's {directory} there, as deploy/kubernetes/rdmanet.yaml does",
            )
    except PermissionError:
        pass
    return (
        Verdict.WARNING,
        f"it cannot be told here whether {directory} is the host's bpffs, as pins that outlive the agent need: that"
        " takes root with CAP_SYS_PTRACE, and in a container the host's process ids (hostPID, --pid host)",
    )


def _same_bpffs(ours: Path, hosts: Path) -> bool:
    if not all(path.exists() and bpf.is_bpffs(path) for path in (ours, hosts)):
        return False
    return ours.stat().st_dev == hosts.stat().st_dev


def _services(config: Config) -> Lines:
    if kernel_release() < (5, 18):
        yield Verdict.WARNING, f"Linux {platform.release()} is too old for services: 5.18 or newer is needed"
        return
    yield Verdict.OK, f"{sockets.root_cgroup(Cgroups.here().root)} takes the programs that turn services into backends"


def _artifact(config: Config) -> Lines:
    artifact = Artifact.load(config.datapath.artifact_dir)
    yield Verdict.OK, f"{config.datapath.artifact_dir} holds datapath {artifact.hash[:12]}"


def _network(config: Config) -> Lines:
    with RouteSocket.here() as route:
        uplinks = find_uplinks(config, route)
    if not uplinks:
        yield (
            Verdict.WARNING,
            "no default route: pods will reach each other and the host only; set network.uplinks or add a route",
        )
    for uplink in uplinks:
        missing = [family for family, address in (("IPv4", uplink.ipv4), ("IPv6", uplink.ipv6)) if address is None]
        if missing:
            yield (
                Verdict.WARNING,
                f"uplink {uplink.name} has no {' and no '.join(missing)} address: pods cannot leave by it",
            )
        else:
            yield Verdict.OK, f"uplink {uplink.name}: pods leave behind {uplink.ipv4} and {uplink.ipv6}"
    mtu = config.network.mtu_bytes or min((uplink.mtu_bytes for uplink in uplinks), default=1500)
    if mtu < ROCE_MTU_BYTES:
        yield (
            Verdict.WARNING,
            f"pods' MTU is {mtu}: RoCE packets carry 1024 bytes or less; network.mtu_bytes = 9000 gives 4096"
            f" between local"
            " pods and about 2.4 times the bandwidth",
        )
    else:
        yield Verdict.OK, f"pods' MTU is {mtu}: RoCE between local pods carries 4096 bytes a packet"


def _ports(config: Config) -> Lines:
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    low, high = (int(part) for part in text.split())
    first, last = config.masquerade.first_port, config.masquerade.last_port
    if config.masquerade.enabled and low <= last and first <= high:
        yield (
            Verdict.WARNING,
            f"masquerade ports {first}-{last} overlap net.ipv4.ip_local_port_range {low}-{high}; move one of them",
        )
    else:
        yield Verdict.OK, f"masquerade ports {first}-{last} are apart from the host's ephemeral {low}-{high}"


def _rdma(config: Config) -> Lines:
    if not config.rdma.enabled:
        yield Verdict.WARNING, "switched off in the configuration (rdma.enabled)"
        return
    with nldev.available() as rdma:
        if rdma is None:
            yield (
                Verdict.MISSING,
                "no RDMA subsystem in this kernel: `modprobe ib_core rdma_rxe`; cloud kernels lack it, Debian's plain"
                " linux-image-amd64 has it",
            )
            return
        mode = rdma.mode()
        devices = rdma.devices()
        if config.rdma.backend is Backend.SHARED:
            yield from _shared_device(config, mode, {device.name: rdma.port(device.index) for device in devices})
            return
    release = kernel_release()
    wanted = wanted_release(mode)
    if release < wanted:
        yield (
            Verdict.MISSING,
            f"Soft-RoCE cannot work in pods' namespaces in {mode} mode before Linux {wanted[0]}.{wanted[1]}; this is"
            f" {platform.release()}. Debian's backports have a newer kernel; or let pods share a device of the host"
            ' (rdma.backend = "shared")',
        )
    elif not _module("rdma_rxe"):
        yield Verdict.MISSING, "the module rdma_rxe is neither loaded nor installed for this kernel"
    else:
        yield Verdict.OK, f"RDMA in {mode} mode; {len(devices)} device(s) now; pods get a Soft-RoCE device each"
    if mode is RdmaMode.EXCLUSIVE and release >= wanted:
        yield (
            Verdict.WARNING,
            "in exclusive mode a Soft-RoCE device has no connection manager in pods (rdma_cm fails); leases and"
            " plain verbs"
            " work. Shared mode has both",
        )


def _shared_device(config: Config, mode: RdmaMode, ports: dict[str, nldev.Port | None]) -> Lines:
    name = config.rdma.shared_device
    port = ports.get(name)
    if mode is not RdmaMode.SHARED:
        yield (
            Verdict.MISSING,
            f'rdma.backend = "shared" needs the RDMA subsystem in shared mode, and it is in {mode} mode: boot with'
            " `rdma system set netns shared`",
        )
    elif port is None:
        others = ", ".join(sorted(ports)) or "none"
        yield Verdict.MISSING, f"rdma.shared_device names {name}, which this host does not have; it has: {others}"
    elif port.netdev is None:
        yield Verdict.MISSING, f"{name} has no netdev in the host's network namespace: pods' GIDs need one"
    elif not port.active:
        yield Verdict.WARNING, f"the port of {name} is down: bring {port.netdev} up"
    else:
        yield Verdict.OK, f"pods share {name}; their GIDs are of their addresses, lent to {port.netdev}"
    yield (
        Verdict.WARNING,
        "pods that share a device must trust each other: their packets pass no hook of rdmanet, so nothing drops"
        " unleased or revoked RDMA between them, and each may use every GID of the device. rdma_cm does not work there",
    )


def _module(name: str) -> bool:
    if Path("/sys/module", name).exists():
        return True
    directory = Path("/lib/modules", platform.release())
    for index in ("modules.dep", "modules.builtin"):
        listing = directory / index
        if listing.is_file() and f"/{name}.ko" in listing.read_text(encoding="utf-8"):
            return True
    return False


def _nodes(config: Config) -> Lines:
    if not config.rdma.enabled:
        return
    for module, what in (("ib_uverbs", "verbs for processes"), ("rdma_ucm", "rdma_cm for processes")):
        if Path("/sys/module", module).exists():
            yield Verdict.OK, f"{module} is loaded ({what})"
        elif _module(module):
            yield Verdict.WARNING, f"{module} is not loaded ({what}): `modprobe {module}`"
        else:
            yield Verdict.MISSING, f"{module} is not there for this kernel ({what})"


def _memlock(config: Config) -> Lines:
    found = list(memlock.runtimes())
    for runtime in found:
        if runtime.limit.enough:
            yield Verdict.OK, f"containers of {runtime.name} may lock {runtime.limit} ({runtime.source})"
        else:
            yield (
                Verdict.WARNING,
                f"containers of {runtime.name} may lock {runtime.limit} ({runtime.source}): RDMA programs in them fail "
                f"to register memory, or take TCP without a word; raise it: {runtime.remedy}",
            )
    own = memlock.here()
    if own.enough:
        yield Verdict.OK, f"processes started here may lock {own}"
    elif not found:
        yield (
            Verdict.WARNING,
            f"memlock is {own} here, and no container runtime runs that would say what its containers get: memory "
            "regions above that cannot be registered; raise it (`ulimit -l unlimited`, LimitMEMLOCK=infinity in the "
            "runtime's unit)",
        )


_CHECKS: tuple[tuple[str, Callable[[Config], Lines]], ...] = (
    ("privileges", _root),
    ("kernel", _bpf),
    ("pins", _pins),
    ("services", _services),
    ("artifact", _artifact),
    ("network", _network),
    ("ports", _ports),
    ("rdma", _rdma),
    ("modules", _nodes),
    ("memlock", _memlock),
)
