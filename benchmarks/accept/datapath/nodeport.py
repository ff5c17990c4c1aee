"""Row `nodeport`: clients outside reach services at the node's ports and at external IPs.

Backends see the clients' true addresses, and clients get answers from the address that they called. Policy is decided
by the client's address; what has no backend on this host is dropped by name.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from testbed.rows import Figure, need
from testbed.services import (
    EXTERNAL_IP,
    FAMILIES,
    KINDS,
    NODE,
    NODE_PORT,
    OUTSIDE,
    PORT,
    Document,
    Scene,
    service,
    shares,
    slices,
)

BACKENDS = ("one", "two", "three")
CALLS = 150
LEAST = 15  # as in `clusterip`: each call has another port, and so another place in the table


def web() -> Document:
    """The service with everything that is asked from outside."""
    return service(node_port=NODE_PORT, externalIPs=list(EXTERNAL_IP.values()))


def measure() -> Figure:
    """Calls from two clients outside."""
    with Scene.start("nodeport", BACKENDS) as scene:
        scene.apply(web(), *slices(scene.of(*BACKENDS)))
        calls, answered = 0, Counter[str]()
        for address, port in ((NODE, NODE_PORT), (EXTERNAL_IP, PORT)):
            for version in FAMILIES:
                for kind in KINDS:
                    for client in OUTSIDE[version]:
                        answered += _many(scene, kind, client, address[version], port)
                        calls += CALLS
        hairpins = _from_pods(scene)
        streams = _large(scene)
        denied = _denied(scene)
        nobody = _no_backend(scene)
    detail = (
        f"{calls} calls by two clients outside to NodePorts and external IPs, IPv4 and IPv6, TCP and UDP, none failed,"
        f" each backend saw the client itself: {shares(answered)}; {hairpins} by pods to their own node's address;"
        f" {streams} bytes in one stream; {denied} calls denied by the client's address, {nobody} without a backend,"
        " all counted by name"
    )
    return Figure(calls, "calls", detail, {"answered": dict(answered)})


def _many(scene: Scene, kind: str, client: str, address: str, port: int) -> Counter[str]:
    answer = scene.ask("outside", "many", kind=kind, address=address, port=port, count=CALLS, source=client)
    way = f"{client} to [{address}]:{port} by {kind}"
    need(not answer["refused"], f"{way}: {answer['refused']}")
    few = {name: times for name, times in answer["names"].items() if times < LEAST}
    need(set(answer["names"]) == set(BACKENDS) and not few, f"{way}: {answer['names']} answered")
    need(answer["seen"] == [client], f"{way}: the backends saw {answer['seen']}")
    return Counter(answer["names"])


def _from_pods(scene: Scene) -> int:
    calls = 0
    for version in FAMILIES:
        for address, port in ((NODE, NODE_PORT), (EXTERNAL_IP, PORT)):
            for place in ("one", "host"):
                answer = scene.ask(place, "many", kind="tcp", address=address[version], port=port, count=20)
                need(sum(answer["names"].values()) == 20, f"{place} to {address[version]}: {answer}")
                calls += 20
    return calls


def _large(scene: Scene) -> int:
    """Frames as large as they come, through the rewriting both ways; the receiver compares what it got."""
    sent = 0
    for version in FAMILIES:
        answer = scene.ask("outside", "pour", address=NODE[version], port=NODE_PORT, size=8 << 20)
        need(answer["equal"], f"a stream to [{NODE[version]}]:{NODE_PORT} came back changed")
        sent += int(answer["size"])
    return sent


def _policy(refused: str, version: int) -> Document:
    everybody: dict[str, Any] = {"cidr": "0.0.0.0/0" if version == 4 else "::/0", "except": []}
    everybody["except"] = [f"{refused}/{32 if version == 4 else 128}"]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "outside"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"ipBlock": everybody}]}]},
    }


def _denied(scene: Scene) -> int:
    """Of two clients one is refused: its address was not lost on the way."""
    calls = 0
    for version in FAMILIES:
        allowed, refused = OUTSIDE[version]
        scene.apply(_policy(refused, version))
        before = sum(scene.drops("policy_ingress", pod) for pod in BACKENDS)
        answer = scene.ask(
            "outside", "many", kind="udp", address=NODE[version], port=NODE_PORT, count=1, source=refused
        )
        need(answer["refused"] == {"ETIMEDOUT": 1}, f"{refused} is denied, and: {answer}")
        counted = sum(scene.drops("policy_ingress", pod) for pod in BACKENDS) - before
        need(counted == 1, f"one denied datagram was counted as {counted}")
        answer = scene.ask(
            "outside", "many", kind="udp", address=NODE[version], port=NODE_PORT, count=20, source=allowed
        )
        need(sum(answer["names"].values()) == 20, f"{allowed} is allowed, and: {answer}")
        calls += 1
    scene.command("delete", "networkpolicy", "outside")
    return calls


def _no_backend(scene: Scene) -> int:
    scene.apply(web(), *slices({}))
    calls = 0
    for version in FAMILIES:
        before = scene.drops("no_backend")
        answer = scene.ask("outside", "many", kind="udp", address=EXTERNAL_IP[version], port=PORT, count=1)
        need(answer["refused"] == {"ETIMEDOUT": 1}, f"without a backend: {answer}")
        counted = scene.drops("no_backend") - before
        need(counted == 1, f"one datagram without a backend was counted as {counted}")
        calls += 1
    return calls
