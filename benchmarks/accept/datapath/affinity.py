"""Row `affinity`: sessionAffinity ClientIP keeps each client with its backend, from outside and from sockets.

A client outside is its address, a client on this host its network namespace. What a client had is left when it takes no
new flows any more, or when the time has run out; other clients keep theirs.
"""

from __future__ import annotations

from typing import Any

from testbed.rows import Figure, need
from testbed.services import (
    CLUSTER_IP,
    FAMILIES,
    KINDS,
    NODE,
    NODE_PORT,
    OUTSIDE,
    PORT,
    TERMINATING,
    Document,
    Scene,
    service,
    slices,
    wait_until,
)

BACKENDS = ("one", "two", "three", "four")
CALLS = 50
TIMEOUT_S = 2


def web(seconds: int) -> Document:
    """With affinity of so many seconds."""
    return service(
        node_port=NODE_PORT,
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}},
    )


Client = tuple[str, str | None, str, int]  # place, its own address, the service's address and port


def clients() -> list[Client]:
    """Of both families: two outside, one pod and the host by ClusterIP."""
    found: list[Client] = []
    for version in FAMILIES:
        found += [("outside", client, NODE[version], NODE_PORT) for client in OUTSIDE[version]]
        found += [(place, None, CLUSTER_IP[version], PORT) for place in ("one", "host")]
    return found


def measure() -> Figure:
    """Every client's backend, over many calls, a change and the time-out."""
    with Scene.start("affinity", BACKENDS) as scene:
        scene.apply(web(10800), *slices(scene.of(*BACKENDS)))
        had = {(client, kind): _only(scene, client, kind) for client in clients() for kind in KINDS}
        calls = CALLS * len(had)
        for key, name in had.items():
            need(_only(scene, *key) == name, f"{key[0]} lost {name} without a reason")
            calls += CALLS
        left = next(iter(had.values()))
        conditions: dict[str, Any] = {left: TERMINATING}
        scene.apply(*slices(scene.of(*BACKENDS), **conditions))
        moved = 0
        for key, name in had.items():
            now = _only(scene, *key)
            calls += CALLS
            need(now != left, f"{key[0]} still begins with {left}, which is terminating")
            need(name in (left, now), f"{key[0]} had {name}, which lives, and got {now}")
            moved += now != name
        scene.apply(web(TIMEOUT_S), *slices(scene.of(*BACKENDS)))
        # Each call begins the time anew: what is waited for is that some client, left alone for longer, gets another.
        client = clients()[0]
        first = _only(scene, client, "tcp")
        other_s = wait_until(lambda: _after(scene, client, TIMEOUT_S + 0.5) != first, "another backend", 120)
    detail = (
        f"{len(had)} clients (addresses outside, a pod, the host; both families, TCP and UDP) had one backend each over"
        f" {calls} calls; when {left} was terminating its {moved} clients moved and no other; with a time-out of"
        f" {TIMEOUT_S} s a client that paused for longer got another after {other_s:.0f} s"
    )
    return Figure(calls, "calls", detail, {"moved": moved})


def _only(scene: Scene, client: Client, kind: str) -> str:
    """Who answers all of a client's calls."""
    place, source, address, port = client
    answer = scene.ask(place, "many", kind=kind, address=address, port=port, count=CALLS, source=source)
    need(not answer["refused"] and len(answer["names"]) == 1, f"{client} by {kind}: {answer}")
    return str(next(iter(answer["names"])))


def _after(scene: Scene, client: Client, pause_s: float) -> str:
    """Who answers after a pause, which is what is measured here: affinity's own clock cannot be asked."""
    place, source, address, port = client
    answer = scene.ask(place, "many", kind="tcp", address=address, port=port, count=1, source=source, pause_s=pause_s)
    need(not answer["refused"], f"{client}: {answer}")
    return str(next(iter(answer["names"])))
