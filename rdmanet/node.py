"""What rdmanet does to the host once, whatever the number of pods; each effect recorded first and with an idempotent
undo.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import json
import logging
import os
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from rdmanet import alias, ipam
from rdmanet.config import Config
from rdmanet.errors import ConfigError, DamagedError, KernelError, NotFoundError, RdmanetError, UnavailableError
from rdmanet.model import GATEWAY_MAC, IPAddress
from rdmanet.netlink import messages
from rdmanet.netlink.batch import BatchSocket
from rdmanet.netlink.route import Link, RouteSocket
from rdmanet.store import Store

log = logging.getLogger(__name__)

HOST_LINK = "rdmanet0"
HOST_PEER = "rdmanet1"
FAMILIES = ("ipv4", "ipv6")
#: Names of effects on the host.
HOST_EFFECT, UPLINK_EFFECT = "host-link", "uplink:"
UPLINK_FILTER = "rdmanet/uplink"
BPF_FS_MAGIC = 0xCAFE4A11
#: In every new bpffs (kernel/bpf/inode.c, populate_bpffs).
KERNELS_OWN_PINS = ("maps.debug", "progs.debug")
#: The same on all machines (asm-generic/unistd.h); its flag from linux/mount.h.
SYS_OPEN_TREE, OPEN_TREE_CLONE, AT_FDCWD = 428, 1, -100
PROC = Path("/proc")
DEFAULT_MTU_BYTES = 1500
LOOPBACK_MTU_BYTES = 65535

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Uplink:
    """A netdev that leads outside, with the addresses that pods are masqueraded behind."""

    ifindex: int
    name: str
    mtu_bytes: int
    ipv4: IPAddress | None
    ipv6: IPAddress | None


@dataclass(frozen=True, slots=True)
class NodeNetwork:
    """What attachments need to know of the node."""

    ipv4_range: ipaddress.IPv4Network
    ipv6_range: ipaddress.IPv6Network
    mtu_bytes: int  # of pods' interfaces
    outside_mtu_bytes: int  # of the smallest uplink; the pods' default routes carry it
    host_ifindex: int  # rdmanet0
    peer_ifindex: int  # rdmanet1, whose ingress sees what the host's stack sends to pods

    @property
    def ranges(self) -> tuple[ipam.IPNetwork, ipam.IPNetwork]:
        """IPv4 before IPv6."""
        return (self.ipv4_range, self.ipv6_range)


def kernel_release() -> tuple[int, int]:
    """(major, minor) of the running kernel."""
    parts = platform.release().split(".")
    return int(parts[0]), int(parts[1].split("-")[0])


def boot_id() -> str:
    """The kernel's random number of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


# bpffs


def prepare_bpffs(directory: Path, store: Store) -> None:
    """Makes sure that ``directory`` exists inside a bpffs; mounts one on its parent where there is none."""
    parent = directory.parent
    if not _is_bpffs(parent):
        if not parent.is_dir():
            raise UnavailableError(
                f"{parent} does not exist: the kernel lacks BPF, or sysfs is not mounted. datapath.bpffs_dir must"
                f" lie directly below a"
                " directory where a bpffs can be mounted.",
                subject=str(parent),
            )
        store.record_effect("bpffs", str(parent))
        _mount_bpffs(parent)
    directory.mkdir(exist_ok=True, mode=0o700)


def _mount_bpffs(target: Path) -> None:
    if _libc.mount(b"bpf", os.fsencode(target), b"bpf", 0, b"mode=0700") != 0:
        number = ctypes.get_errno()
        raise KernelError(
            f"A bpffs cannot be mounted at {target}; the agent needs CAP_SYS_ADMIN in the host's mount namespace.",
            operation="mount",
            subject=str(target),
            errno=number,
        )


def _is_bpffs(path: Path) -> bool:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value == BPF_FS_MAGIC


def _undo_bpffs(store: Store) -> None:
    target = store.effects().get("bpffs")
    if target is None:
        return
    # Unmounting takes every pin with it, also those of somebody who began to pin there since.
    in_use = _is_bpffs(Path(target)) and any(path.name not in KERNELS_OWN_PINS for path in Path(target).iterdir())
    if _is_bpffs(Path(target)) and not in_use and _libc.umount2(os.fsencode(target), 0) != 0:
        number = ctypes.get_errno()
        in_use = number == errno.EBUSY
        if not in_use:
            raise KernelError(
                f"The bpffs at {target} cannot be unmounted.",
                operation="umount",
                subject=target,
                errno=number,
            )
    if in_use:
        log.warning("The bpffs at %s is in use by others and stays mounted.", target)
    store.forget_effect("bpffs")


# The host link


def prepare_host_link(config: Config, store: Store, route: RouteSocket) -> tuple[Link, Link]:
    """rdmanet0 and rdmanet1, up, with the gateways' addresses and the routes to the ranges. Idempotent."""
    ranges: tuple[ipam.IPNetwork, ...] = (config.network.ipv4_range, config.network.ipv6_range)
    existing = route.link(HOST_LINK)
    if existing is not None and HOST_EFFECT not in store.effects():
        raise ConfigError(
            f"A netdev {HOST_LINK} exists that this agent did not make. Where its database was lost, run"
            f" `rdmanet repair --database`; else remove it (`ip link delete {HOST_LINK}`), or run `rdmanet uninstall`"
            " with the state directory that made it.",
            subject=HOST_LINK,
        )
    _refuse_overlap(ranges, route, existing)
    if existing is None:
        store.record_effect(HOST_EFFECT, HOST_LINK)
        route.add_veth(HOST_LINK, GATEWAY_MAC, LOOPBACK_MTU_BYTES, peer_name=HOST_PEER, peer_mac=GATEWAY_MAC)
    host, peer = route.link(HOST_LINK), route.link(HOST_PEER)
    if host is None or peer is None:
        raise NotFoundError(
            f"{HOST_LINK} or {HOST_PEER} vanished while it was being set up; start the agent again.",
            subject=HOST_LINK,
        )
    for link in (peer, host):
        route.set_up(link.index, noarp=True, link_local=False)
    for network in ranges:
        gateway = ipam.gateway(network)
        route.add_address(host.index, gateway, network.max_prefixlen)
        route.add_route(network, host.index, source=gateway)
    for family in FAMILIES:
        # bpf_fib_lookup answers only for a device that forwards (net/core/filter.c, bpf_ipv4_fib_lookup).
        _write_sysctl(_forwarding(family), "1")
    return host, peer


def forwards() -> dict[str, bool]:
    """Whether the host link does, by family."""
    found = {}
    for family in FAMILIES:
        try:
            found[family] = _forwarding(family).read_text(encoding="ascii").strip() == "1"
        except OSError:
            found[family] = False
    return found


def _forwarding(family: str) -> Path:
    return Path(f"/proc/sys/net/{family}/conf/{HOST_LINK}/forwarding")


def _refuse_overlap(ranges: tuple[ipam.IPNetwork, ...], route: RouteSocket, own: Link | None) -> None:
    for destination, ifindex in route.routes():
        if own is not None and ifindex == own.index:
            continue
        for network in ranges:
            if destination.version == network.version and destination.overlaps(network):
                raise ConfigError(
                    f"network.ipv{network.version}_range {network} overlaps {destination}, which this host already"
                    f" reaches through link"
                    f" {ifindex}; configure another range.",
                    subject=str(network),
                )


def _write_sysctl(path: Path, value: str) -> None:
    try:
        try:
            path.write_text(value, encoding="ascii")
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            _write_below_mounts(path, value)
    except OSError as error:
        raise KernelError(
            f"{path} cannot be written; is IPv6 switched off on this host, or may the agent not mount (CAP_SYS_ADMIN,"
            " AppArmor)?",
            operation="sysctl",
            subject=str(path),
            errno=error.errno,
        ) from error


def _write_below_mounts(path: Path, value: str) -> None:
    """Container runtimes mount /proc/sys over itself, read-only: over a copy of /proc's own mount nothing is mounted.
    The copy is attached nowhere, and ends with its descriptor."""
    proc = _libc.syscall(SYS_OPEN_TREE, AT_FDCWD, bytes(PROC), OPEN_TREE_CLONE | os.O_CLOEXEC)
    if proc < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        file = os.open(path.relative_to(PROC), os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(file, value.encode("ascii"))
        finally:
            os.close(file)
    finally:
        os.close(proc)


def _undo_host_link(store: Store, route: RouteSocket) -> None:
    if HOST_EFFECT in store.effects():
        route.delete_link(HOST_LINK)
        store.forget_effect(HOST_EFFECT)


# Uplinks


def find_uplinks(config: Config, route: RouteSocket) -> list[Uplink]:
    """The configured uplinks, or the links with a default route. May be empty: pods then reach the host and each
    other only.
    """
    defaults = route.default_routes()
    # One by one: a host with a thousand pods has a thousand links, and pyroute2 takes 1.7 ms for each.
    if config.network.uplinks:
        named = {name: route.link(name) for name in config.network.uplinks}
        missing = [name for name, link in named.items() if link is None]
        if missing:
            raise ConfigError(
                f"network.uplinks names {', '.join(missing)}, which this host does not have; it has"
                f" {', '.join(sorted(link.name for link in route.links()))}.",
                subject=missing[0],
            )
        found_links = list(named.values())
    else:
        found_links = [route.link_at(index) for index in dict.fromkeys(default.ifindex for default in defaults)]
    chosen = [link for link in found_links if link is not None]
    uplinks = []
    for link in chosen:
        found: dict[int, IPAddress] = {}
        for default in defaults:
            if default.ifindex == link.index and default.prefsrc is not None:
                found.setdefault(default.family, default.prefsrc)
        for _, address, _ in route.addresses(link.index):
            # Pods' addresses may be lent to it (rdmanet.netlink.lent).
            ours = any(address in network for network in (config.network.ipv4_range, config.network.ipv6_range))
            if not address.is_link_local and not address.is_loopback and not ours:
                found.setdefault(address.version, address)
        uplinks.append(
            Uplink(
                ifindex=link.index,
                name=link.name,
                mtu_bytes=link.mtu_bytes,
                ipv4=found.get(4),
                ipv6=found.get(6),
            )
        )
    return uplinks


def prepare_uplink(uplink: Uplink, program: int, store: Store, route: RouteSocket) -> None:
    """Puts our filter on an uplink's ingress, beside whatever others have there."""
    effect = UPLINK_EFFECT + uplink.name
    if effect not in store.effects():
        clsact = "theirs" if "clsact" in route.qdisc_kinds(uplink.ifindex) else "ours"
        store.record_effect(effect, json.dumps({"clsact": clsact}))
    route.add_clsact(uplink.ifindex)
    route.set_ingress_filter(uplink.ifindex, program, UPLINK_FILTER)


def release_uplinks(store: Store, route: RouteSocket, kept: Collection[str] = ()) -> None:
    """Takes our filter from every link that it was put on, but for those that are ``kept``. Idempotent."""
    for effect, detail in store.effects().items():
        name = effect.removeprefix(UPLINK_EFFECT)
        if not effect.startswith(UPLINK_EFFECT) or name in kept:
            continue
        link = route.link(name)
        if link is not None:
            route.delete_ingress_filter(link.index)
            ours = json.loads(detail)["clsact"] == "ours"
            if ours and not route.has_filters(link.index):
                route.delete_clsact(link.index)
        store.forget_effect(effect)


# What the kernel keeps of it, where the database is lost


def describe_effects(store: Store) -> None:
    """Writes the effects on the host into the alias of rdmanet0, where that is there already."""
    kept = {name: detail for name, detail in store.effects().items() if name != HOST_EFFECT}
    try:
        with BatchSocket() as host:
            host.send([messages.set_alias(HOST_LINK, alias.of_effects(kept))])
    except RdmanetError as error:
        # It is needed where the database is lost, and for nothing else.
        log.warning("What was done to the host is not noted at %s: %s", HOST_LINK, error)


def refuse_lost_effects(store: Store) -> None:
    """Raises DamagedError where there is a rdmanet0 of ours that no effect speaks of: it would stay."""
    if HOST_EFFECT not in store.effects() and find_effects():
        raise DamagedError(
            f"The agent's database {store.path} has lost what was done to this host. `rdmanet repair --database` writes"
            " it from the kernel's state.",
            operation="open",
            subject=str(store.path),
        )


def find_effects() -> dict[str, str]:
    """Effects on the host as the kernel shows them, by name with details; none where there is no rdmanet0."""
    with BatchSocket() as host:
        (reply,) = host.exchange([messages.get_link(HOST_LINK)])
    if reply.errno or (link := messages.link(reply.payloads[0])).mac != GATEWAY_MAC:
        return {}
    found = {HOST_EFFECT: HOST_LINK, **alias.effects(link.alias)}
    with RouteSocket.here() as route:
        for other in route.links():
            name = UPLINK_EFFECT + other.name
            if name not in found and UPLINK_FILTER in route.ingress_filter_names(other.index):
                # Nobody knows whose the clsact is: it stays at an uninstall.
                found[name] = json.dumps({"clsact": "theirs"})
    return found


# All of it


def network(config: Config, host: Link, peer: Link, uplinks: list[Uplink]) -> NodeNetwork:
    """What attachments need to know, from what was found."""
    outside = min((uplink.mtu_bytes for uplink in uplinks), default=DEFAULT_MTU_BYTES)
    return NodeNetwork(
        ipv4_range=config.network.ipv4_range,
        ipv6_range=config.network.ipv6_range,
        mtu_bytes=config.network.mtu_bytes or outside,
        outside_mtu_bytes=outside,
        host_ifindex=host.index,
        peer_ifindex=peer.index,
    )


def undo(store: Store, remove_pins: Callable[[], None]) -> None:
    """Takes everything back: uplinks first, so that no packet meets half a datapath. Idempotent."""
    with RouteSocket.here() as route:
        release_uplinks(store, route)
        _undo_host_link(store, route)
    remove_pins()
    _undo_bpffs(store)
