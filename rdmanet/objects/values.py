"""Kubernetes' objects as plain values: what of them matters to a node's network.

Field names are those of the API (core/v1, discovery.k8s.io/v1, networking.k8s.io/v1) in Python's spelling.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rdmanet.model import IPAddress, PodName

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Kind(enum.StrEnum):
    """Kinds that are understood."""

    NAMESPACE = "Namespace"
    POD = "Pod"
    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    NETWORK_POLICY = "NetworkPolicy"


class Protocol(enum.StrEnum):
    """Of ports (core/v1 Protocol)."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    @property
    def number(self) -> int:
        """The IP protocol (IANA, Protocol Numbers)."""
        return {"TCP": 6, "UDP": 17, "SCTP": 132}[self.value]


class ObjectKey(NamedTuple):
    """What names an object; the namespace is empty for a Namespace."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Namespace:
    """Labels for namespace selectors; ``kubernetes.io/metadata.name`` is always among them: the API server adds it."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A port that policies and services may name."""

    name: str
    port: int
    protocol: Protocol = Protocol.TCP


@dataclass(frozen=True, slots=True)
class Pod:
    """Labels for selectors and ports that have names; joined to attachments by its name."""

    name: PodName
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[ContainerPort, ...] = ()


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service. Which port of the backends it means is in their EndpointSlices, under the same name."""

    name: str
    protocol: Protocol
    port: int
    node_port: int | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """Addresses and ports that stand for backends. Headless ones have no cluster_ips."""

    namespace: str
    name: str
    cluster_ips: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]
    external_ips: tuple[IPAddress, ...] = ()
    affinity_s: int = 0  # sessionAffinity ClientIP and its timeoutSeconds; 0: None
    external_local: bool = False  # externalTrafficPolicy: Local
    internal_local: bool = False  # internalTrafficPolicy: Local
    publish_not_ready: bool = False


@dataclass(frozen=True, slots=True)
class EndpointPort:
    """A port of all of a slice's endpoints."""

    name: str
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One backend: its address (of the slice's family) and conditions (discovery/v1 EndpointConditions)."""

    address: IPAddress
    ready: bool = True
    serving: bool = True
    terminating: bool = False


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """Some backends of the service that the label kubernetes.io/service-name names."""

    namespace: str
    name: str
    service: str
    ports: tuple[EndpointPort, ...]
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One of matchExpressions."""

    key: str
    operator: str  # In, NotIn, Exists, DoesNotExist
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """As apimachinery's labels.Requirement does: NotIn also holds where the key is missing."""
        if self.operator == "In":
            return labels.get(self.key) in self.values
        if self.operator == "NotIn":
            return labels.get(self.key) not in self.values
        return (self.key in labels) is (self.operator == "Exists")


@dataclass(frozen=True, slots=True)
class Selector:
    """A LabelSelector; matchLabels are requirements like the others. Without any it selects everything."""

    requirements: frozenset[Requirement] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether all requirements hold."""
        return all(requirement.matches(labels) for requirement in self.requirements)


@dataclass(frozen=True, slots=True)
class IpBlock:
    """Addresses inside ``cidr`` and inside none of ``excepted``."""

    cidr: IPNetwork
    excepted: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Peer:
    """NetworkPolicyPeer: either a block, or pods: those that the selectors both select. A missing namespace selector
    means the policy's own namespace; a missing pod selector all pods of the selected namespaces."""

    pods: Selector | None = None
    namespaces: Selector | None = None
    block: IpBlock | None = None


@dataclass(frozen=True, slots=True)
class PolicyPort:
    """NetworkPolicyPort: None is every port; a text is a port's name; with ``end_port`` a range, both included."""

    protocol: Protocol = Protocol.TCP
    port: int | str | None = None
    end_port: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One ingress or egress rule; without peers everybody, without ports every port of every protocol."""

    peers: tuple[Peer, ...] = ()
    ports: tuple[PolicyPort, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """Selects pods of its namespace. None: does not select for this direction (policyTypes); an empty tuple: selects
    and allows nothing."""

    namespace: str
    name: str
    pods: Selector
    ingress: tuple[Rule, ...] | None
    egress: tuple[Rule, ...] | None


Object = Namespace | Pod | Service | EndpointSlice | NetworkPolicy
