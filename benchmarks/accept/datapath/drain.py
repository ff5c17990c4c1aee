"""Row `drain`: a backend that ends keeps its flows and gets no new ones; datagrams leave a dead one at once.

Open connections, from pods, the host and outside, ask on while their backend is terminating. Where none is ready those
that are terminating and still serve take new flows (KEP-1669). Of a backend that is gone not one datagram is lost for
longer than the change takes.
"""

from __future__ import annotations

import time

from testbed.rows import Figure, need
from testbed.services import (
    CLUSTER_IP,
    DEAD,
    FAMILIES,
    KINDS,
    NODE,
    NODE_PORT,
    PORT,
    TERMINATING,
    Scene,
    service,
    slices,
)

CONNECTIONS = 20
CALLS = 60
ROUNDS = 5


def measure() -> Figure:
    """From ready over terminating to gone."""
    with Scene.start("drain", ("client", "one", "two")) as scene:
        both = scene.of("one", "two")
        scene.apply(service(node_port=NODE_PORT), *slices(both))
        opened = _open(scene)
        scene.put(*slices(both, one=TERMINATING))
        said = 0
        for _ in range(ROUNDS):
            said += _ask_all(scene, opened)
            _new(scene, {"two"})
        # Nobody is ready: the one that still serves, though it is terminating.
        scene.put(*slices(both, one=TERMINATING, two=DEAD))
        _new(scene, {"one"})
        # UDP: `one` has gone, `two` is back.
        scene.put(*slices(both, two=TERMINATING))
        _new(scene, {"one"})
        moved_ms = _datagrams(scene)
    detail = (
        f"{len(opened)} connections (TCP and UDP, by a pod, the host and outside; both families) asked {said} times"
        " while their backend was terminating: none broke or moved, and no new one went there; where nobody was ready"
        f" the serving one took them; datagrams left a dead backend {moved_ms:.0f} ms after the change was asked for"
    )
    return Figure(moved_ms, "ms", detail, {"connections": len(opened), "asked": said})


def _ways() -> list[tuple[str, str, int]]:
    """Place, address and port."""
    found = []
    for version in FAMILIES:
        found += [(place, CLUSTER_IP[version], PORT) for place in ("client", "host")]
        found.append(("outside", NODE[version], NODE_PORT))
    return found


Opened = dict[tuple[str, str], str]  # (place, id) → who answers


def _open(scene: Scene) -> Opened:
    """Connections of which some are with each backend. UDP sockets of pods and host are not connected: those that are
    have been told by connect who it is."""
    opened: Opened = {}
    for place, address, port in _ways():
        for kind in KINDS:
            for number in range(CONNECTIONS):
                name = f"{address} {kind} {number}"
                scene.ask(place, "open", id=name, kind=kind, address=address, port=port, connected=kind == "tcp")
                said = scene.ask(place, "say", id=name)
                need(not said["refused"], f"{place} to {address} by {kind}: {said['refused']}")
                opened[place, name] = said["name"]
    need(set(opened.values()) == {"one", "two"}, f"only {set(opened.values())} were chosen")
    return opened


def _ask_all(scene: Scene, opened: Opened) -> int:
    for (place, name), backend in opened.items():
        said = scene.ask(place, "say", id=name)
        need(said.get("name") == backend, f"{place}, {name}: {backend} answered, and now {said}")
    return len(opened)


def _new(scene: Scene, expected: set[str]) -> None:
    for place, address, port in _ways():
        for kind in KINDS:
            answer = scene.ask(place, "many", kind=kind, address=address, port=port, count=CALLS)
            need(
                not answer["refused"] and set(answer["names"]) == expected,
                f"new flows of {place} to {address} by {kind} go to {answer['names']}, {answer['refused']}",
            )


def _datagrams(scene: Scene) -> float:
    """Milliseconds until every socket whose backend dies is answered by the other; the longest."""
    worst_ms = 0.0
    both = scene.of("one", "two")
    for place, address, port in _ways():
        scene.put(*slices(both, two=DEAD))
        scene.ask(place, "open", id="move", kind="udp", address=address, port=port, connected=False)
        need(scene.ask(place, "say", id="move").get("name") == "one", f"{place} to {address}: not with the living")
        begun = scene.put(*slices(scene.of("two")))
        said = scene.ask(place, "say", id="move")
        took_ms = (time.monotonic() - begun) * 1000
        need(said.get("name") == "two", f"{place} to {address}: the first datagram after the change: {said}")
        worst_ms = max(worst_ms, took_ms)
        scene.ask(place, "close", id="move")
        scene.put(*slices(both))
    return worst_ms
