"""Row `scale`: 50,000 services and 10,000 rules: seconds until the kernel has them, milliseconds for a change of one.

Services go from parsed objects into the kernel's maps through the engine that the agent has; reading the documents is
told beside. Rules go the whole way, through the agent's socket into the maps of a pod that they select.
"""

from __future__ import annotations

import ipaddress
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rdmanet.config import Config
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from rdmanet.model import address_key
from rdmanet.objects.changes import Changes
from rdmanet.objects.reading import read
from rdmanet.objects.values import Object, ObjectKey
from rdmanet.services.engine import Services
from testbed.bpf.lab import private_bpffs
from testbed.host import ARTIFACT
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.services import Scene

SERVICES = 50_000
ENDPOINTS = 2
RULES, POLICIES = 10_000, 100
UPDATES = 20
APPLY_GOAL_S, UPDATE_GOAL_MS = 5.0, 50.0

Document = dict[str, Any]


def _slice(number: int, first: int = 0) -> Document:
    pods = [str(ipaddress.IPv4Address((10 << 24) + number * ENDPOINTS + first + index)) for index in range(ENDPOINTS)]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"s{number}-1", "labels": {"kubernetes.io/service-name": f"s{number}"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [pod], "conditions": {"ready": True}} for pod in pods],
    }


def _documents() -> Iterator[Document]:
    for number in range(SERVICES):
        yield {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"s{number}"},
            "spec": {
                "clusterIP": str(ipaddress.IPv4Address("172.16.0.1") + number),
                "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
            },
        }
        yield _slice(number)


def _services() -> dict[str, float]:
    config = Config()
    documents = list(_documents())
    begun = time.monotonic()
    objects: dict[ObjectKey, Object] = {one.key: one.value for one in map(read, documents)}
    reading_s = time.monotonic() - begun
    say(f"{SERVICES} services read: {reading_s:.1f} s")
    with (
        private_bpffs() as directory,
        Datapath.open(Artifact.load(ARTIFACT), directory / "rdmanet", config.map_sizes()) as datapath,
    ):
        services = Services(datapath.services(), config.services.maglev_size, [], lambda gone: None)

        def change(changed: Mapping[ObjectKey, Object]) -> float:
            begun = time.monotonic()
            changes = Changes(changed, {}, objects)
            services.check(changes)
            services.objects_changed(changes)
            return time.monotonic() - begun

        applying_s = change(objects)
        need(services.status()["services"] == SERVICES, f"{services.status()} and not {SERVICES}")
        updates = []
        for turn in range(UPDATES):
            one = read(_slice(turn * 1000 + 7, first=500_000))
            objects[one.key] = one.value
            updates.append(change({one.key: one.value}) * 1000)
        moved = address_key(ipaddress.IPv4Address((10 << 24) + 7 * ENDPOINTS + 500_000))
        held = [slot for slots in datapath.services().read().backends.values() for slot in slots.values()]
        need(any(end[:16] == moved for end in held), "the changed backend is not in the kernel's map")
        need(len(held) == SERVICES * ENDPOINTS, f"{len(held)} backends in the kernel's map")
    return {"reading_s": reading_s, "applying_s": applying_s, "update_ms": statistics.median(updates)}


def _policy(number: int, port: int = 0) -> Document:
    rules = []
    for index in range(RULES // POLICIES):
        cidr = f"10.{number}.{index}.0/24" if index % 2 else f"fd00:{number:x}:{index:x}::/48"
        rules.append({"from": [{"ipBlock": {"cidr": cidr}}], "ports": [{"port": port or 1000 + index}]})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"p{number}"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": rules},
    }


def _rules() -> dict[str, float]:
    with Scene.start("scale", ("one",)) as scene:
        begun = scene.put(*map(_policy, range(POLICIES)))
        applying_s = time.monotonic() - begun
        entries = scene.host.api("GET", "/v1/status")["policy"]["entries"]["used"]
        need(entries >= RULES, f"{RULES} rules are only {entries} entries")
        updates = []
        for turn in range(UPDATES):
            begun = scene.put(_policy(turn, port=7000 + turn))
            updates.append((time.monotonic() - begun) * 1000)
    return {"rules_s": applying_s, "rules_update_ms": statistics.median(updates), "rules_entries": entries}


def measure() -> Figure:
    """Both, one after the other."""
    found = {**_services(), **_rules()}
    detail = (
        f"{SERVICES} services with {ENDPOINTS} backends each: {found['applying_s']:.2f} s from parsed objects into the"
        f" kernel (reading them {found['reading_s']:.1f} s), a change of one {found['update_ms']:.1f} ms;"
        f" {RULES} rules in {POLICIES} policies on a pod: {found['rules_s']:.2f} s through the agent's socket, a change"
        f" of one policy's {RULES // POLICIES} rules {found['rules_update_ms']:.1f} ms"
    )
    need(found["applying_s"] <= APPLY_GOAL_S, detail)
    need(max(found["update_ms"], found["rules_update_ms"]) <= UPDATE_GOAL_MS, detail)
    return Figure(found["applying_s"], "s", detail, found)
