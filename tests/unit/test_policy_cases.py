"""The table of policies (testbed/semantics/cases.yaml), read as documents: the plain model and what the engine writes
both say what people say. The row `policy` tries the same table with sockets."""

from __future__ import annotations

import ipaddress
from collections import Counter

import pytest

from rdmanet.objects.changes import Changes
from rdmanet.objects.reading import read
from rdmanet.objects.values import ContainerPort, NetworkPolicy, Protocol
from rdmanet.policy.engine import Policy
from testbed.semantics import cases
from testbed.semantics.cases import Case
from testbed.semantics.network_policy import Judgement, PolicyPod, PolicyWorld
from tests.unit.policy_world import Kernel, attachment

ADDRESSES = {
    **{name: {4: f"10.90.0.{n}", 6: f"fd90::{n:x}"} for n, name in enumerate(cases.PODS, 7)},
    cases.HOST: {4: "198.51.100.2", 6: "2001:db8:100::2"},
    "near": {4: "198.51.100.1", 6: "2001:db8:100::1"},
    "far": {4: "203.0.113.1", 6: "2001:db8:200::1"},
}
NODE = frozenset(map(ipaddress.ip_address, ADDRESSES[cases.HOST].values()))
TABLE = cases.cases()


def pods() -> tuple[PolicyPod, ...]:
    return tuple(
        PolicyPod(
            place.namespace,
            name,
            {**cases.NAMESPACES.get(place.namespace, {}), "kubernetes.io/metadata.name": place.namespace},
            place.labels or {},
            tuple(map(ipaddress.ip_address, ADDRESSES[name].values())),
            tuple(ContainerPort(word, port, Protocol(protocol)) for word, protocol, port in place.ports),
        )
        for name, place in cases.PODS.items()
    )


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_model_and_engine_say_what_the_table_says(case: Case) -> None:
    found = [read(document) for document in (*cases.objects(), *case.documents(ADDRESSES))]
    objects = {one.key: one.value for one in found}
    policies = tuple(value for value in objects.values() if isinstance(value, NetworkPolicy))
    world = PolicyWorld(pods(), NODE, policies)
    kernel = Kernel()
    engine = Policy(kernel)
    engine.recover([], {})
    for number, pod in enumerate(world.pods):
        kernel.pods[number] = engine.join(attachment(number, pod))
    engine.objects_changed(Changes(objects, {}, objects))
    for attempt in case.attempts():
        wanted, flow = case.judgement(attempt), attempt.flow(ADDRESSES)
        assert world.judge(flow) is wanted, f"the model: {attempt}"
        assert kernel.judge(flow, world) is wanted, f"the engine: {attempt}"


def test_the_table_has_much_of_everything() -> None:
    judgements = Counter(case.judgement(attempt) for case in TABLE for attempt in case.attempts())
    assert len({case.name for case in TABLE}) == len(TABLE) > 50
    assert min(judgements[judgement] for judgement in Judgement) > 500
