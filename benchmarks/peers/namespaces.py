"""Pairs of pods with an RDMA device each that talk over different paths: ours, routed by the host, joined by one veth.

All three are the testbed's containers on a scratch host of their own, with an rxe device each: what differs is what
lies between their interfaces. `Pair` is what a benchmark sees of them.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import KernelError, NotFoundError, UnavailableError
from rdmanet.model import address_key
from testbed.host import Host
from testbed.pod import DeviceNode, Pod, rdma_nodes

#: The interface's MTU by default: RoCE's path MTU is then 1024, on all paths.
MTU_BYTES = 1500
#: /sys/class/infiniband is the same in every namespace in the RDMA subsystem's shared mode.
SYSFS = Path("/sys/class")
#: RFC 5737 and RFC 3849.
_IPV4, _IPV6 = "198.51.100", "2001:db8:77:"


@dataclass(frozen=True, slots=True)
class End:
    """A started pod, its device, and its address by IP version."""

    pod: Pod
    device: str
    addresses: dict[int, str]

    def gid_index(self, version: int) -> int:
        """Where its device's GID table has its address; NotFoundError while it has not."""
        wanted = ipaddress.IPv6Address(address_key(self.addresses[version]))
        gids = SYSFS / "infiniband" / self.device / "ports/1/gids"
        for index in range(len(list(gids.iterdir()))):
            with contextlib.suppress(OSError):  # an empty place
                # As numbers: Python writes the end of a mapped IPv4 address with dots since 3.13, the kernel does not.
                if ipaddress.IPv6Address((gids / str(index)).read_text().strip()) == wanted:
                    return index
        raise NotFoundError(f"{self.device} has no GID {wanted}", subject=self.pod.name)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pods that can reach each other; the first begins."""

    client: End
    server: End


@contextlib.contextmanager
def agent_host(name: str, program: Sequence[str] = ("-m", "rdmanet", "agent")) -> Iterator[Host]:
    """A scratch host with an agent and its defaults; ``program`` is the agent's.

    One at a time: agents name devices by their own numbers, and in shared mode a name is the machine's.
    """
    with Host.scratch(name) as host:
        host.start_agent(program=program)
        yield host
        host.stop_agent()


@contextlib.contextmanager
def ours(host: Host, name: str, mtu_bytes: int = MTU_BYTES) -> Iterator[Pair]:
    """Two pods attached by the agent of `host`."""
    with attached(host, [f"{name}-{end}" for end in "ab"], mtu_bytes) as ends:
        yield Pair(*ends)


@contextlib.contextmanager
def attached(
    host: Host, names: Sequence[str], mtu_bytes: int = MTU_BYTES, *, more: Mapping[str, object] | None = None
) -> Iterator[list[End]]:
    """Pods of these names with an RDMA device each, attached by the agent of `host` and started; `more` is for the
    network configuration."""
    basic = {"cniVersion": "1.1.0", "name": "rdma", "type": "rdmanet", "rdma": True, "mtu": mtu_bytes}
    configuration = {**basic, **(more or {})}
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(Pod.create(host, name)) for name in names]
        for pod in pods:
            outcome = host.cni("ADD", pod, configuration)
            if outcome.returncode != 0:
                raise UnavailableError(f"ADD of {pod.name}: {outcome.sentence}")
            stack.callback(host.cni, "DEL", pod, configuration)
        attachments = {row["container_id"]: row for row in host.api("GET", "/v1/status")["attachments"]}
        ends = []
        for pod in pods:
            row = attachments[pod.container_id]
            if row["device"] is None:
                raise UnavailableError(f"{pod.name} was attached without a device", subject=pod.name)
            device = row["device"]
            pod.start(rdma_nodes(device["uverbs"], device["major"], device["minor"]))
            ends.append(End(pod, device["name"], {4: row["ipv4"], 6: row["ipv6"]}))
        # The containers end before DEL takes their interfaces.
        for pod in pods:
            stack.callback(pod.stop)
        yield ends


@contextlib.contextmanager
def routed(name: str, mtu_bytes: int = MTU_BYTES) -> Iterator[Pair]:
    """Two pods whose host routes between a veth pair each, as the reference plugin ptp sets it up (without ipMasq)."""
    with Host.scratch(name) as host, contextlib.ExitStack() as stack:
        pods = [stack.enter_context(Pod.create(host, f"{name}-{end}")) for end in "ab"]
        host.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
        for number, pod in enumerate(pods, 1):
            own, link = _addresses(number), f"{name}{number}"
            host.ip(
                f"link add {link} mtu {mtu_bytes} type veth peer name eth0 netns {pod.netns} mtu {mtu_bytes}",
                f"address add {_IPV4}.254/32 dev {link}",
                f"address add {_IPV6}:254/128 dev {link} nodad",
                f"link set {link} up",
            )
            _inside(
                pod,
                "link set lo up",
                f"address add {own[4]}/32 dev eth0",
                f"address add {own[6]}/128 dev eth0 nodad",
                "link set eth0 up",
                f"route add {_IPV4}.254/32 dev eth0",
                f"route add default via {_IPV4}.254 src {own[4]}",
                f"route add {_IPV6}:254/128 dev eth0",
                f"route add default via {_IPV6}:254 src {own[6]}",
            )
            host.ip(f"route add {own[4]}/32 dev {link}", f"route add {own[6]}/128 dev {link}")
        yield Pair(*(_started(stack, pod, _addresses(number)) for number, pod in enumerate(pods, 1)))


@contextlib.contextmanager
def one_veth(name: str, mtu_bytes: int = MTU_BYTES) -> Iterator[Pair]:
    """Two pods with one veth pair between them and nothing else: the least that a packet can cost."""
    with Host.scratch(name) as host, contextlib.ExitStack() as stack:
        pods = [stack.enter_context(Pod.create(host, f"{name}-{end}")) for end in "ab"]
        one, two = (pod.netns for pod in pods)
        host.ip(f"link add eth0 netns {one} mtu {mtu_bytes} type veth peer name eth0 netns {two} mtu {mtu_bytes}")
        for number, pod in enumerate(pods, 1):
            own = _addresses(number)
            _inside(
                pod,
                "link set lo up",
                f"address add {own[4]}/24 dev eth0",
                f"address add {own[6]}/64 dev eth0 nodad",
                "link set eth0 up",
            )
        yield Pair(*(_started(stack, pod, _addresses(number)) for number, pod in enumerate(pods, 1)))


def _addresses(number: int) -> dict[int, str]:
    return {4: f"{_IPV4}.{number}", 6: f"{_IPV6}:{number}"}


def _inside(pod: Pod, *lines: str) -> None:
    """Run ip commands in a pod that is not started yet."""
    pod.host.exec(["nsenter", f"--net={pod.netns}", "ip", "-batch", "-"], input="\n".join(lines) + "\n")


def _started(stack: contextlib.ExitStack, pod: Pod, addresses: dict[int, str]) -> End:
    """Give a pod with an interface its rxe device, and start it. The device goes before the interface."""
    device = f"rxe_{pod.name}"
    pod.host.exec(["nsenter", f"--net={pod.netns}", "rdma", "link", "add", device, "type", "rxe", "netdev", "eth0"])
    stack.callback(pod.host.exec, ["rdma", "link", "delete", device], check=False)
    pod.start(_nodes(device))
    stack.callback(pod.stop)
    return End(pod, device, addresses)


def _nodes(device: str) -> tuple[DeviceNode, ...]:
    """The nodes that a container needs for a device: its own uverbs node and rdma_cm."""
    for uverbs in (SYSFS / "infiniband_verbs").glob("uverbs*"):
        if (uverbs / "ibdev").read_text().strip() == device:
            major, minor = (uverbs / "dev").read_text().split(":")
            return rdma_nodes(uverbs.name, int(major), int(minor))
    raise KernelError("a device has no uverbs node", subject=device)
