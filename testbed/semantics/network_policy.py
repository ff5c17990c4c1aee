"""Who may begin a flow to whom, judged object by object (Kubernetes, Concepts, "Network Policies"; API reference,
NetworkPolicy v1 networking.k8s.io)."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rdmanet.model import IPAddress
from rdmanet.objects.values import (
    ContainerPort,
    IpBlock,
    NetworkPolicy,
    Peer,
    PolicyPort,
    Rule,
    Selector,
)


class Judgement(enum.StrEnum):
    """What becomes of a flow; the two refusals are named as the drop reasons are."""

    ALLOWED = "allowed"
    EGRESS = "policy_egress"
    INGRESS = "policy_ingress"


@dataclass(frozen=True)
class PolicyPod:
    """A pod as policies see it; labels as its namespace and it have them."""

    namespace: str
    name: str
    namespace_labels: Mapping[str, str]
    labels: Mapping[str, str]
    addresses: tuple[IPAddress, ...]
    ports: tuple[ContainerPort, ...] = ()


@dataclass(frozen=True)
class Flow:
    """The first packet of a flow: addresses as on the wire, the protocol's number, and the port that it goes to."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    port: int | None = None  # None: the protocol has none


@dataclass(frozen=True)
class PolicyWorld:
    """A node with its pods, and all policies of the cluster."""

    pods: tuple[PolicyPod, ...]
    node_addresses: frozenset[IPAddress]
    policies: tuple[NetworkPolicy, ...] = field(default=())

    def pod_of(self, address: IPAddress) -> PolicyPod | None:
        """The pod that has the address."""
        for pod in self.pods:
            if address in pod.addresses:
                return pod
        return None

    def judge(self, flow: Flow) -> Judgement:
        """Allowed, or which direction refuses; egress comes first."""
        source, destination = self.pod_of(flow.source), self.pod_of(flow.destination)
        if source is not None and source is destination:  # "A Pod cannot block access to itself"
            return Judgement.ALLOWED
        # "traffic to and from the node where a Pod is running is always allowed, regardless of the IP address"
        if flow.source in self.node_addresses or flow.destination in self.node_addresses:
            return Judgement.ALLOWED
        if source is not None and not self._egress(source, destination, flow):
            return Judgement.EGRESS
        if destination is not None and not self._ingress(source, destination, flow):
            return Judgement.INGRESS
        return Judgement.ALLOWED

    def _egress(self, pod: PolicyPod, peer: PolicyPod | None, flow: Flow) -> bool:
        isolating = [policy for policy in self._selecting(pod) if policy.egress is not None]
        return not isolating or any(
            _rule_allows(rule, policy.namespace, peer, flow.destination, peer, flow)
            for policy in isolating
            for rule in policy.egress or ()
        )

    def _ingress(self, peer: PolicyPod | None, pod: PolicyPod, flow: Flow) -> bool:
        isolating = [policy for policy in self._selecting(pod) if policy.ingress is not None]
        return not isolating or any(
            _rule_allows(rule, policy.namespace, peer, flow.source, pod, flow)
            for policy in isolating
            for rule in policy.ingress or ()
        )

    def _selecting(self, pod: PolicyPod) -> Iterable[NetworkPolicy]:
        return [p for p in self.policies if p.namespace == pod.namespace and selects(p.pods, pod.labels)]


def selects(selector: Selector, labels: Mapping[str, str]) -> bool:
    """A label selector: all requirements hold (Concepts, "Labels and Selectors": NotIn also selects where there is no
    such key)."""
    for requirement in selector.requirements:
        has = requirement.key in labels
        match requirement.operator:
            case "In":
                holds = has and labels[requirement.key] in requirement.values
            case "NotIn":
                holds = not has or labels[requirement.key] not in requirement.values
            case "Exists":
                holds = has
            case "DoesNotExist":
                holds = not has
            case other:
                raise AssertionError(f"{other} is no operator of selectors")
        if not holds:
            return False
    return True


def _rule_allows(
    rule: Rule, namespace: str, peer: PolicyPod | None, address: IPAddress, receiver: PolicyPod | None, flow: Flow
) -> bool:
    """Peers and ports both match; an empty list of either matches everything."""
    from_peer = not rule.peers or any(_peer_is(wanted, namespace, peer, address) for wanted in rule.peers)
    to_port = not rule.ports or any(_port_is(wanted, receiver, flow) for wanted in rule.ports)
    return from_peer and to_port


def _peer_is(wanted: Peer, namespace: str, peer: PolicyPod | None, address: IPAddress) -> bool:
    if wanted.block is not None:
        return _inside(wanted.block, address)
    if peer is None:
        return False
    if wanted.namespaces is None:
        if peer.namespace != namespace:
            return False
    elif not selects(wanted.namespaces, peer.namespace_labels):
        return False
    return wanted.pods is None or selects(wanted.pods, peer.labels)


def _inside(block: IpBlock, address: IPAddress) -> bool:
    # `in` is false for a network of the other family.
    return address in block.cidr and not any(address in excepted for excepted in block.excepted)


def _port_is(wanted: PolicyPort, receiver: PolicyPod | None, flow: Flow) -> bool:
    """``receiver`` is the pod whose port a name means: the one that the flow goes to."""
    if wanted.protocol.number != flow.protocol:
        return False
    if wanted.port is None:
        return True
    if isinstance(wanted.port, str):
        ports = () if receiver is None else receiver.ports
        return any((p.name, p.protocol, p.port) == (wanted.port, wanted.protocol, flow.port) for p in ports)
    assert flow.port is not None
    return wanted.port <= flow.port <= (wanted.end_port or wanted.port)
