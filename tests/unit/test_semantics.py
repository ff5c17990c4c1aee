"""The plain model of Kubernetes' semantics against the examples of Kubernetes' own documentation, rewritten."""

from __future__ import annotations

import ipaddress
from random import Random

import pytest

from rdmanet.objects.values import (
    ContainerPort,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    IpBlock,
    NetworkPolicy,
    Peer,
    PolicyPort,
    Protocol,
    Requirement,
    Rule,
    Selector,
    Service,
    ServicePort,
)
from testbed.semantics import random_policies, random_services
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld
from testbed.semantics.service import Asker, Backend, ServiceWorld

ADDRESS = ipaddress.ip_address
NODE = ADDRESS("10.90.0.1")
FAR = ADDRESS("203.0.113.1")
DB, FRONTEND, OTHER = ADDRESS("10.90.0.7"), ADDRESS("10.90.0.8"), ADDRESS("10.90.0.9")
EVERYTHING = Selector()
ALLOWED, EGRESS, INGRESS = Judgement.ALLOWED, Judgement.EGRESS, Judgement.INGRESS


def labelled(**labels: str) -> Selector:
    return Selector(frozenset(Requirement(key, "In", frozenset({value})) for key, value in labels.items()))


def judge(policies: list[NetworkPolicy], source: object, destination: object, port: int = 80, protocol: int = 6) -> str:
    pods = (
        PolicyPod("default", "db", {}, {"role": "db"}, (DB,), (ContainerPort("sql", 6379),)),
        PolicyPod("default", "frontend", {}, {"role": "frontend"}, (FRONTEND,)),
        PolicyPod("other", "frontend", {"project": "x"}, {"role": "frontend"}, (OTHER,), (ContainerPort("sql", 81),)),
    )
    assert isinstance(source, ipaddress.IPv4Address)
    assert isinstance(destination, ipaddress.IPv4Address)
    return PolicyWorld(pods, frozenset({NODE}), tuple(policies)).judge(Flow(source, destination, protocol, port))


def ingress(*rules: Rule, pods: Selector = labelled(role="db")) -> NetworkPolicy:  # noqa: B008 - a value
    return NetworkPolicy("default", "in", pods, rules, None)


def egress(*rules: Rule, pods: Selector = labelled(role="db")) -> NetworkPolicy:  # noqa: B008
    return NetworkPolicy("default", "out", pods, None, rules)


def test_without_policies_everything_is_allowed() -> None:
    assert judge([], FAR, DB) == judge([], DB, FAR) == judge([], OTHER, DB) == ALLOWED


def test_default_deny_holds_for_its_direction_alone() -> None:
    assert judge([ingress()], FRONTEND, DB) == INGRESS
    assert judge([ingress()], DB, FRONTEND) == ALLOWED
    assert judge([egress()], DB, FRONTEND) == EGRESS
    assert judge([egress()], FRONTEND, DB) == ALLOWED
    assert judge([ingress()], OTHER, FRONTEND) == ALLOWED


def test_the_node_and_the_pod_itself_are_always_allowed() -> None:
    both = [ingress(), egress()]
    assert judge(both, NODE, DB) == judge(both, DB, NODE) == judge(both, DB, DB) == ALLOWED


def test_policies_add_up() -> None:
    rule = Rule((Peer(pods=labelled(role="frontend")),))
    assert judge([ingress(), ingress(rule)], FRONTEND, DB) == ALLOWED
    assert judge([ingress(), ingress(rule)], OTHER, DB) == INGRESS


def test_one_item_with_both_selectors_means_both_and_two_items_mean_either() -> None:
    """ "namespaceSelector *and* podSelector": careful with the hyphen."""
    both = ingress(Rule((Peer(pods=labelled(role="x"), namespaces=labelled(project="x")),)))
    either = ingress(Rule((Peer(pods=labelled(role="x")), Peer(namespaces=labelled(project="x")))))
    assert judge([both], OTHER, DB) == INGRESS
    assert judge([either], OTHER, DB) == ALLOWED
    assert judge([either], FRONTEND, DB) == INGRESS


def test_a_block_without_what_it_excepts() -> None:
    block = IpBlock(ipaddress.ip_network("10.90.0.0/24"), (ipaddress.ip_network("10.90.0.9/32"),))
    policy = ingress(Rule((Peer(block=block),)))
    assert judge([policy], FRONTEND, DB) == ALLOWED
    assert judge([policy], OTHER, DB) == judge([policy], FAR, DB) == INGRESS


@pytest.mark.parametrize(
    ("port", "protocol", "verdict"), [(31999, 6, EGRESS), (32000, 6, ALLOWED), (32768, 6, ALLOWED), (32768, 17, EGRESS)]
)
def test_a_range_of_ports_has_both_ends(port: int, protocol: int, verdict: str) -> None:
    policy = egress(Rule((), (PolicyPort(Protocol.TCP, 32000, 32768),)))
    assert judge([policy], DB, FAR, port, protocol) == verdict


def test_a_name_is_the_receivers_port() -> None:
    rule = Rule((), (PolicyPort(Protocol.TCP, "sql"),))
    assert judge([ingress(rule)], FRONTEND, DB, 6379) == ALLOWED
    assert judge([ingress(rule)], FRONTEND, DB, 81) == INGRESS
    assert judge([egress(rule)], DB, OTHER, 81) == ALLOWED
    assert judge([egress(rule)], DB, OTHER, 6379) == judge([egress(rule)], DB, FAR, 81) == EGRESS


def test_not_in_also_selects_where_there_is_no_such_key() -> None:
    absent = Selector(frozenset({Requirement("tier", "NotIn", frozenset({"a"}))}))
    assert judge([ingress(pods=absent)], FRONTEND, DB) == INGRESS


def test_rules_without_ports_allow_every_protocol_and_those_with_ports_no_other() -> None:
    assert judge([ingress(Rule())], FRONTEND, DB, 0, 1) == ALLOWED
    assert judge([ingress(Rule((), (PolicyPort(Protocol.TCP),)))], FRONTEND, DB, 0, 1) == INGRESS


# Services

VIP = ADDRESS("10.96.0.1")
HERE, THERE = ADDRESS("10.90.0.7"), ADDRESS("10.91.0.7")


def backends(*endpoints: Endpoint, asker: Asker = Asker.INSIDE, **options: bool) -> set[str] | None:
    service = Service("default", "web", (VIP,), (ServicePort("http", Protocol.TCP, 80, 30080),), **options)  # type: ignore[arg-type]
    piece = EndpointSlice("default", "web-1", "web", (EndpointPort("http", Protocol.TCP, 8080),), endpoints)
    world = ServiceWorld((service,), (piece,), frozenset({NODE}), frozenset({HERE}))
    address, port = (VIP, 80) if asker is Asker.INSIDE else (NODE, 30080)
    found = world.backends(asker, address, Protocol.TCP, port)
    assert found is None or all(backend.port == 8080 for backend in found)
    return None if found is None else {str(backend.address) for backend in found}


FADING = Endpoint(HERE, ready=False, terminating=True)


def test_ready_endpoints_come_before_those_that_terminate() -> None:
    assert backends(FADING, Endpoint(THERE)) == {str(THERE)}
    assert backends(FADING, Endpoint(THERE, ready=False, serving=False)) == {str(HERE)}
    assert backends(Endpoint(HERE, ready=False, serving=False, terminating=True)) == set()
    assert backends(Endpoint(HERE, ready=False, serving=False), publish_not_ready=True) == {str(HERE)}


def test_local_policies() -> None:
    assert backends(Endpoint(HERE), Endpoint(THERE), internal_local=True) == {str(HERE)}
    assert backends(Endpoint(THERE), internal_local=True) == set()
    assert backends(FADING, Endpoint(THERE), internal_local=True) == {str(HERE)}
    assert backends(Endpoint(HERE), Endpoint(THERE), asker=Asker.OUTSIDE) == {str(HERE)}


def test_what_is_no_service() -> None:
    world = ServiceWorld((), (), frozenset({NODE}), frozenset())
    assert world.backends(Asker.INSIDE, VIP, Protocol.TCP, 80) is None
    assert Backend(VIP, 80) == Backend(VIP, 80)


def test_random_worlds_have_all_verdicts_and_are_the_same_for_a_seed() -> None:
    addresses = [(ADDRESS(f"10.90.0.{n}"), ADDRESS(f"fd90::{n:x}")) for n in range(7, 13)]
    outside = (FAR, ADDRESS("2001:db8:200::1"))
    seen: set[str] = set()
    for seed in range(40):
        world, _ = random_policies.world(Random(seed), addresses, frozenset({NODE}), outside)
        assert world == random_policies.world(Random(seed), addresses, frozenset({NODE}), outside)[0]
        random = Random(seed)
        seen |= {world.judge(random_policies.flow(random, world, outside)) for _ in range(50)}
    assert seen == set(Judgement)


def test_random_services_are_refused_answered_and_unknown() -> None:
    local = [ADDRESS(f"10.90.0.{n}") for n in range(7, 13)]
    world = random_services.world(Random(1), 200, local, [THERE], frozenset({NODE}))
    found = [
        world.backends(Asker.INSIDE, address, port.protocol, port.port)
        for service in world.services
        for address in (*service.cluster_ips, *service.external_ips)
        for port in service.ports
    ]
    assert None not in found
    assert frozenset() in found
    assert max(len(each or ()) for each in found) > 2
