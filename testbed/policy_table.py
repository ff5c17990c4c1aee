"""The table of policies (testbed/semantics/cases.yaml) tried with sockets: `rdmanet apply`, then everything from
everywhere to everywhere at once.

What is allowed must be answered, by the right one. What is denied must have been counted as a drop of the right pod and
direction, and by then nothing may have come back: nobody waits for silence.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.outside import FAR_IPV4, FAR_IPV6, GATEWAY_IPV4, GATEWAY_IPV6, HOST_IPV4, HOST_IPV6
from testbed.semantics import cases
from testbed.semantics.cases import HOST, OUTSIDE, PODS, PORTS, PUBLIC, PUBLIC_PORT, Attempt, Case
from testbed.semantics.network_policy import Judgement
from testbed.services import NODE, NODE_PORT, Document, Scene, service, slices, wait_until

FIXED = {
    HOST: {4: HOST_IPV4, 6: HOST_IPV6},
    "near": {4: GATEWAY_IPV4, 6: GATEWAY_IPV6},
    "far": {4: FAR_IPV4, 6: FAR_IPV6},
}
Drops = Counter[tuple[str, str]]  # by pod and reason


@dataclass
class Outcome:
    """Of some cases: how many attempts of each judgement, and what was otherwise than the table says."""

    judgements: Counter[Judgement] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class PolicyTable:
    """A scene with the table's places in it."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.addresses: Mapping[str, Mapping[int, str]] = {**scene.addresses, **FIXED}
        self._applied: list[Document] = []

    @classmethod
    @contextlib.contextmanager
    def start(cls, name: str) -> Iterator[PolicyTable]:
        """All places serve on all ports; one pod is reached from outside."""
        with Scene.start(name, [f"{place.namespace}/{pod}" for pod, place in PODS.items()]) as scene:
            table = cls(scene)
            for place in (*PODS, HOST, "outside"):
                scene.ask(place, "answer_raw", name=place)
                # Pods serve on one port already.
                for port in PORTS:
                    if place not in PODS or port != PUBLIC_PORT:
                        scene.ask(place, "serve", name=place, port=port)
            public = service(node_port=NODE_PORT)
            scene.apply(*cases.objects(), public, *slices(scene.of(PUBLIC)))
            yield table

    def apply(self, documents: Sequence[Document]) -> None:
        """These policies, and no others any more."""
        wanted = {_key(document) for document in documents}
        stale = [document for document in self._applied if _key(document) not in wanted]
        if documents:
            self.scene.apply(*documents)
        self._applied = list(documents)
        if stale:
            self.scene.delete(*stale)

    def carry_out(self, case: Case, outcome: Outcome) -> None:
        """One case."""
        self.apply(case.documents(self.addresses))
        attempts = list(case.attempts())
        judgements = {attempt: case.judgement(attempt) for attempt in attempts}
        due: Drops = Counter()
        for attempt, judgement in judgements.items():
            if judgement is not Judgement.ALLOWED:
                pod = attempt.source if judgement is Judgement.EGRESS else attempt.target
                due[pod, judgement.value] += 1
        before = self.drops()
        by_place: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            by_place.setdefault(_caller(attempt.source), []).append(attempt)
        callers = self.scene.callers
        for place, own in by_place.items():
            wanted = [judgements[attempt] is Judgement.ALLOWED for attempt in own]
            callers[place].tell("attempt", ends=[self._end(attempt) for attempt in own], wanted=wanted)
        for place in by_place:
            callers[place].answer()
        with contextlib.suppress(TimeoutError):
            self._wait_for_drops(before, due)
        short = due - (self.drops() - before)
        for (pod, reason), left in short.items():
            outcome.wrong.append(f"{case.name}: {left} fewer drops of {pod} as {reason} than attempts that it ends")
        for place, own in by_place.items():
            answers = callers[place].ask("attempted")["answers"]
            for attempt, answer in zip(own, answers, strict=True):
                judgement = judgements[attempt]
                outcome.judgements[judgement] += 1
                outcome.kinds[attempt.what.kind] += 1
                right = _answer(attempt) if judgement is Judgement.ALLOWED else None
                if answer != right:
                    outcome.wrong.append(f"{case.name}: {attempt}: {answer or 'no answer'}, and it is {judgement}")
