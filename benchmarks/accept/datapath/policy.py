"""Row `policy`: Kubernetes' NetworkPolicy, case by case, through `rdmanet apply` and live pods.

The cases are a table (testbed/semantics/cases.yaml): policies, and who may begin a flow with whom under them. Under
each one everything is tried from everywhere to everywhere, by both families, with TCP, UDP, SCTP and ICMP echo, from
pods, from the node and from outside; testbed/policy_table.py says what allowed and denied mean there. Then policy and
services: what counts is the backend and its port, not the service and its own.
"""

from __future__ import annotations

from typing import Any

from testbed.outside import GATEWAY_IPV4, GATEWAY_IPV6
from testbed.policy_table import Outcome, PolicyTable
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.semantics.cases import cases
from testbed.semantics.network_policy import Judgement
from testbed.services import CLUSTER_IP, FAMILIES, KINDS, NODE, NODE_PORT, PORT, TARGET_PORT, Document, service, slices

BACKENDS = ("server", "friend")
CALLS = 40
NEAR = {4: GATEWAY_IPV4, 6: GATEWAY_IPV6}


def measure() -> Figure:
    """The table, and services beside it."""
    outcome = Outcome()
    table = cases()
    with PolicyTable.start("policy") as scene:
        for number, case in enumerate(table, 1):
            scene.carry_out(case, outcome)
            if number % 10 == 0:
                say(f"policy: {number} of {len(table)} cases, {outcome.judgements.total()} checks")
        served = _services(scene)
    wrong = outcome.wrong
    need(not wrong, f"{len(wrong)} of {outcome.judgements.total()}: {'; '.join(wrong[:5])}")
    counted = {judgement: outcome.judgements[judgement] for judgement in Judgement}
    need(min(counted.values()) > 500, f"too few of a kind: {counted}")
    denied = counted[Judgement.EGRESS] + counted[Judgement.INGRESS]
    kinds = ", ".join(f"{number} {kind}" for kind, number in outcome.kinds.items())
    detail = (
        f"{len(table)} cases through `rdmanet apply`, everything tried from pods of three namespaces, the node and"
        f" outside to everywhere, IPv4 and IPv6 ({kinds}): {counted[Judgement.ALLOWED]} allowed and answered by the"
        f" right one, {denied} denied, each counted as a drop of its pod ({counted[Judgement.EGRESS]} egress,"
        f" {counted[Judgement.INGRESS]} ingress); {served} calls to services, of which policy let through those to"
        " backends that it allows, at their ports"
    )
    more = {"cases": len(table), **{str(judgement): number for judgement, number in counted.items()}}
    return Figure(outcome.judgements.total() + served, "checks", detail, more | {"services": served})


def _policy(direction: str, selects: str, peer: Document | None, port: int | str) -> Document:
    rule: dict[str, Any] = {"ports": [{"port": port, "protocol": kind.upper()} for kind in KINDS]}
    if peer is not None:
        rule["from" if direction == "ingress" else "to"] = [peer]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "services", "namespace": "default"},
        "spec": {
            "podSelector": {"matchLabels": {"app": selects}},
            "policyTypes": [direction.capitalize()],
            direction: [rule],
        },
    }


def _pods(name: str) -> Document:
    return {"podSelector": {"matchLabels": {"app": name}}}


def _services(table: PolicyTable) -> int:
    """Calls to a service of two backends, under policies that mean one of them, its port, or the service's own port."""
    scene, calls = table.scene, 0
    scene.apply(service(node_port=NODE_PORT), *slices(scene.of(*BACKENDS)))
    only_server = {"server"}
    both = {*BACKENDS}
    for policies, through, outside in (
        ([], both, both),
        ([_policy("ingress", "friend", _pods("server"), TARGET_PORT)], only_server, only_server),
        ([_policy("ingress", "friend", _pods("client"), TARGET_PORT)], both, only_server),
        ([_policy("ingress", "friend", None, TARGET_PORT)], both, both),
        ([_policy("ingress", "friend", None, PORT)], only_server, only_server),
        ([_policy("egress", "client", _pods("server"), TARGET_PORT)], only_server, both),
        ([_policy("egress", "client", None, PORT)], set(), both),
    ):
        table.apply(policies)
        for version in FAMILIES:
            for kind in KINDS:
                calls += _calls(table, "client", kind, CLUSTER_IP[version], PORT, through)
                calls += _calls(table, "outside", kind, NODE[version], NODE_PORT, outside, source=NEAR[version])
                # The node itself always may.
                calls += _calls(table, "host", kind, CLUSTER_IP[version], PORT, both)
    return calls


def _calls(
    table: PolicyTable, place: str, kind: str, address: str, port: int, allowed: set[str], source: str | None = None
) -> int:
    """Each goes to one of both backends; those to others than the allowed ones are dropped."""
    answered = table.calls(place, kind, (address, port), source, CALLS)
    way = f"{place} to [{address}]:{port} by {kind}"
    need(set(answered) <= allowed, f"{way}: {answered} answered, and policy allows {sorted(allowed)}")
    need(not allowed or bool(answered), f"{way}: nobody answered, and policy allows {sorted(allowed)}")
    need(allowed != set(BACKENDS) or len(answered) == CALLS, f"{way}: {len(answered)} of {CALLS} were answered")
    return CALLS
