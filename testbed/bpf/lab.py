"""A host, pods and a world outside in network namespaces that exist only as descriptors of this process.

Built by hand as docs/design/first-way.md says ("What is on the host"): the datapath is tested without the agent.
Nothing has a name in the file system: when the process ends, however it ends, everything is gone.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
from pyroute2 import IPRoute

from rdmanet.datapath import bpf
from rdmanet.datapath.artifact import NEWEST, Artifact
from rdmanet.datapath.compiler import HEADERS_VARIABLE, compile_datapath
from rdmanet.datapath.maps import AttachmentEntry, Datapath, EndpointEntry, NodeEntry, UplinkEntry
from rdmanet.errors import UnavailableError
from rdmanet.model import address_key
from rdmanet.netlink import namespace
from rdmanet.netlink.route import RouteSocket
from testbed import headers
from testbed.paths import BUILD, REPOSITORY

T = TypeVar("T")

GATEWAY_MAC = bytes.fromhex("02726e000001")
GATEWAYS = {4: "10.90.0.1", 6: "fd90::1"}
RANGES = {4: "10.90.0.0/24", 6: "fd90::/64"}
UPLINK = {4: "198.51.100.2", 6: "2001:db8:100::2"}
OUTSIDE = {4: "198.51.100.1", 6: "2001:db8:100::1"}  # on the uplink's link
FAR = {4: "203.0.113.1", 6: "2001:db8:200::1"}  # behind OUTSIDE, by the default route
FIRST_PORT, LAST_PORT = 61000, 61999

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on x86_64 and aarch64
_FSCONFIG_CMD_CREATE = 6
_libc = ctypes.CDLL(None, use_errno=True)


@cache
def artifact() -> Artifact:
    """The artifact of the source as it is: the one in build/ if it is newer than everything it is made from.

    Skips the test when it cannot be compiled here.
    """
    made = BUILD / "artifact" / NEWEST
    parts = [*(REPOSITORY / "bpf").iterdir(), *(REPOSITORY / "rdmanet/datapath").glob("*.py")]
    if made.exists() and made.stat().st_mtime >= max(part.stat().st_mtime for part in parts):
        return Artifact.load(made)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(HEADERS_VARIABLE, str(headers.prepare()))
            return Artifact.load(compile_datapath(BUILD / "artifact"))
    except UnavailableError as error:
        pytest.skip(str(error))


def require_root() -> None:
    """Skips the test without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root: eBPF and network namespaces")


@contextmanager
def private_bpffs() -> Iterator[Path]:
    """A bpffs of our own that is mounted nowhere (fsmount(2)) and reached through a descriptor."""

    def call(number: int, *arguments: object) -> int:
        result = int(_libc.syscall(ctypes.c_long(number), *arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), f"system call {number} for a private bpffs failed")
        return result

    context = call(_FSOPEN, b"bpf", ctypes.c_long(1))
    try:
        call(_FSCONFIG, ctypes.c_long(context), ctypes.c_long(_FSCONFIG_CMD_CREATE), None, None, ctypes.c_long(0))
        mount = call(_FSMOUNT, ctypes.c_long(context), ctypes.c_long(1), ctypes.c_long(0))
    finally:
        os.close(context)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{mount}")
    finally:
        os.close(mount)


class Namespace:
    """A network namespace without a name."""

    def __init__(self) -> None:
        made: list[int] = []

        def make() -> None:
            if _libc.unshare(namespace.CLONE_NEWNET) == 0:
                made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if not made:
            raise OSError("a network namespace cannot be made; this needs root")
        self.descriptor = made[0]
        with self.route() as route:
            loopback = route.link("lo")
            assert loopback is not None
            route.set_up(loopback.index)

    def run(self, function: Callable[[], T]) -> T:
        """Calls it in a thread inside the namespace."""
        return namespace.run_inside(self.descriptor, function)

    def route(self) -> RouteSocket:
        """rtnetlink inside, as a context manager."""
        return RouteSocket.inside(self.descriptor)

    def sysctl(self, name: str, value: str) -> None:
        """Writes below /proc/sys/net, which shows the calling thread's namespace."""
        self.run(lambda: Path("/proc/sys/net", name).write_text(value, encoding="ascii"))

    def socket(self, family: int, kind: int, protocol: int = 0, *, timeout_s: float = 10) -> socket.socket:
        """A socket of the namespace, usable from anywhere."""
        created = self.run(lambda: socket.socket(family, kind, protocol))
        created.settimeout(timeout_s)
        return created

    def close(self) -> None:
        """The namespace ends with the last socket in it."""
        os.close(self.descriptor)


@dataclass
class Pod:
    """A pod of the lab; ``addresses`` by IP version."""

    namespace: Namespace
    id: int
    ifindex: int  # the host's end
    mac: bytes
    addresses: dict[int, str]
    device: bool
    enforce: bool


@dataclass
class Lab:
    """Host, uplink and outside are there; pods are added."""

    datapath: Datapath
    artifact: Artifact
    pins: Path
    host: Namespace
    outside: Namespace
    filters: bool
    host_ifindex: int = 0
    peer_ifindex: int = 0
    uplink_ifindex: int = 0
    pods: list[Pod] = field(default_factory=list)
    maps: dict[str, int] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def build(cls, artifact: Artifact, *, filters: bool = True) -> Iterator[Lab]:
        """The whole lab, gone afterwards. Without filters the devices' own chatter is not counted anywhere."""
        with ExitStack() as stack:
            pins = stack.enter_context(private_bpffs()) / "rdmanet"
            datapath = stack.enter_context(Datapath.open(artifact, pins))
            lab = cls(datapath, artifact, pins, Namespace(), Namespace(), filters)
            stack.callback(lab._close)
            lab._build_outside()
            lab._build_host()
            yield lab

    def _close(self) -> None:
        for pod in self.pods:
            pod.namespace.close()
        self.host.close()
        self.outside.close()
        self.forget_maps()

    def forget_maps(self) -> None:
        """A swap may have made others in their place."""
        while self.maps:
            os.close(self.maps.popitem()[1])

    def map(self, name: str) -> int:
        """The descriptor of a pinned map; stays the lab's."""
        if name not in self.maps:
            descriptor = bpf.get(self.pins / name)
            assert descriptor is not None
            self.maps[name] = descriptor
        return self.maps[name]

    def host_routes(self, types: Mapping[str, Mapping[int, str]]) -> None:
        """Routes of the host that lead nowhere: type (``blackhole`` and so on) → IP version → destination."""

        def add() -> None:
            with IPRoute(use_socket=namespace.netlink_socket(socket.NETLINK_ROUTE)) as route:
                for kind, destinations in types.items():
                    for version, destination in destinations.items():
                        family = socket.AF_INET if version == 4 else socket.AF_INET6
                        route.route("add", dst=destination, type=kind, family=family)

        self.host.run(add)

    def _build_outside(self) -> None:
        with self.host.route() as route:
            route.add_veth(
                "uplink0",
                "02:72:6e:00:00:20",
                1500,
                peer_name="eth0",
                peer_mac="02:72:6e:00:00:21",
                peer_namespace=self.outside.descriptor,
            )
            self.uplink_ifindex = self._up(route, "uplink0")
            for version, address in UPLINK.items():
                route.add_address(self.uplink_ifindex, ipaddress.ip_address(address), 24 if version == 4 else 64)
        with self.outside.route() as route:
            index = self._up(route, "eth0")
            loopback = route.link("lo")
            assert loopback is not None
            for version, address in OUTSIDE.items():
                route.add_address(index, ipaddress.ip_address(address), 24 if version == 4 else 64)
            for version, address in FAR.items():
                route.add_address(loopback.index, ipaddress.ip_address(address), 32 if version == 4 else 128)
        with self.host.route() as route:
            for version, everything in ((4, "0.0.0.0/0"), (6, "::/0")):
                route.add_route(
                    ipaddress.ip_network(everything),
                    self.uplink_ifindex,
                    gateway=ipaddress.ip_address(OUTSIDE[version]),
                )

    def _build_host(self) -> None:
        mac = GATEWAY_MAC.hex(":")
        # Strict reverse path filtering is the hardest case: everything must come in where its answer goes out.
        self.host.sysctl("ipv4/conf/all/rp_filter", "1")
        with self.host.route() as route:
            route.add_veth("rdmanet0", mac, 65535, peer_name="rdmanet1", peer_mac=mac)
            self.host_ifindex = self._up(route, "rdmanet0", noarp=True)
            self.peer_ifindex = self._up(route, "rdmanet1", noarp=True)
            for version, text in RANGES.items():
                network, gateway = ipaddress.ip_network(text), ipaddress.ip_address(GATEWAYS[version])
                route.add_address(self.host_ifindex, gateway, network.max_prefixlen)
                route.add_route(network, self.host_ifindex, source=gateway)
            for index, hook in ((self.peer_ifindex, "host"), (self.uplink_ifindex, "uplink")):
                self._attach(route, index, hook)
        for family in ("ipv4", "ipv6"):
            self.host.sysctl(f"{family}/conf/rdmanet0/forwarding", "1")
        self.datapath.configure(NodeEntry(GATEWAY_MAC, self.host_ifindex, True, FIRST_PORT, LAST_PORT))
        self.datapath.set_uplink(self.uplink_ifindex, UplinkEntry(address_key(UPLINK[4]), address_key(UPLINK[6])))
        for own in (*GATEWAYS.values(), *UPLINK.values()):
            bpf.update(self.map("node_addresses"), address_key(own), struct.pack("=I", 1))

    def add_pod(self, *, device: bool = False, enforce: bool = False, mtu_bytes: int = 1500) -> Pod:
        """A pod with both families, its veth pair, filter and map entries."""
        number = len(self.pods) + 7
        inside = Namespace()
        mac = bytes.fromhex(f"02726e0001{number:02x}")
        addresses = {4: f"10.90.0.{number}", 6: f"fd90::{number:x}"}
        with self.host.route() as route:
            route.add_veth(
                f"rn-{number}",
                GATEWAY_MAC.hex(":"),
                mtu_bytes,
                peer_name="eth0",
                peer_mac=mac.hex(":"),
                peer_namespace=inside.descriptor,
            )
            ifindex = self._up(route, f"rn-{number}")
            self._attach(route, ifindex, "pod")
        with inside.route() as route:
            index = self._up(route, "eth0")
            for version, text in addresses.items():
                address, gateway = ipaddress.ip_address(text), ipaddress.ip_address(GATEWAYS[version])
                route.add_address(index, address, address.max_prefixlen)
                route.add_permanent_neighbour(index, gateway, GATEWAY_MAC.hex(":"))
                everything = ipaddress.ip_network("0.0.0.0/0" if version == 4 else "::/0")
                route.add_route(everything, index, gateway=gateway, source=address)
        pod = Pod(inside, number, ifindex, mac, addresses, device, enforce)
        self.pods.append(pod)
        self.write_entries(pod)
        return pod

    def write_entries(self, pod: Pod) -> None:
        """What the agent writes for an attachment."""
        keys = {version: address_key(text) for version, text in pod.addresses.items()}
        self.datapath.set_attachment(
            pod.ifindex,
            AttachmentEntry(pod.id, pod.mac, keys[4], keys[6], device=pod.device, enforce=pod.enforce),
        )
        for key in keys.values():
            self.datapath.set_endpoint(
                key, EndpointEntry(pod.ifindex, pod.mac, pod.id, device=pod.device, enforce=pod.enforce)
            )

    def _attach(self, route: RouteSocket, ifindex: int, hook: str) -> None:
        if self.filters:
            route.add_clsact(ifindex)
            route.set_ingress_filter(ifindex, self.datapath.dispatcher(hook), f"rdmanet/{hook}")

    @staticmethod
    def _up(route: RouteSocket, name: str, *, noarp: bool = False) -> int:
        link = route.link(name)
        assert link is not None
        route.set_up(link.index, noarp=noarp, link_local=False)
        return link.index
