"""The compiled policy against the plain model of Kubernetes' semantics: random policies, changed again and again.

What is compared is what the datapath would find in its maps, so nothing here needs a kernel; tests/bpf/
test_differential.py asks the programs themselves.
"""

from __future__ import annotations

import ipaddress
from random import Random

import pytest

from rdmanet.model import IPAddress, PodName, address_key
from rdmanet.objects.values import Kind, ObjectKey
from rdmanet.policy.prefixes import Prefix
from rdmanet.policy.rulebook import Rulebook
from rdmanet.policy.values import PEER_ANY, PEER_IS_PREFIX, Entry, Member
from testbed.semantics import random_policies
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld

PODS = [(ipaddress.ip_address(f"10.90.0.{n}"), ipaddress.ip_address(f"fd90::{n:x}")) for n in range(7, 15)]
NODE = frozenset(map(ipaddress.ip_address, ("10.90.0.1", "fd90::1", "198.51.100.2", "2001:db8:100::2")))
OUTSIDE = tuple(map(ipaddress.ip_address, ("203.0.113.1", "203.0.113.200", "2001:db8:200::1", "2001:db8:200:8000::9")))
WORLDS, FLOWS = 60, 40
MAPPED_BITS = 96


class Maps:
    """The maps that the programs ask, looked up as the kernel does (the longest prefix)."""

    def __init__(self, book: Rulebook):
        self.policy: dict[tuple[int, int], set[Entry]] = {}
        for entry in book.wanted:
            self.policy.setdefault(entry[:2], set()).add(entry)
        self.prefixes = book.prefixes.numbers

    def class_of(self, address: IPAddress) -> int | None:
        """In the key space of the map, where IPv4 is mapped into IPv6."""
        key = int.from_bytes(address_key(address), "big")
        best: tuple[int, int] | None = None
        for prefix, number in self.prefixes.items():
            bits, value = _in_keys(prefix)
            if key >> (128 - bits) == value >> (128 - bits) and (best is None or bits > best[0]):
                best = bits, number
        return None if best is None else best[1]

    def allows(self, number: int, identity: int, address: IPAddress, flow: Flow) -> bool:
        """policy_allows() of bpf/policy.h."""
        if not number or (identity <= 1 and address in NODE):
            return True
        peers = [PEER_ANY, *([identity] if identity else [])]
        found = self.class_of(address)
        if found is not None:
            peers.append(PEER_IS_PREFIX | found)
        return any(self._matches(entry, flow) for peer in peers for entry in self.policy.get((number, peer), ()))

    @staticmethod
    def _matches(entry: Entry, flow: Flow) -> bool:
        _, _, bits, protocol, port = entry
        key, wanted = flow.protocol << 24 | (flow.port or 0), protocol << 24 | port
        # Bits after set and peer: the protocol's 8, 8 of padding, the port's 16.
        shift = 32 - (bits - 64)
        return key >> shift == wanted >> shift


def _in_keys(prefix: Prefix) -> tuple[int, int]:
    if prefix.version == 6:
        return prefix.length, prefix.network
    return MAPPED_BITS + prefix.length, 0xFFFF << 32 | prefix.network


def bring(book: Rulebook, before: PolicyWorld | None, after: PolicyWorld) -> None:
    """Enters what is different; a pod's number is its place."""
    for number, pod in enumerate(after.pods):
        book.set_member(number, member(pod))
    keys = {ObjectKey(Kind.NETWORK_POLICY, p.namespace, p.name): p for p in after.policies}
    for policy in before.policies if before else ():
        key = ObjectKey(Kind.NETWORK_POLICY, policy.namespace, policy.name)
        if key not in keys:
            book.remove_policy(key)
    for key, policy in keys.items():
        book.set_policy(key, policy)
    book.settle()


def member(pod: PolicyPod) -> Member:
    name = PodName(pod.namespace, pod.name)
    return Member(name, pod.addresses, pod.labels, pod.namespace_labels, frozenset(pod.ports))


def judged(book: Rulebook, world: PolicyWorld, flow: Flow) -> Judgement:
    """As the programs judge the flow's first packet."""
    maps = Maps(book)
    ends = [
        next((n for n, pod in enumerate(world.pods) if a in pod.addresses), None)
        for a in (flow.source, flow.destination)
    ]
    source, destination = [None if end is None else book.pod_policy(end) for end in ends]
    if source is not None:
        identity = destination.identity if destination is not None else 0
        if not maps.allows(source.egress_set, identity, flow.destination, flow):
            return Judgement.EGRESS
    if destination is not None:
        identity = source.identity if source is not None else 0
        if not maps.allows(destination.ingress_set, identity, flow.source, flow):
            return Judgement.INGRESS
    return Judgement.ALLOWED


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "random"])
def test_compiled_policies_say_what_kubernetes_means(fixed: bool) -> None:
    seed = 5 if fixed else Random().randrange(1 << 32)
    print(f"seed {seed}")
    random = Random(seed)
    book, before, seen = Rulebook(), None, set()
    for number in range(WORLDS):
        world, _ = random_policies.world(random, PODS, NODE, OUTSIDE)
        bring(book, before, world)
        fresh = Rulebook()
        bring(fresh, None, world)
        before = world
        for _ in range(FLOWS):
            flow = random_policies.flow(random, world, OUTSIDE)
            source, destination = world.pod_of(flow.source), world.pod_of(flow.destination)
            if source is not None and source is destination:
                continue  # never leaves the pod
            wanted = world.judge(flow)
            seen.add(wanted)
            assert judged(fresh, world, flow) == wanted, (seed, number, flow, world)
            assert judged(book, world, flow) == wanted, (seed, number, flow, world)
    assert seen == set(Judgement)
