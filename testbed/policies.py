"""Network policies on a scratch host: what is applied, and how long it takes until packets feel it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rdmanet.errors import UnavailableError
from testbed.services import TARGET_PORT, Document, Scene

#: Nothing comes any more when nothing has come for so long; an answer every 2 ms otherwise.
SILENCE_S = 0.5
WAIT_S = 30.0
SERVER, CLIENT, FRIEND = "server", "client", "friend"


def labelled(name: str, **labels: str) -> Document:
    """A Pod object, for its labels."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": "main", "image": "none"}]},
    }


def namespace(**labels: str) -> Document:
    """The pods' Namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": labels}}


def policy(name: str, *peers: Document, selects: str = SERVER, direction: str = "ingress") -> Document:
    """Selects one pod by its label ``app``; one rule that names all peers, or none."""
    word = {"ingress": "from", "egress": "to"}[direction]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "podSelector": {"matchLabels": {"app": selects}},
            "policyTypes": [direction.capitalize()],
            direction: [{word: list(peers)}] if peers else [],
        },
    }


def pods(**labels: str) -> Document:
    """A peer."""
    return {"podSelector": {"matchLabels": labels}}


@dataclass
class Felt:
    """A change, and after how many milliseconds the next packet was judged by it."""

    name: str
    ms: float


def _until(scene: Scene, pulse: str, enough: Callable[[Sequence[float]], bool]) -> list[float]:
    """Answers to a pulse until there are enough, or none any more."""
    answers: list[float] = []
    deadline = time.monotonic() + WAIT_S
    while not enough(answers):
        if time.monotonic() > deadline:
            raise UnavailableError(f"{pulse}: {len(answers)} answers in {WAIT_S:.0f} s", subject=pulse)
        answers += scene.ask(CLIENT, "pulsed", id=pulse)["answers"]
    return answers


def denied(scene: Scene, name: str, *documents: Document, pulses: Sequence[str]) -> Felt:
    """Puts what denies the client's pulses: until the last answer."""
    for pulse in pulses:
        _until(scene, pulse, lambda answers: len(answers) >= 20)
    begun = scene.put(*documents)
    last = 0.0
    for pulse in pulses:
        answers = _until(
            scene, pulse, lambda answers: time.monotonic() > (answers[-1] if answers else begun) + SILENCE_S
        )
        last = max([last, *answers])
    return Felt(name, max(0.0, last - begun) * 1000)


def allowed(scene: Scene, name: str, *documents: Document, pulses: Sequence[str]) -> Felt:
    """Puts what allows them again: until the first answer of each."""
    for pulse in pulses:
        scene.ask(CLIENT, "pulsed", id=pulse)
    begun = scene.put(*documents)
    firsts = [_until(scene, pulse, lambda answers: bool(answers))[0] for pulse in pulses]
    return Felt(name, (max(firsts) - begun) * 1000)


def changes(scene: Scene, ways: Sequence[str]) -> list[Felt]:
    """Every kind of change, both ways, while the friend's connection goes on. ``scene`` has the three pods."""
    friend = pods(role="friend")
    scene.put(
        namespace(stage="open"),
        labelled(SERVER, app=SERVER),
        labelled(CLIENT, role="client", app=CLIENT),
        labelled(FRIEND, role="friend"),
        policy("server", friend, pods(role="client")),
    )
    for version in (4, 6):
        address = scene.addresses[SERVER][version]
        scene.ask(CLIENT, "pulse", id=str(version), address=address, port=TARGET_PORT)
        opened = scene.ask(FRIEND, "open", id=str(version), kind="tcp", address=address, port=TARGET_PORT)
        if opened["refused"]:
            raise UnavailableError(f"the friend is refused: {opened['refused']}")
    both = ("4", "6")
    open_to_all: Any = {"namespaceSelector": {"matchLabels": {"stage": "open"}}}
    steps: dict[str, tuple[list[Document], list[Document]]] = {
        "policy": ([policy("server", friend)], [policy("server", friend, pods(role="client"))]),
        "pod's labels": ([labelled(CLIENT, app=CLIENT)], [labelled(CLIENT, role="client", app=CLIENT)]),
        "namespace's labels": (
            [policy("server", friend, open_to_all), namespace(stage="closed")],
            [namespace(stage="open")],
        ),
        "egress": (
            [policy("client", selects=CLIENT, direction="egress")],
            [policy("client", pods(app=SERVER), selects=CLIENT, direction="egress")],
        ),
    }
    felt = []
    for name in ways:
        deny, allow = steps[name]
        felt.append(denied(scene, f"{name}, denied", *deny, pulses=both))
        felt.append(allowed(scene, f"{name}, allowed", *allow, pulses=both))
        for pulse in both:
            said = scene.ask(FRIEND, "say", id=pulse)
            if said.get("name") != SERVER:
                raise UnavailableError(f"after {name} the friend's connection over IPv{pulse} says {said}")
    return felt
