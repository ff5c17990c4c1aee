"""Policies compiled into entries say what the plain model of NetworkPolicy says, however they came about."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator

import pytest

from rdmanet.model import IPAddress, PodName
from rdmanet.objects.values import (
    ContainerPort,
    IpBlock,
    Kind,
    NetworkPolicy,
    ObjectKey,
    Peer,
    PolicyPort,
    Protocol,
    Requirement,
    Rule,
    Selector,
)
from rdmanet.policy import matches, verdict
from rdmanet.policy.rulebook import Rulebook
from rdmanet.policy.values import Direction, Member, Numbers, PodPolicy
from testbed.semantics import random_policies
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld

NODE = frozenset((ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::1")))
OUTSIDE: tuple[IPAddress, ...] = tuple(
    ipaddress.ip_address(text)
    for text in ("192.0.2.7", "198.51.100.9", "10.0.3.200", "2001:db8::7", "fd00::3:200", "::2")
)
APP = Selector(frozenset((Requirement("app", "In", frozenset(("web",))),)))


def addresses(number: int) -> tuple[IPAddress, ...]:
    return ipaddress.ip_address(f"10.0.1.{number}"), ipaddress.ip_address(f"fd00::1:{number:x}")


def member(pod: PolicyPod) -> Member:
    name = PodName(pod.namespace, pod.name)
    return Member(name, pod.addresses, pod.labels, pod.namespace_labels, frozenset(pod.ports))


def key(policy: NetworkPolicy) -> ObjectKey:
    return ObjectKey(Kind.NETWORK_POLICY, policy.namespace, policy.name)


def judgement(book: Rulebook, world: PolicyWorld, flow: Flow) -> Judgement:
    if flow.source in NODE or flow.destination in NODE:
        return Judgement.ALLOWED  # the programs' own rule, before they ask
    ends: list[tuple[PodPolicy | None, IPAddress]] = []
    for address in (flow.source, flow.destination):
        pod = world.pod_of(address)
        ends.append((book.pod_policy(world.pods.index(pod)) if pod else None, address))
    if world.pod_of(flow.source) is world.pod_of(flow.destination):
        return Judgement.ALLOWED
    source, destination = ends
    found = verdict.refused(source, destination, flow.protocol, flow.port, book.wanted, book.prefixes.numbers)
    return Judgement.ALLOWED if found is None else Judgement(f"policy_{found.value}")


def enter(book: Rulebook, world: PolicyWorld, before: PolicyWorld | None) -> None:
    for number, pod in enumerate(world.pods):
        book.set_member(number, member(pod))
    now = {key(policy) for policy in world.policies}
    for policy in before.policies if before else ():
        if key(policy) not in now:
            book.remove_policy(key(policy))
    for policy in world.policies:
        book.set_policy(key(policy), policy)
    book.settle()


def compare(book: Rulebook, world: PolicyWorld, seed: int, generator: random.Random, flows: int) -> None:
    for _ in range(flows):
        flow = random_policies.flow(generator, world, OUTSIDE)
        assert judgement(book, world, flow) is world.judge(flow), f"seed {seed}: {flow} in {world}"


def worlds(generator: random.Random) -> Iterator[PolicyWorld]:
    while True:
        yield random_policies.world(generator, [addresses(n) for n in range(2, 8)], NODE, OUTSIDE)[0]


def seeds(count: int) -> list[int]:
    return [*range(1, count), random.SystemRandom().randrange(1 << 32)]


@pytest.mark.parametrize("seed", seeds(80))
def test_entries_say_what_the_model_says_after_every_change(seed: int) -> None:
    generator = random.Random(seed)
    book, before = Rulebook(), None
    for _, world in zip(range(4), worlds(generator), strict=False):
        enter(book, world, before)
        compare(book, world, seed, generator, 60)
        before = world
    # What was worked out step by step is what is worked out at once, but for numbers.
    assert before is not None
    fresh = Rulebook()
    enter(fresh, before, None)
    assert len(fresh.wanted) == len(book.wanted)
    assert fresh.prefixes.numbers.keys() == book.prefixes.numbers.keys()
    for number in list(book.members):
        book.remove_member(number)
    for policy in before.policies:
        book.remove_policy(key(policy))
    book.settle()
    assert (book.wanted, book.prefixes.numbers, book.sets) == ({}, {}, {})


@pytest.mark.parametrize("seed", seeds(20))
def test_numbers_of_before_go_on(seed: int) -> None:
    generator = random.Random(seed)
    world = next(worlds(generator))
    book = Rulebook()
    enter(book, world, None)
    members = {number: book.pod_policy(number) for number in book.members}
    again = Rulebook(Numbers(members, book.prefixes.numbers, 1000, 1000))
    enter(again, world, None)
    assert {number: again.pod_policy(number) for number in again.members} == members
    assert again.wanted == book.wanted


def test_numbers_that_nobody_has_yet_are_beyond_those_in_use() -> None:
    numbers = Numbers({1: PodPolicy(40, 7, 0)}, {}, 40, 9)
    book = Rulebook(numbers)
    for number in (1, 2):
        book.set_member(number, Member(PodName("default", f"p{number}"), addresses(number), {"n": str(number)}, {}))
    for number in (1, 2):
        selector = Selector(frozenset((Requirement("n", "In", frozenset((str(number),))),)))
        policy = NetworkPolicy("default", f"p{number}", selector, (), None)
        book.set_policy(key(policy), policy)
    book.settle()
    assert book.pod_policy(1) == PodPolicy(40, 7, 0)
    assert book.pod_policy(2) == PodPolicy(41, 10, 0)


def test_a_change_of_all_users_changes_their_set_in_place() -> None:
    book = Rulebook()
    book.set_member(1, Member(PodName("default", "a"), addresses(2), {"app": "web"}, {}))
    block = IpBlock(ipaddress.ip_network("192.0.2.0/24"))
    first = NetworkPolicy("default", "first", APP, (Rule((Peer(block=block),)),), None)
    book.set_policy(key(first), first)
    book.settle()
    before = book.pod_policy(1)
    book.touched.clear()
    second = NetworkPolicy("default", "second", APP, (Rule(ports=(PolicyPort(Protocol.TCP, 80),)),), None)
    book.set_policy(key(second), second)
    book.settle()
    assert book.pod_policy(1) == before
    assert len(book.touched) == 1  # what was there stays
    assert book.selecting(1, Direction.INGRESS) == ["default/first", "default/second"]
    assert book.selecting(1, Direction.EGRESS) == []


def test_pods_of_the_same_labels_share_a_set_unless_names_of_ports_matter() -> None:
    book = Rulebook()
    ports = [frozenset((ContainerPort("http", number),)) for number in (80, 8080)]
    for number, own in enumerate(ports):
        book.set_member(
            number, Member(PodName("default", f"p{number}"), addresses(number + 2), {"app": "web"}, {}, own)
        )
    policy = NetworkPolicy("default", "numbers", APP, (Rule(ports=(PolicyPort(port=80),)),), None)
    book.set_policy(key(policy), policy)
    book.settle()
    assert len(book.sets) == 1
    policy = NetworkPolicy("default", "numbers", APP, (Rule(ports=(PolicyPort(port="http"),)),), None)
    book.set_policy(key(policy), policy)
    book.settle()
    assert len(book.sets) == 2
    for number, port in ((0, 80), (1, 8080)):
        found = book.pod_policy(number)
        for asked in (80, 8080):
            address = ipaddress.ip_address("192.0.2.1")
            allowed = verdict.allows(found.ingress_set, 0, address, 6, asked, book.wanted, book.prefixes.numbers)
            assert allowed is (asked == port)


@pytest.mark.parametrize(("first", "last"), [(1, 65535), (1, 65534), (80, None), (1000, 1999), (32768, 65535), (5, 6)])
def test_ranges_are_prefixes(first: int, last: int | None) -> None:
    found = matches.matches(6, first, last)
    assert len(found) <= 30
    inside = {port for m in found for port in range(m.port, m.port + (1 << (16 + matches.PROTOCOL_BITS - m.bits)))}
    assert inside == set(range(first, (last or first) + 1))
    for port in (first, last or first):
        assert any(match in found for match in matches.covering(6, port))


def test_ipv6s_everything_is_not_ipv4s() -> None:
    book = Rulebook()
    book.set_member(1, Member(PodName("default", "a"), addresses(2), {}, {}))
    rule = Rule((Peer(block=IpBlock(ipaddress.ip_network("::/0"))),))
    policy = NetworkPolicy("default", "six", Selector(), None, (rule,))
    book.set_policy(key(policy), policy)
    book.settle()
    # The datapath's keys have IPv4 inside ::/0.
    assert {str(prefix) for prefix in book.prefixes.numbers} == {"::/0", "0.0.0.0/0"}
    own = book.pod_policy(1)
    for text, wanted in (("192.0.2.1", False), ("2001:db8::1", True)):
        address = ipaddress.ip_address(text)
        allowed = verdict.allows(own.egress_set, 0, address, 17, 53, book.wanted, book.prefixes.numbers)
        assert allowed is wanted
