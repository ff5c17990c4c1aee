"""Services as kube-proxy brings them to the kernel: as rules of iptables, or as virtual servers of IPVS.

Rules in the words and the order of pkg/proxy/iptables/proxier.go (Kubernetes 1.30), chains named by the same hash.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.peers.paths import RANGES
from rdmanet.errors import UnavailableError
from rdmanet.model import IPAddress
from testbed.host import Host

FAMILIES = {"ipv4": 4, "ipv6": 6}
PORT, TARGET_PORT = 80, 8080
#: The service that is called; its neighbours' addresses follow, and their backends', which nobody calls.
CALLED = {"ipv4": "10.96.0.10", "ipv6": "fd96::10"}
_NEIGHBOURS = {"ipv4": "10.100.0.0", "ipv6": "fd96::1:0"}
_BACKENDS = {"ipv4": "10.128.0.0", "ipv6": "fd80::1:0"}
#: largeClusterEndpointsThreshold: with more endpoints rules have no comments.
_COMMENTED_ENDPOINTS = 1000
_MASQUERADE_MARK = "0x4000/0x4000"
LOAD_TIMEOUT_S = 1500.0


@dataclass(frozen=True, slots=True)
class Listed:
    """A service of one TCP port with one backend."""

    name: str
    address: IPAddress
    backend: IPAddress


def listed(count: int, family: str, server: str) -> list[Listed]:
    """So many services; the called one, whose backend is ``server``, in the middle. kube-proxy writes them in no order:
    half of all rules come before one's own on average."""
    first, first_backend = (ipaddress.ip_address(base[family]) for base in (_NEIGHBOURS, _BACKENDS))
    neighbours = [Listed(f"s{n}", first + n, first_backend + n) for n in range(count - 1)]
    called = Listed("called", ipaddress.ip_address(CALLED[family]), ipaddress.ip_address(server))
    middle = (count - 1) // 2
    return [*neighbours[:middle], called, *neighbours[middle:]]


def chain(kind: str, *words: str) -> str:
    """The name of a service's chain (servicePortChainName), or of its endpoint's."""
    return f"KUBE-{kind}-{base64.b32encode(hashlib.sha256(''.join(words).encode()).digest())[:16].decode()}"


def iptables_rules(services: Sequence[Listed], family: str) -> str:
    """For iptables-restore or ip6tables-restore: the whole nat and filter tables of a node."""
    pods = next(one for one in RANGES if ipaddress.ip_network(one).version == FAMILIES[family])
    bits = 32 if family == "ipv4" else 128
    commented = len(services) <= _COMMENTED_ENDPOINTS
    chains, portals, rules = [], [], []
    for service in services:
        name = f"default/{service.name}:http"
        host = str(service.backend) if family == "ipv4" else f"[{service.backend}]"
        end = f"{host}:{TARGET_PORT}"
        own, endpoint = chain("SVC", name, "tcp"), chain("SEP", name, "tcp", end)

        def comment(text: str) -> str:
            return f'-m comment --comment "{text}" ' if commented else ""

        said = comment(f"{name} cluster IP")
        match = f"{said}-m tcp -p tcp -d {service.address}/{bits} --dport {PORT}"
        chains += [f":{own} - [0:0]", f":{endpoint} - [0:0]"]
        portals.append(f"-A KUBE-SERVICES {match} -j {own}")
        rules += [
            f"-A {own} {match} ! -s {pods} -j KUBE-MARK-MASQ",
            f"-A {own} {comment(f'{name} -> {end}')}-j {endpoint}",
            f"-A {endpoint} {comment(name)}-s {service.backend}/{bits} -j KUBE-MARK-MASQ",
            f"-A {endpoint} {comment(name)}-m tcp -p tcp -j DNAT --to-destination {end}",
        ]
    return "\n".join([*_nat(chains, portals, rules), *_FILTER, ""])


def _nat(chains: list[str], portals: list[str], rules: list[str]) -> Iterator[str]:
    yield "*nat"
    yield from (f":{name} ACCEPT [0:0]" for name in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"))
    yield from (f":KUBE-{name} - [0:0]" for name in ("SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ"))
    yield from chains
    for hook in ("PREROUTING", "OUTPUT"):
        yield f'-A {hook} -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
    yield '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING'
    yield f"-A KUBE-POSTROUTING -m mark ! --mark {_MASQUERADE_MARK} -j RETURN"
    yield "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000"
    said = "kubernetes service traffic requiring SNAT"
    yield f'-A KUBE-POSTROUTING -m comment --comment "{said}" -j MASQUERADE --random-fully'
    yield "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000"
    yield from portals
    yield from rules
    said = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
    yield f'-A KUBE-SERVICES -m comment --comment "{said}" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS'
    yield "COMMIT"


_NEW = "-m conntrack --ctstate NEW"
#: Every service has an endpoint: nothing is refused here.
_FILTER = (
    "*filter",
    *(f":{name} ACCEPT [0:0]" for name in ("INPUT", "FORWARD", "OUTPUT")),
    *(f":KUBE-{n} - [0:0]" for n in ("SERVICES", "EXTERNAL-SERVICES", "FORWARD", "NODEPORTS", "PROXY-FIREWALL")),
    '-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS',
    *(
        f'-A {hook} {_NEW} -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL'
        for hook in ("INPUT", "FORWARD", "OUTPUT")
    ),
    '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    *(
        f'-A {hook} {_NEW} -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
        for hook in ("FORWARD", "OUTPUT")
    ),
    *(
        f'-A {hook} {_NEW} -m comment --comment "kubernetes externally-visible service portals"'
        " -j KUBE-EXTERNAL-SERVICES"
        for hook in ("INPUT", "FORWARD")
    ),
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    f'-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark {_MASQUERADE_MARK} -j ACCEPT',
    '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule"'
    " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "COMMIT",
)


def load_iptables(host: Host, services: Sequence[Listed], family: str) -> None:
    """In place of all rules of the family that the host has."""
    command = "iptables-restore" if family == "ipv4" else "ip6tables-restore"
    host.exec([command], input=iptables_rules(services, family), timeout_s=LOAD_TIMEOUT_S)


def why_no_ipvs(host: Host) -> str:
    """What IPVS lacks here, or an empty string."""
    host.exec(["modprobe", "ip_vs_rr"], check=False)
    return "" if host.path("/proc/net/ip_vs").exists() else "the kernel has no IPVS (CONFIG_IP_VS)"


def prepare_ipvs(host: Host) -> None:
    """kube-proxy's settings and its interface, which makes the services' addresses the host's own."""
    if why := why_no_ipvs(host):
        raise UnavailableError(why, subject="ip_vs")
    settings = ("conntrack=1", "conn_reuse_mode=0", "expire_nodest_conn=1", "expire_quiescent_template=1")
    host.exec(["sysctl", "-qw", *(f"net.ipv4.vs.{setting}" for setting in settings)])
    host.ip("link add kube-ipvs0 type dummy", "link set kube-ipvs0 arp off")


def load_ipvs(host: Host, services: Sequence[Listed], family: str) -> None:
    """Beside what the host has: virtual servers with masquerading, round robin. kube-proxy's ipsets and its few rules
    about them are left out: less than a node has."""
    bits = 32 if family == "ipv4" else 128
    addresses = [f"address add {service.address}/{bits} dev kube-ipvs0 nodad" for service in services]
    host.exec(["ip", "-force", "-batch", "-"], input="\n".join(addresses) + "\n", timeout_s=LOAD_TIMEOUT_S)

    def end(address: IPAddress, port: int) -> str:
        return f"{address}:{port}" if family == "ipv4" else f"[{address}]:{port}"

    lines = []
    for service in services:
        virtual = end(service.address, PORT)
        lines += [f"-A -t {virtual} -s rr", f"-a -t {virtual} -r {end(service.backend, TARGET_PORT)} -m"]
    host.exec(["ipvsadm", "--restore"], input="\n".join(lines) + "\n", timeout_s=LOAD_TIMEOUT_S)
