"""Ways from one network namespace to another on the same host, each on a scratch host of its own.

A host of its own, because one contender's rules (masquerading brings connection tracking) must not meet another's
packets.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.question import OURS
from rdmanet.errors import UnavailableError
from testbed.host import CniOutcome, Host
from testbed.paths import BUILD, REPOSITORY
from testbed.pod import Pod

NETLOAD = BUILD / "bench" / "netload"
REFERENCE_PLUGINS = Path("/usr/lib/cni")
NETWORK = {"cniVersion": "1.0.0", "name": "net", "type": "rdmanet"}
#: For the reference plugins' pods; as large as ours.
RANGES = ("10.214.0.0/20", "fd72:646d:6170::/64")
NETLOAD_TIMEOUT_S = 400.0


@dataclass(frozen=True)
class Way:
    """Where a server and its client are, as paths of network namespaces on ``host``; the server's address by family."""

    host: Host
    server: str
    client: str
    addresses: Mapping[str, str]

    def load(
        self, work: str, family: str, warmup: int, count: int, *, port: int = 0, service: tuple[str, int] | None = None
    ) -> float:
        """One run of netload (benchmarks/netload.c): nanoseconds for each transaction, or KiB of a stream.

        With ``service`` the client calls that address and port, and the server answers at ``port``. CommandError with
        the program's words when it fails.
        """
        argv = [str(NETLOAD), work, self.server, self.client, self.addresses[family], str(warmup), str(count)]
        if service is not None:
            argv += [str(port), service[0], str(service[1])]
        return float(self.host.exec(argv, timeout_s=NETLOAD_TIMEOUT_S).stdout)


def make_netload() -> None:
    """Compiles the load program where its source is newer; UnavailableError where that fails."""
    argv = ["make", "-s", "-C", str(REPOSITORY / "benchmarks"), f"OUT={NETLOAD.parent}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UnavailableError(f"benchmarks/netload.c does not compile: {done.stderr[-500:]}", operation="make")


@dataclass
class Attacher:
    """A scratch host on which a CNI plugin attaches pods."""

    host: Host
    plugin: Path | None  # None: ours
    conf: Mapping[str, Any]

    def add(self, name: str) -> tuple[Pod, Mapping[str, str]]:
        """A pod as a runtime makes it (namespace, then ADD) and its address by family."""
        pod = Pod.create(self.host, name)
        outcome = self.host.cni("ADD", pod, self.conf) if self.plugin is None else self._reference(pod)
        if outcome.returncode or outcome.output is None:
            raise UnavailableError(f"ADD failed: {outcome.sentence or outcome.stderr}", subject=name)
        addresses = [entry["address"].split("/")[0] for entry in outcome.output["ips"]]
        return pod, {"ipv6" if ":" in address else "ipv4": address for address in addresses}

    def _reference(self, pod: Pod) -> CniOutcome:
        assert self.plugin is not None
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_PATH": str(REFERENCE_PLUGINS),
            "CNI_CONTAINERID": pod.container_id,
            "CNI_NETNS": pod.netns,
            "CNI_IFNAME": pod.ifname,
        }
        done = self.host.exec([str(self.plugin)], input=json.dumps(self.conf), environment=environment, check=False)
        output = json.loads(done.stdout) if done.stdout.strip() else None
        return CniOutcome("ADD", done.returncode or 0, output, done.stderr, done.elapsed_s)

    def way(self) -> Way:
        """Between two new pods."""
        server, addresses = self.add("server")
        client, _ = self.add("client")
        return Way(self.host, server.netns, client.netns, addresses)


@contextlib.contextmanager
def loopback() -> Iterator[Way]:
    """Server and client in one namespace: what the stack costs without any network between."""
    with Host.scratch("loopback") as host:
        path = host.create_netns("pod")
        host.exec(["nsenter", f"--net={path}", "ip", "link", "set", "lo", "up"])
        yield Way(host, path, path, {"ipv4": "127.0.0.1", "ipv6": "::1"})
        host.delete_netns(path)


@contextlib.contextmanager
def veth() -> Iterator[Way]:
    """Two namespaces joined by one veth pair: what is left where nothing routes, switches, counts or forbids."""
    addresses = {"server": ("10.214.16.1", "fd72:646d:6171::1"), "client": ("10.214.16.2", "fd72:646d:6171::2")}
    macs = {"server": "02:72:6d:00:00:01", "client": "02:72:6d:00:00:02"}
    with Host.scratch("veth") as host:
        paths = {name: host.create_netns(name) for name in addresses}
        host.ip(
            f"link add eth0 netns {paths['server']} address {macs['server']} type veth"
            f" peer name eth0 netns {paths['client']} address {macs['client']}"
        )
        for name, other in (("server", "client"), ("client", "server")):
            lines = ["link set lo up"]
            lines += [f"address add {a}/{64 if ':' in a else 30} dev eth0 nodad" for a in addresses[name]]
            lines += ["link set eth0 up"]
            lines += [f"neighbour replace {a} lladdr {macs[other]} dev eth0 nud permanent" for a in addresses[other]]
            host.exec(["nsenter", f"--net={paths[name]}", "ip", "-batch", "-"], input="\n".join(lines) + "\n")
        ipv4, ipv6 = addresses["server"]
        yield Way(host, paths["server"], paths["client"], {"ipv4": ipv4, "ipv6": ipv6})
        for path in paths.values():
            host.delete_netns(path)


@contextlib.contextmanager
def rdmanet(name: str = OURS) -> Iterator[Attacher]:
    """A real agent, which real ADDs go to."""
    with Host.scratch(name) as host:
        host.start_agent()
        yield Attacher(host, None, NETWORK)


@contextlib.contextmanager
def reference(name: str, kind: str, **conf: Any) -> Iterator[Attacher]:
    """A reference plugin (ptp: routed veth pairs; bridge) with host-local addresses of both families."""
    plugin = REFERENCE_PLUGINS / kind
    if not plugin.exists():
        raise UnavailableError(f"{plugin} is missing: apt-get install containernetworking-plugins")
    ipam = {
        "type": "host-local",
        "dataDir": "/run/cni-networks",
        "ranges": [[{"subnet": subnet}] for subnet in RANGES],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    with Host.scratch(name.replace("+", "-")) as host:
        yield Attacher(host, plugin, {"cniVersion": "1.0.0", "name": "net", "type": kind, "ipam": ipam, **conf})


@contextlib.contextmanager
def ptp(masquerade: bool = False) -> Iterator[Way]:
    """Routed veth pairs, as the reference plugin ptp makes them; with ``masquerade`` its iptables rules too."""
    with reference("ptp+ipMasq" if masquerade else "ptp", "ptp", ipMasq=masquerade) as attacher:
        yield attacher.way()


@contextlib.contextmanager
def bridge() -> Iterator[Way]:
    """veth pairs on a bridge that is the pods' gateway, as the reference plugin bridge makes them."""
    with reference("bridge", "bridge", bridge="cni0", isGateway=True) as attacher:
        yield attacher.way()


#: Contender → how to make its way.
PEERS: Mapping[str, Callable[[], AbstractContextManager[Way]]] = {
    "loopback": loopback,
    "veth": veth,
    "ptp": ptp,
    "ptp+ipMasq": functools.partial(ptp, masquerade=True),
    "bridge": bridge,
}
