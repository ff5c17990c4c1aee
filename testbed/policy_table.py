"""The table of policies (testbed/semantics/cases.yaml) tried with sockets: `rdmanet apply`, then everything from
everywhere to everywhere at once.

What is allowed must be answered, by the right one. What is denied must have been counted as a drop of the right pod and
direction, and by then nothing may have come back: nobody waits for silence.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.outside import FAR_IPV4, FAR_IPV6, GATEWAY_IPV4, GATEWAY_IPV6, HOST_IPV4, HOST_IPV6
from testbed.rows import need
from testbed.semantics import cases
from testbed.semantics.cases import HOST, OUTSIDE, PODS, PORTS, PUBLIC, PUBLIC_PORT, Attempt, Case
from testbed.semantics.network_policy import Judgement
from testbed.services import NODE, NODE_PORT, Document, Scene, service, slices

FIXED = {
    HOST: {4: HOST_IPV4, 6: HOST_IPV6},
    "near": {4: GATEWAY_IPV4, 6: GATEWAY_IPV6},
    "far": {4: FAR_IPV4, 6: FAR_IPV6},
}
#: Status is asked again for so long; a drop is counted while its packet is sent.
DROPS_S = 10.0
CALLS_S = 30.0
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
        by_place: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            by_place.setdefault(_caller(attempt.source), []).append(attempt)
        before = self.drops()
        callers = self.scene.callers
        for place, own in by_place.items():
            wanted = [judgements[attempt] is Judgement.ALLOWED for attempt in own]
            callers[place].tell("attempt", ends=[self._end(attempt) for attempt in own], wanted=wanted)
        for place in by_place:
            callers[place].answer()
        for (pod, reason), left in self._never_dropped(before, due).items():
            outcome.wrong.append(f"{case.name}: {left} flows of {pod} were not dropped as {reason}")
        for place, own in by_place.items():
            answers = self.scene.ask(place, "attempted")["answers"]
            for attempt, answer in zip(own, answers, strict=True):
                judgement = judgements[attempt]
                outcome.judgements[judgement] += 1
                outcome.kinds[attempt.what.kind] += 1
                if answer != (_answer(attempt) if judgement is Judgement.ALLOWED else None):
                    outcome.wrong.append(f"{case.name}: {attempt} is {judgement}: {answer or 'no answer'}")

    def drops(self) -> Drops:
        """Packets of the table's pods that policy has dropped until now."""
        names = {f"{place.namespace}/{pod}": pod for pod, place in PODS.items()}
        found: Drops = Counter()
        for row in self.scene.host.api("GET", "/v1/status")["drops"]:
            if row["pod"] in names and row["reason"] in (Judgement.EGRESS, Judgement.INGRESS):
                found[names[row["pod"]], row["reason"]] += row["packets"]
        return found

    def calls(self, place: str, kind: str, end: tuple[str, int], source: str | None, count: int) -> list[str]:
        """Flows to one end, a service's; who answered. The others were dropped."""
        before = self.drops().total()
        address, port = end
        one = {"kind": kind, "address": address, "port": port, "source": source}
        self.scene.ask(place, "attempt", ends=[one] * count, wanted=[False] * count)
        answered = dropped = 0
        deadline = time.monotonic() + CALLS_S
        while answered + dropped < count and time.monotonic() < deadline:
            answered = sum(name is not None for name in self.scene.ask(place, "attempting")["answers"])
            dropped = self.drops().total() - before
        names = [name for name in self.scene.ask(place, "attempted")["answers"] if name is not None]
        need(len(names) + dropped >= count, f"{place}: of {count} calls {len(names)} were answered, {dropped} dropped")
        return names

    def _never_dropped(self, before: Drops, due: Drops) -> Drops:
        """What of ``due`` has not been dropped since; what is, is before a client could have waited for its answer."""
        missing = due - (self.drops() - before)
        deadline = time.monotonic() + DROPS_S
        while missing and time.monotonic() < deadline:
            missing = due - (self.drops() - before)
        return missing

    def _end(self, attempt: Attempt) -> dict[str, Any]:
        source, target, version, what = attempt
        if source in OUTSIDE:
            own = self.addresses[source][version]
            return {"kind": what.kind, "address": NODE[version], "port": NODE_PORT, "source": own}
        return {"kind": what.kind, "address": self.addresses[target][version], "port": what.port}


def _key(document: Document) -> tuple[str, str]:
    return document["metadata"]["namespace"], document["metadata"]["name"]


def _caller(place: str) -> str:
    """Whose program speaks for a place."""
    return "outside" if place in OUTSIDE else place


def _answer(attempt: Attempt) -> str:
    return "echo" if attempt.what.kind == "icmp" else _caller(attempt.target)
