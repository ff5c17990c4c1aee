"""Manifests as people have them, the mistakes that they make, and documents that nobody would write."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from rdmanet.commands.manifests import documents

CORPUS = Path(__file__).parent

#: What is wrong → what the sentence must say.
MISTAKES: dict[str, tuple[str, str]] = {
    "misspelt": (
        "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a},"
        " spec: {podSelector: {}, ingres: []}}",
        "NetworkPolicy a: spec.ingres: unknown, did you mean ingress?",
    ),
    "deep": (
        "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}, spec: {podSelector: {},"
        " ingress: [{from: [{podSelector: {matchLabel: {a: b}}}]}]}}",
        "spec.ingress[0].from[0].podSelector.matchLabel: unknown, did you mean matchLabels?",
    ),
    "another kind": (
        "{kind: Deployment, apiVersion: apps/v1, metadata: {name: a}}",
        'kind: is "Deployment"; it can be Namespace, Pod, Service, EndpointSlice, NetworkPolicy',
    ),
    "another version": (
        "{kind: NetworkPolicy, apiVersion: extensions/v1beta1, metadata: {name: a}}",
        'apiVersion: is "extensions/v1beta1"; of a NetworkPolicy it is networking.k8s.io/v1',
    ),
    "no name": ("{kind: Pod, apiVersion: v1, metadata: {}}", "metadata.name: is missing"),
    "name": ("{kind: Pod, apiVersion: v1, metadata: {name: Web}}", 'metadata.name: is "Web", not 1 to 253 of a-z'),
    "label": (
        "{kind: Pod, apiVersion: v1, metadata: {name: a, labels: {version: 1.10}}}",
        "metadata.labels.version: is 1.1, not text: put it in quotes",
    ),
    "host network": (
        "{kind: Pod, apiVersion: v1, metadata: {name: a}, spec: {hostNetwork: true}}",
        "spec.hostNetwork: not supported: a pod in the host's network has no attachment",
    ),
    "host port": (
        "{kind: Pod, apiVersion: v1, metadata: {name: a},"
        " spec: {containers: [{name: a, ports: [{containerPort: 1, hostPort: 2}]}]}}",
        "spec.containers[0].ports[0].hostPort: not supported: chain the portmap plugin",
    ),
    "external name": (
        "{kind: Service, apiVersion: v1, metadata: {name: a}, spec: {type: ExternalName, externalName: b.example}}",
        "spec.externalName: not supported: it is a DNS name's alias",
    ),
    "no address": (
        "{kind: Service, apiVersion: v1, metadata: {name: a}, spec: {ports: [{port: 80}]}}",
        "spec.clusterIP: is missing: Kubernetes would choose an address, here write one, or None",
    ),
    "no node port": (
        "{kind: Service, apiVersion: v1, metadata: {name: a},"
        " spec: {type: NodePort, clusterIP: 10.96.0.1, ports: [{port: 80}]}}",
        "spec.ports[0].nodePort: is missing",
    ),
    "health check": (
        "{kind: Service, apiVersion: v1, metadata: {name: a},"
        " spec: {clusterIP: 10.96.0.1, healthCheckNodePort: 30000, ports: [{port: 80}]}}",
        "spec.healthCheckNodePort: not supported: nobody would answer health checks there",
    ),
    "two families": (
        "{kind: Service, apiVersion: v1, metadata: {name: a},"
        " spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 10.96.0.2], ports: [{port: 80}]}}",
        "spec.clusterIPs: are both IPv4; one of each family at most",
    ),
    "whose slice": (
        "{kind: EndpointSlice, apiVersion: discovery.k8s.io/v1, metadata: {name: a}, addressType: IPv4, endpoints: []}",
        "metadata.labels: need kubernetes.io/service-name",
    ),
    "slice's family": (
        "{kind: EndpointSlice, apiVersion: discovery.k8s.io/v1, addressType: IPv6, ports: [{port: 80}],"
        " metadata: {name: a, labels: {kubernetes.io/service-name: a}}, endpoints: [{addresses: [10.0.0.1]}]}",
        "endpoints[0].addresses[0]: is 10.0.0.1, and the slice's addressType IPv6",
    ),
    "except": (
        "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}, spec: {podSelector: {},"
        " egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [192.168.0.0/16]}}]}]}}",
        "spec.egress[0].to[0].ipBlock.except[0]: is 192.168.0.0/16, which is not a smaller part of 10.0.0.0/8",
    ),
    "range": (
        "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}, spec: {podSelector: {},"
        " ingress: [{ports: [{port: 90, endPort: 80}]}]}}",
        "spec.ingress[0].ports[0].endPort: is 80, less than port, 90",
    ),
    "policy types": (
        "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}, spec: {podSelector: {},"
        " policyTypes: [Ingress, Egress, Egress]}}",
        "spec.policyTypes: has 3 entries; 2 at most are taken",
    ),
    "empty peer": (
        "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}, spec: {podSelector: {},"
        " ingress: [{from: [{}]}]}}",
        "spec.ingress[0].from[0]: is empty; it needs podSelector, namespaceSelector or ipBlock",
    ),
    "twice": ("{kind: Pod, kind: Pod, apiVersion: v1, metadata: {name: a}}", 'the key \'kind\' is there twice'),
    "indentation": ("kind: Pod\n metadata: {}\n", "mapping values are not allowed in this context"),
    "tag": ("!!python/object:os.system {}", "means nothing here"),
    "aliases": (
        "\n".join(["a0: &a0 [0]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))]),
        "aliases stand for more than 1000000 values",
    ),
}  # fmt: skip


def corpus() -> list[Any]:
    """Every document of the manifests beside this module."""
    return [document for document in documents([str(CORPUS)]) if document is not None]


#: Mappings whose keys are people's own, and fields that do not concern the network: what is in them is not looked at.
_UNREAD = re.compile(
    r"metadata\.(labels|annotations|ownerReferences)|.*\.matchLabels|spec\.selector|endpoints\[\d+\]\.targetRef"
    r"|spec\.(affinity|securityContext|tolerations|topologySpreadConstraints|volumes)|status"
    r"|spec\.(initContainers|containers)\[\d+\]\.(env|livenessProbe|readinessProbe|resources|securityContext|volumeMounts)"
)


def intruded(document: Any) -> Iterator[tuple[Any, str]]:
    """Copies of an object, each with an unknown field in another one of its mappings, and the field's path."""
    for place in _mappings(document, ""):
        found = copy.deepcopy(document)
        _mappings(found, "")[place]["intruder"] = {"a": 1}
        yield found, f"{place}.intruder".lstrip(".")


def _mappings(value: Any, path: str) -> dict[str, Any]:
    """By path, those that are looked at."""
    if _UNREAD.match(path):
        return {}
    found = {path: value} if isinstance(value, dict) else {}
    if isinstance(value, dict):
        for key, item in value.items():
            found |= _mappings(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            found |= _mappings(item, f"{path}[{number}]")
    return found


_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 65536, 1 << 80, 1.5, "", "a", "Ä", "\ud800", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0",
    "10.0.0.0/33", "0/0", [], {}, [None], {"": ""}, [[]], "x" * 300,
)  # fmt: skip


def spoilt(document: Any, random: Random) -> Any:
    """A copy with one to three changes anywhere in it: something left out, strange, elsewhere, twice or misspelt."""
    found = copy.deepcopy(document)
    for _ in range(random.randint(1, 3)):
        places = list(_places(found))
        if not places:
            break
        inside, key = random.choice(places)
        _spoil(inside, key, random)
    return found


def _places(value: Any) -> Any:
    """Every (collection, key or index) in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _spoil(inside: Any, key: Any, random: Random) -> None:
    what = random.randrange(5)
    if what == 0:
        del inside[key]
    elif what == 1 and isinstance(inside, dict):
        word = str(key)
        inside[word[:1] + word[2:] + random.choice(("", "x"))] = inside.pop(key)
    elif what == 2:
        inside[key] = [copy.deepcopy(inside[key])] * random.randint(1, 3)
    elif what == 3:
        inside[key] = {str(random.choice(_STRANGE)): inside[key]}
    else:
        inside[key] = copy.deepcopy(random.choice(_STRANGE))
