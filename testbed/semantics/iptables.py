"""Policies and services as rules of iptables, written the way that policy controllers and kube-proxy write them.

Texts for iptables-restore and ip6tables-restore. Which pods a selector means is decided when the rules are written, as
controllers do; what a packet meets is the kernel's business alone.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rdmanet.model import IPAddress
from rdmanet.objects.values import IpBlock, IPNetwork, NetworkPolicy, Peer, Protocol, Rule
from testbed.semantics.network_policy import PolicyPod, PolicyWorld, selects
from testbed.semantics.service import Asker, ServiceWorld

#: A protocol for experiments (RFC 3692) that always passes: those who count know by it that nothing more comes.
FENCE_PROTOCOL = 253
ALLOWED_MARK = "0x1/0x1"


@dataclass(frozen=True)
class Match:
    """The peer's address in one rule: inside a network, and in none of those excepted."""

    network: IPNetwork
    excepted: tuple[IPNetwork, ...] = ()
    receiver: PolicyPod | None = None  # whose ports names mean


class PolicyTable:
    """The filter table of a router between the pods: for each pod a chain of what it may begin and one of what may
    begin with it. Both must say yes; each policy's rules set a mark, and what has none at the chain's end is dropped.
    What a pod sends to the node comes to INPUT, and what the node sends leaves by OUTPUT: never judged."""

    def __init__(self, world: PolicyWorld, version: int):
        self._world = world
        self._version = version
        self._chains: list[str] = []
        self._rules = [f"-A FORWARD -p {FENCE_PROTOCOL} -j ACCEPT"]
        for direction, side in (("EGRESS", "-s"), ("INGRESS", "-d")):
            for number, pod in enumerate(world.pods):
                for address in _of(pod.addresses, version):
                    self._rules.append(f"-A FORWARD {side} {address} -j POD-{number}-{direction}")
        self._rules.append("-A FORWARD -j ACCEPT")
        for number, pod in enumerate(world.pods):
            own = [p for p in world.policies if p.namespace == pod.namespace and selects(p.pods, pod.labels)]
            self._judge(f"POD-{number}-EGRESS", pod, [(p, p.egress) for p in own if p.egress is not None], "-d")
            self._judge(f"POD-{number}-INGRESS", pod, [(p, p.ingress) for p in own if p.ingress is not None], "-s")

    def text(self) -> str:
        """For iptables-restore."""
        head = ["*filter", ":INPUT ACCEPT [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT ACCEPT [0:0]"]
        return "\n".join([*head, *self._chains, *self._rules, "COMMIT", ""])

    def _chain(self, name: str) -> str:
        self._chains.append(f":{name} - [0:0]")
        return name

    def _judge(
        self, chain: str, pod: PolicyPod, isolating: Sequence[tuple[NetworkPolicy, tuple[Rule, ...]]], side: str
    ) -> None:
        self._chain(chain)
        if not isolating:
            return
        self._rules.append(f"-A {chain} -j MARK --set-xmark 0x0/0x1")
        for place, (policy, rules) in enumerate(isolating):
            name = self._chain(f"{chain}-{place}")
            self._rules.append(f"-A {chain} -j {name}")
            for rule in rules:
                for match in self._matches(policy.namespace, rule, pod if side == "-s" else None):
                    for port in _ports(rule, match.receiver):
                        self._allow(name, side, match, port)
        self._rules.append(f"-A {chain} -m mark ! --mark {ALLOWED_MARK} -j DROP")

    def _allow(self, chain: str, side: str, match: Match, port: str) -> None:
        allow = f"MARK --set-xmark {ALLOWED_MARK}"
        if not match.excepted:
            self._rules.append(f"-A {chain} {side} {match.network} {port} -j {allow}")
            return
        name = self._chain(f"BLOCK-{len(self._chains)}")
        self._rules.append(f"-A {chain} {side} {match.network} {port} -j {name}")
        self._rules += [f"-A {name} {side} {each} -j RETURN" for each in match.excepted]
        self._rules.append(f"-A {name} -j {allow}")

    def _matches(self, namespace: str, rule: Rule, receiver: PolicyPod | None) -> Iterable[Match]:
        """``receiver``: of ingress rules the pod itself; names in egress rules mean each peer's own ports."""
        everything = ipaddress.ip_network("0.0.0.0/0" if self._version == 4 else "::/0")
        named = receiver is None and any(isinstance(port.port, str) for port in rule.ports)
        for peer in rule.peers or (Peer(block=IpBlock(everything)),):
            block = peer.block
            if block is not None and block.cidr.version == self._version:
                yield Match(block.cidr, block.excepted, receiver)
            if block is not None and not named:
                continue
            for other in self._world.pods:
                if block is None and not _selected(peer, namespace, other):
                    continue
                for address in _of(other.addresses, self._version):
                    if block is None or (address in block.cidr and not any(address in e for e in block.excepted)):
                        yield Match(ipaddress.ip_network(address), (), receiver or other)


def _selected(peer: Peer, namespace: str, pod: PolicyPod) -> bool:
    inside = pod.namespace == namespace if peer.namespaces is None else selects(peer.namespaces, pod.namespace_labels)
    return inside and (peer.pods is None or selects(peer.pods, pod.labels))


def _ports(rule: Rule, receiver: PolicyPod | None) -> Iterable[str]:
    if not rule.ports:
        yield ""
    for port in rule.ports:
        protocol = port.protocol.value.lower()
        if port.port is None:
            yield f"-p {protocol}"
        elif isinstance(port.port, int):
            yield f"-p {protocol} --dport {port.port}:{port.end_port or port.port}"
        elif receiver is not None:
            for own in receiver.ports:
                if (own.name, own.protocol) == (port.port, port.protocol):
                    yield f"-p {protocol} --dport {own.port}"


def _of(addresses: Iterable[IPAddress], version: int) -> list[IPAddress]:
    return [address for address in addresses if address.version == version]


def service_rules(world: ServiceWorld, version: int) -> str:
    """The nat and filter tables of a node, as kube-proxy writes them: KUBE-SERVICES finds the service, its chain one of
    its endpoints at random, each endpoint's chain rewrites; a service without endpoints is refused in filter."""
    chains, services, per_service, refused = [], [], [], []
    number = 0
    for service in world.services:
        for port in service.ports:
            if port.protocol is Protocol.SCTP:
                continue
            for address in _of((*service.cluster_ips, *service.external_ips), version):
                backends = world.backends(Asker.INSIDE, address, port.protocol, port.port)
                match = f"-d {address} -p {port.protocol.value.lower()} --dport {port.port}"
                if not backends:
                    refused.append(f"-A KUBE-SERVICES {match} -j REJECT")
                    continue
                number += 1
                chains.append(f":KUBE-SVC-{number} - [0:0]")
                services.append(f"-A KUBE-SERVICES {match} -j KUBE-SVC-{number}")
                ordered = sorted(backends, key=str)
                for place, backend in enumerate(ordered):
                    name = f"KUBE-SEP-{number}-{place}"
                    left = len(ordered) - place
                    chance = f"-m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
                    host = f"[{backend.address}]" if version == 6 else str(backend.address)
                    chains.append(f":{name} - [0:0]")
                    per_service.append(f"-A KUBE-SVC-{number} {chance} -j {name}")
                    per_service.append(
                        f"-A {name} -p {port.protocol.value.lower()} -j DNAT --to-destination {host}:{backend.port}"
                    )
    nat = ["*nat", ":OUTPUT ACCEPT [0:0]", ":KUBE-SERVICES - [0:0]", *chains]
    nat += ["-A OUTPUT -j KUBE-SERVICES", *services, *per_service, "COMMIT"]
    filters = ["*filter", ":OUTPUT ACCEPT [0:0]", ":KUBE-SERVICES - [0:0]", "-A OUTPUT -j KUBE-SERVICES"]
    return "\n".join([*nat, *filters, *refused, "COMMIT", ""])
