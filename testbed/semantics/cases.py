"""A small cluster and what policies mean in it, case by case (cases.yaml): written by hand, so that the plain model and
the datapath are both held against what people say."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from rdmanet.commands.manifests import documents
from rdmanet.objects.values import Protocol
from testbed.semantics.network_policy import Flow, Judgement

TABLE = Path(__file__).with_name("cases.yaml")
FAMILIES = (4, 6)
HOST = "host"
#: Clients and servers outside: on the uplink's link, and behind it.
OUTSIDE = ("near", "far")
#: The one pod that outside can reach, through a service, and what there is of it.
PUBLIC, PUBLIC_PORT, PUBLIC_KINDS = "server", 8080, ("tcp", "udp")
DEFAULT_TRIES = "tcp/8080 udp/8080 icmp"
#: Served in every place.
PORTS = range(8079, 8085)

#: Address by place and family.
Addresses = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Place:
    """A pod: its namespace, its labels, and ports that have names; without any of these it has no object."""

    namespace: str = "default"
    labels: Mapping[str, str] | None = None
    ports: tuple[tuple[str, str, int], ...] = ()  # name, protocol, number


PODS: Mapping[str, Place] = {
    "server": Place(
        labels={"app": "server", "tier": "back"},
        ports=(("http", "TCP", 8080), ("dns", "UDP", 8081), ("admin", "TCP", 8082)),
    ),
    "client": Place(labels={"app": "client", "role": "client"}, ports=(("http", "TCP", 8081),)),
    "friend": Place(labels={"app": "friend", "role": "friend", "stage": ""}, ports=(("http", "TCP", 8082),)),
    "bare": Place(),
    "shopper": Place("shop", {"app": "client", "role": "client"}, (("http", "TCP", 8080), ("dns", "UDP", 8082))),
    "robot": Place("lab", {"app": "robot"}),
}
#: Labels of namespaces; lab has no object.
NAMESPACES: Mapping[str, Mapping[str, str]] = {"default": {"stage": "production"}, "shop": {"team": "storefront"}}


def objects() -> Iterator[dict[str, Any]]:
    """Documents of the namespaces and pods that have objects."""
    for name, labels in NAMESPACES.items():
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}}
    for name, place in PODS.items():
        if place.labels is None:
            continue
        ports = [{"name": word, "protocol": protocol, "containerPort": port} for word, protocol, port in place.ports]
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": place.namespace, "labels": dict(place.labels)},
            "spec": {"containers": [{"name": "main", "image": name, "ports": ports}]},
        }


class Try(NamedTuple):
    """What is begun: ``tcp``, ``udp`` or ``sctp`` to a port, or ``icmp``, which has none."""

    kind: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.kind}/{self.port}" if self.port else self.kind


class Attempt(NamedTuple):
    """From one place to another, by one family."""

    source: str
    target: str
    version: int
    what: Try

    def __str__(self) -> str:
        return f"{self.source} to {self.target} by IPv{self.version}, {self.what}"

    def flow(self, addresses: Addresses) -> Flow:
        """As the model has it."""
        kind = self.what.kind
        protocol = {4: 1, 6: 58}[self.version] if kind == "icmp" else Protocol(kind.upper()).number
        source, target = (ipaddress.ip_address(addresses[end][self.version]) for end in (self.source, self.target))
        return Flow(source, target, protocol, self.what.port or None)


Allowed = Mapping[str, frozenset[tuple[int, Try]]]


@dataclass(frozen=True)
class Case:
    """Policies, and who may begin a flow with whom under them."""

    name: str
    policies: tuple[Mapping[str, Any], ...]
    tries: tuple[Try, ...]
    into: Mapping[str, Allowed]
    out_of: Mapping[str, Allowed]

    def documents(self, addresses: Addresses) -> list[dict[str, Any]]:
        """The policies as NetworkPolicy objects; ``addresses`` are written where they are named."""
        known = {f"{place}{version}": text for place, own in addresses.items() for version, text in own.items()}
        found = []
        for number, policy in enumerate(self.policies):
            spec = {key: _filled(value, known) for key, value in policy.items() if key != "namespace"}
            metadata = {"name": f"policy-{number}", "namespace": policy.get("namespace", "default")}
            kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
            found.append({**kind, "metadata": metadata, "spec": spec})
        return found

    def attempts(self) -> Iterator[Attempt]:
        """Everything from everywhere to everywhere that there is a way for."""
        for source in (*PODS, HOST, *OUTSIDE):
            for target in (*PODS, HOST, *OUTSIDE):
                for what in self.tries:
                    if _there_is_a_way(source, target, what):
                        yield from (Attempt(source, target, version, what) for version in FAMILIES)

    def judgement(self, attempt: Attempt) -> Judgement:
        """What the table says."""
        source, target, version, what = attempt
        if HOST in (source, target):
            return Judgement.ALLOWED
        if source in self.out_of and (version, what) not in self.out_of[source].get(target, ()):
            return Judgement.EGRESS
        if target in self.into and (version, what) not in self.into[target].get(source, ()):
            return Judgement.INGRESS
        return Judgement.ALLOWED


def _there_is_a_way(source: str, target: str, what: Try) -> bool:
    if source == target:
        return False
    if source in OUTSIDE:
        return target == PUBLIC and what.port == PUBLIC_PORT and what.kind in PUBLIC_KINDS
    # What is translated has ports that NAT knows; and the host's own way out is not ours.
    return target not in OUTSIDE or (source in PODS and what.kind != "sctp")


def cases() -> list[Case]:
    """The table."""
    (rows,) = documents([str(TABLE)])
    assert isinstance(rows, list)
    return [_case(row) for row in rows]


def _case(row: Any) -> Case:
    tries = tuple(_try(word) for word in row.pop("tries", DEFAULT_TRIES).split())
    into, out_of = ({place: _allowed(given, tries) for place, given in row.pop(d, {}).items()} for d in DIRECTIONS)
    case = Case(row.pop("case"), tuple(row.pop("policies")), tries, into, out_of)
    assert not row, f"{case.name}: {row}"
    return case


DIRECTIONS = ("into", "out_of")


def _try(word: str) -> Try:
    kind, _, port = word.partition("/")
    return Try(kind, int(port or 0))


def _allowed(given: Mapping[str, str], tries: tuple[Try, ...]) -> Allowed:
    found = {}
    for place, words in given.items():
        assert place in PODS or place in OUTSIDE, place
        allowed = set()
        for word in words.split():
            family, _, what = word.rpartition(":")
            chosen = tries if what == "all" else (_try(what),)
            assert set(chosen) <= set(tries), word
            allowed |= {(version, one) for one in chosen for version in FAMILIES if family in ("", str(version))}
        found[place] = frozenset(allowed)
    return found


def _filled(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return Template(value).substitute(known)
    if isinstance(value, list):
        return [_filled(item, known) for item in value]
    return {key: _filled(item, known) for key, item in value.items()} if isinstance(value, dict) else value
