"""The engine brings maps to what objects say, in an order in which nobody who may is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import random
import time

import pytest

from rdmanet.errors import BpfError, ExhaustedError
from rdmanet.model import PodName
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import (
    IpBlock,
    Kind,
    Namespace,
    NetworkPolicy,
    Object,
    ObjectKey,
    Peer,
    Pod,
    PolicyPort,
    Protocol,
    Rule,
    Selector,
)
from rdmanet.policy.engine import Policy
from rdmanet.policy.values import PodPolicy
from testbed.semantics import random_policies
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld
from tests.unit.policy_world import Kernel, attachment, changes, key_of, namespace_key, objects, policy_key
from tests.unit.test_policy_rulebook import NODE, OUTSIDE, addresses, seeds


def world_of(generator: random.Random, names: PolicyWorld | None = None) -> PolicyWorld:
    """Random; with ``names`` of the same pods with other labels."""
    found, _ = random_policies.world(generator, [addresses(n) for n in range(2, 8)], NODE, OUTSIDE)
    if names is None:
        return found
    spaces = {pod.namespace: pod.namespace_labels for pod in found.pods}
    pods = tuple(
        dataclasses.replace(
            pod,
            namespace=named.namespace,
            name=named.name,
            namespace_labels=spaces.get(named.namespace, {random_policies.NAME_LABEL: named.namespace}),
        )
        for pod, named in zip(found.pods, names.pods, strict=True)
    )
    return dataclasses.replace(found, pods=pods)


def join_all(policy: Policy, kernel: Kernel, world: PolicyWorld) -> None:
    for number, pod in enumerate(world.pods):

        def write(found: PodPolicy, number: int = number) -> None:
            kernel.pods[number] = found

        policy.join(attachment(number, pod), write)


def world_with(found: dict[ObjectKey, Object], world: PolicyWorld) -> PolicyWorld:
    """The same pods, with what the objects say of them."""
    pods = []
    for pod in world.pods:
        own, space = found[ObjectKey(Kind.POD, pod.namespace, pod.name)], found[namespace_key(pod)]
        assert isinstance(own, Pod)
        assert isinstance(space, Namespace)
        pods.append(dataclasses.replace(pod, labels=own.labels, ports=own.ports, namespace_labels=space.labels))
    policies = tuple(value for value in found.values() if isinstance(value, NetworkPolicy))
    return dataclasses.replace(world, pods=tuple(pods), policies=policies)


@pytest.mark.parametrize("seed", seeds(25))
def test_whoever_is_allowed_before_and_after_a_change_is_allowed_in_between(seed: int) -> None:
    generator = random.Random(seed)
    kernel = Kernel()
    policy = Policy(kernel)
    world = world_of(generator)
    policy.objects_changed(changes({}, objects(world)))
    join_all(policy, kernel, world)
    for _ in range(2):
        goal = objects(world_of(generator, world))
        keys = sorted(goal.keys() | objects(world).keys())
        generator.shuffle(keys)
        for key in keys:
            before = objects(world)
            found = {k: v for k, v in before.items() if k != key} | ({key: goal[key]} if key in goal else {})
            after = world_with(found, world)
            flows = [random_policies.flow(generator, world, OUTSIDE) for _ in range(30)]
            lasting = [f for f in flows if world.judge(f) is Judgement.ALLOWED is after.judge(f)]

            def observe(lasting: list[Flow] = lasting, after: PolicyWorld = after) -> None:
                for flow in lasting:
                    assert kernel.judge(flow, after) is Judgement.ALLOWED, f"seed {seed}: {flow}"

            change = changes(before, found)
            if generator.random() < 0.5:
                policy.check(change)
            kernel.observe = observe
            policy.objects_changed(change)
            kernel.observe = lambda: None
            for flow in flows:
                assert kernel.judge(flow, after) is after.judge(flow), f"seed {seed}: {flow}"
            world = after
    for number in range(len(world.pods)):
        del kernel.pods[number]
        policy.leave(number)
    policy.objects_changed(changes(objects(world), {}))
    assert (kernel.allowed, kernel.named) == (set(), {})


@pytest.mark.parametrize("seed", seeds(15))
def test_everything_may_change_at_once(seed: int) -> None:
    generator = random.Random(seed)
    kernel = Kernel()
    policy = Policy(kernel)
    world = world_of(generator)
    policy.objects_changed(changes({}, objects(world)))
    join_all(policy, kernel, world)
    for _ in range(4):
        after = world_of(generator, world)
        change = changes(objects(world), objects(after))
        epoch = kernel.node.epoch

        def observe(epoch: int = epoch) -> None:
            # Flows that are known are judged again with the epoch: after everything.
            assert kernel.node.epoch == epoch

        kernel.observe = observe
        policy.check(change)
        policy.objects_changed(change)
        kernel.observe = lambda: None
        assert kernel.node.epoch == epoch + 1
        for flow in [random_policies.flow(generator, after, OUTSIDE) for _ in range(60)]:
            assert kernel.judge(flow, after) is after.judge(flow), f"seed {seed}: {flow}"
        world = after


@pytest.mark.parametrize("seed", seeds(15))
def test_a_restart_writes_nothing_and_a_crash_is_finished(seed: int) -> None:
    generator = random.Random(seed)
    kernel = Kernel()
    world = world_of(generator)
    policy = Policy(kernel)
    policy.objects_changed(changes({}, objects(world)))
    join_all(policy, kernel, world)
    ready = [attachment(number, pod) for number, pod in enumerate(world.pods)]

    kernel.writes = 0
    again = Policy(kernel)
    again.recover(ready, objects(world))
    assert kernel.writes == 0
    assert [again.of(number) for number in range(len(ready))] == [kernel.pods[n] for n in range(len(ready))]

    # The rows said something new, and the agent died while it wrote; the next one finds both.
    after = world_of(generator, world)
    kernel.fail_after = generator.randrange(12)
    with contextlib.suppress(BpfError):
        again.objects_changed(changes(objects(world), objects(after)))
    kernel.fail_after = None
    flows = [random_policies.flow(generator, after, OUTSIDE) for _ in range(60)]
    Policy(kernel).recover(ready, objects(after))
    for flow in flows:
        assert kernel.judge(flow, after) is after.judge(flow), f"seed {seed}: {flow}"


@pytest.mark.parametrize("seed", seeds(10))
def test_what_failed_is_tried_again_with_the_next_change(seed: int) -> None:
    generator = random.Random(seed)
    kernel = Kernel()
    policy = Policy(kernel)
    world = world_of(generator)
    policy.objects_changed(changes({}, objects(world)))
    join_all(policy, kernel, world)
    after = world_of(generator, world)
    kernel.fail_after = generator.randrange(5)
    with contextlib.suppress(BpfError):
        policy.objects_changed(changes(objects(world), objects(after)))
    kernel.fail_after = None
    last = world_of(generator, world)
    policy.objects_changed(changes(objects(after), objects(last)))
    for flow in [random_policies.flow(generator, last, OUTSIDE) for _ in range(60)]:
        assert kernel.judge(flow, last) is last.judge(flow), f"seed {seed}: {flow}"


def one_policy(ingress: tuple[Rule, ...] | None = None, egress: tuple[Rule, ...] | None = None) -> NetworkPolicy:
    return NetworkPolicy("default", "one", Selector(), ingress, egress)


def two_pods() -> PolicyWorld:
    pods = (
        PolicyPod("default", "a", {}, {"app": "a"}, addresses(2)),
        PolicyPod("default", "b", {}, {"app": "b"}, addresses(3)),
    )
    return PolicyWorld(pods, NODE)


def test_full_maps_refuse_before_anything_is_written() -> None:
    kernel = Kernel(max_entries=20, max_prefixes=4)
    policy = Policy(kernel)
    world = two_pods()
    join_all(policy, kernel, world)
    first = one_policy((Rule(ports=(PolicyPort(Protocol.TCP, 80),)),))
    objects_before: dict[ObjectKey, Object] = {policy_key(first): first}
    policy.objects_changed(changes({}, objects_before))
    held = (set(kernel.allowed), dict(kernel.named), dict(kernel.pods))
    ports = one_policy((Rule(ports=tuple(PolicyPort(Protocol.TCP, port) for port in range(1000, 1025))),))
    blocks = one_policy((Rule(tuple(Peer(block=IpBlock(ipaddress.ip_network(f"192.0.2.{n}/32"))) for n in range(5))),))
    for value, word in ((ports, "policy.max_entries"), (blocks, "policy.max_prefixes")):
        with pytest.raises(ExhaustedError, match=word):
            policy.check(changes(objects_before, {policy_key(value): value}))
    assert held == (set(kernel.allowed), dict(kernel.named), dict(kernel.pods))
    # And everything goes on as before.
    flow = Flow(OUTSIDE[0], world.pods[0].addresses[0], 6, 80)
    assert kernel.judge(flow, world) is Judgement.ALLOWED
    policy.objects_changed(changes(objects_before, {}))
    assert kernel.pods[0][1:] == (0, 0)


def test_what_was_checked_and_not_committed_has_no_effect() -> None:
    kernel = Kernel()
    policy = Policy(kernel)
    world = two_pods()
    deny = one_policy(())
    policy.check(changes({}, {policy_key(deny): deny}))
    join_all(policy, kernel, world)
    assert {one[1:] for one in kernel.pods.values()} == {(0, 0)}
    a, b = world.pods
    assert policy.refusal(PodName("default", "a"), key_of(a, 4), PodName("default", "b"), key_of(b, 4)) is None


def test_leases_are_judged_as_udp_4791_from_connector_to_listener() -> None:
    kernel = Kernel()
    policy = Policy(kernel)
    world = two_pods()
    join_all(policy, kernel, world)
    a, b = world.pods

    def ask(one: PolicyPod, other: PolicyPod, version: int = 4) -> str | None:
        names = [PodName(pod.namespace, pod.name) for pod in (one, other)]
        return policy.refusal(names[0], key_of(one, version), names[1], key_of(other, version))

    assert ask(a, b) is None
    from_a = Peer(block=IpBlock(ipaddress.ip_network(f"{a.addresses[0]}/32")))
    value = one_policy((Rule((from_a,), (PolicyPort(Protocol.UDP, 4000, 5000),)),))
    policy.objects_changed(Changes({policy_key(value): value}))
    assert ask(a, b) is None
    assert "no ingress rule of default/b allows it, which default/one selects" in str(ask(a, b, 6))
    assert "no ingress rule of default/a allows it" in str(ask(b, a))
    value = one_policy(None, (Rule(ports=(PolicyPort(Protocol.TCP, 4791),)),))
    policy.objects_changed(Changes({policy_key(value): value}))
    assert "no egress rule of default/a allows it" in str(ask(a, b))
    assert ask(a, a) is None
    assert policy.status()[0]["policies"] == {"ingress": [], "egress": ["default/one"]}


def test_an_update_of_one_of_10_000_rules_takes_little() -> None:
    """Generous: the bound of 50 ms is measured by the acceptance proof, with the kernel's maps."""
    kernel = Kernel()
    policy = Policy(kernel)
    join_all(policy, kernel, two_pods())

    def rule(number: int, port: int) -> Rule:
        block = IpBlock(ipaddress.ip_network(((198 << 24 | 18 << 16) + number, 32)))
        return Rule((Peer(block=block),), (PolicyPort(Protocol.TCP, port),))

    before = one_policy(tuple(rule(number, 80) for number in range(10_000)))
    policy.objects_changed(Changes({policy_key(before): before}))
    assert len(kernel.allowed) == 10_000
    kernel.writes = 0
    after = dataclasses.replace(
        before, ingress=(*(before.ingress or ())[:5000], rule(5000, 81), *(before.ingress or ())[5001:])
    )
    started = time.perf_counter()
    policy.objects_changed(Changes({policy_key(after): after}))
    assert kernel.writes == 2
    assert time.perf_counter() - started < 1.0
