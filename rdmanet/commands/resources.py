"""Kinds of objects as kubectl's users know them: names, short names, and the columns of tables."""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rdmanet.errors import RequestError
from rdmanet.objects.values import Kind

Row = tuple[str, ...]


class Resource(NamedTuple):
    """One kind: its names (the plural first, as in the API's paths), its API group, and its table."""

    kind: Kind
    names: tuple[str, ...]
    group: str
    headings: Row
    cells: Callable[[Mapping[str, Any]], Row]

    def shown(self, name: str) -> str:
        """As kubectl writes it: ``networkpolicy.networking.k8s.io/web``."""
        singular = self.names[1]
        return f"{singular}.{self.group}/{name}" if self.group else f"{singular}/{name}"


def _labels(document: Mapping[str, Any]) -> str:
    return _pairs(document["metadata"].get("labels"))


def _pairs(labels: Mapping[str, str] | None) -> str:
    return ",".join(f"{key}={value}" for key, value in (labels or {}).items()) or "<none>"


def _labelled(document: Mapping[str, Any]) -> Row:
    return (_labels(document),)


def _service(document: Mapping[str, Any]) -> Row:
    spec = document["spec"]
    ingress = ((document.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    external = [*(spec.get("externalIPs") or ()), *(one["ip"] for one in ingress if one.get("ip"))]
    ports = [
        f"{one['port']}{':' + str(one['nodePort']) if one.get('nodePort') else ''}/{one.get('protocol') or 'TCP'}"
        for one in spec.get("ports") or ()
    ]
    addresses = spec.get("clusterIPs") or [spec["clusterIP"]]
    return (
        spec.get("type") or "ClusterIP",
        ",".join(addresses),
        ",".join(external) or "<none>",
        ",".join(ports) or "<none>",
    )


def _slice(document: Mapping[str, Any]) -> Row:
    ports = [str(one["port"]) for one in document.get("ports") or ()]
    addresses = [address for one in document.get("endpoints") or () for address in one["addresses"]]
    more = f" + {len(addresses) - 3} more..." if len(addresses) > 3 else ""
    return (
        document["addressType"],
        ",".join(ports) or "<unset>",
        (",".join(addresses[:3]) + more) or "<unset>",
    )


def _policy(document: Mapping[str, Any]) -> Row:
    selector = document["spec"].get("podSelector") or {}
    words = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for one in selector.get("matchExpressions") or ():
        values = ",".join(one.get("values") or ())
        words.append(
            {
                "In": f"{one['key']} in ({values})",
                "NotIn": f"{one['key']} notin ({values})",
                "Exists": one["key"],
                "DoesNotExist": f"!{one['key']}",
            }[one["operator"]]
        )
    return (",".join(words) or "<none>",)


RESOURCES = {
    resource.kind: resource
    for resource in (
        Resource(Kind.NAMESPACE, ("namespaces", "namespace", "ns"), "", ("labels",), _labelled),
        Resource(Kind.POD, ("pods", "pod", "po"), "", ("labels",), _labelled),
        Resource(
            Kind.SERVICE,
            ("services", "service", "svc"),
            "",
            ("type", "cluster-ip", "external-ip", "port(s)"),
            _service,
        ),
        Resource(
            Kind.ENDPOINT_SLICE,
            ("endpointslices", "endpointslice", "eps"),
            "discovery.k8s.io",
            ("addresstype", "ports", "endpoints"),
            _slice,
        ),
        Resource(
            Kind.NETWORK_POLICY,
            ("networkpolicies", "networkpolicy", "netpol"),
            "networking.k8s.io",
            ("pod-selector",),
            _policy,
        ),
    )
}
_ALL = "all"


def resources_of(words: str) -> list[Resource]:
    """By name, short name, name with group, several with commas between, or ``all``. Raises RequestError."""
    found: list[Resource] = []
    for word in words.split(","):
        named = [one for one in RESOURCES.values() if word == _ALL or word.lower().split(".")[0] in one.names]
        if not named or ("." in word and word.lower().partition(".")[2] != named[0].group):
            known = ", ".join(f"{one.names[0]} ({one.names[2]})" for one in RESOURCES.values())
            raise RequestError(f"There are no {word!r} here; there are {known}, and all.")
        found += [one for one in named if one not in found]
    return found


def table_of(
    resource: Resource, documents: Sequence[Mapping[str, Any]], *, namespaces: bool, now_s: float
) -> tuple[Row, list[Row]]:
    """Headings and rows; with the namespace in front where asked for, and there is one."""
    namespaces = namespaces and resource.kind is not Kind.NAMESPACE
    headings = (*(("namespace",) if namespaces else ()), "name", *resource.headings, "age")
    rows = []
    for document in documents:
        metadata = document["metadata"]
        created_s = calendar.timegm(time.strptime(metadata["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ"))
        front = (metadata["namespace"],) if namespaces else ()
        rows.append((*front, metadata["name"], *resource.cells(document), age(now_s - created_s)))
    return headings, rows


def age(seconds: float) -> str:
    """As kubectl writes it (apimachinery, duration.HumanDuration): no more digits than anybody wants."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    for limit, large, unit, small, name in (
        (10 * 60, minutes, "m", whole % 60, "s"),
        (3 * 3600, minutes, "m", 0, ""),
        (8 * 3600, hours, "h", minutes % 60, "m"),
        (48 * 3600, hours, "h", 0, ""),
        (192 * 3600, days, "d", hours % 24, "h"),
        (2 * 365 * 86400, days, "d", 0, ""),
    ):
        if whole < 120:
            return f"{whole}s"
        if whole < limit:
            return f"{large}{unit}{f'{small}{name}' if small else ''}"
    return f"{days // 365}y"
