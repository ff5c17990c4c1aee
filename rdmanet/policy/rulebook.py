"""What pods, labels and policies come to: identities, sets, and the entries that say what each set allows.

Plain values in memory. Changes are entered one by one; ``settle`` then works out what follows, and only that: what it
takes is in proportion to what changed, not to all there is.
"""

from __future__ import annotations

from collections.abc import Iterable

from rdmanet.objects.values import ContainerPort, IpBlock, NetworkPolicy, ObjectKey, Peer, Rule, Selector
from rdmanet.policy import matches
from rdmanet.policy.parts import Blocks, Identity, Pods, Policied, PolicyRule, PolicySet, Selection, SetKey
from rdmanet.policy.prefixes import Block, Prefix, Prefixes, host_prefix
from rdmanet.policy.values import (
    FIRST_IDENTITY,
    PEER_ANY,
    PEER_IS_PREFIX,
    Allowed,
    Direction,
    Entry,
    Member,
    Numbers,
    PodPolicy,
)


def _value(policy: NetworkPolicy, direction: Direction) -> tuple[Rule, ...] | None:
    return policy.ingress if direction is Direction.INGRESS else policy.egress


class Rulebook:
    """All of it. Not for several threads at a time."""

    def __init__(self, numbers: Numbers | None = None):
        self._numbers = numbers or Numbers()
        self._next_identity = max(self._numbers.highest_identity + 1, FIRST_IDENTITY)
        self._next_set = self._numbers.highest_set + 1
        self._taken: dict[str, set[int]] = {"identity": set(), "ingress": set(), "egress": set()}
        self.prefixes = Prefixes(self._block_changed, self._numbers.classes, self._numbers.highest_class)
        #: How many rules allow each thing; and what came or went, until somebody has dealt with it.
        self.wanted: dict[Entry, int] = {}
        self.touched: set[Entry] = set()
        #: Members whose PodPolicy may be another one, likewise.
        self.moved: set[int] = set()
        self.members: dict[int, Member] = {}
        self.sets: dict[int, PolicySet] = {}  # by number
        self._identity_of: dict[int, Identity] = {}
        self._identities: dict[object, Identity] = {}
        self._in_namespace: dict[str, set[Identity]] = {}
        self._policies: dict[ObjectKey, Policied] = {}
        self._selections: dict[str, dict[Selector, Selection]] = {}
        self._pods: dict[tuple[str, Peer], Pods] = {}
        self._blocks: dict[IpBlock, Blocks] = {}
        self._by_key: dict[SetKey, PolicySet] = {}
        self._named_everybody: dict[PolicyRule, None] = {}  # egress rules by name to everybody
        self._with_hosts: dict[PolicyRule, None] = {}
        self._hosts_changed = False
        self._dirty_identities: dict[Identity, None] = {}
        self._dirty: dict[tuple[PolicySet, PolicyRule], None] = {}

    # Pods

    def set_member(self, number: int, member: Member) -> None:
        """An attachment is there, or its labels are others now."""
        before = self.members.get(number)
        if before == member:
            return
        self.members[number] = member
        key = (
            member.pod.namespace,
            frozenset(member.namespace_labels.items()),
            frozenset(member.labels.items()),
            member.ports,
        )
        identity = self._identities.get(key)
        if identity is None:
            identity = self._identities[key] = self._new_identity(number, member)
        if member.ports or (before is not None and before.ports):
            self._hosts_changed = True
        old = self._identity_of.get(number)
        if old is identity:
            return
        if old is not None:
            self._leave(number, old)
        identity.members.add(number)
        self._identity_of[number] = identity
        self.moved.add(number)

    def remove_member(self, number: int) -> None:
        """The attachment is gone. Idempotent."""
        member = self.members.pop(number, None)
        if member is not None:
            self._hosts_changed = self._hosts_changed or bool(member.ports)
            self._leave(number, self._identity_of.pop(number))
            self.moved.add(number)

    def _leave(self, number: int, identity: Identity) -> None:
        identity.members.discard(number)
        if not identity.members:
            self._dirty_identities[identity] = None  # goes when everything is settled, if nobody comes

    def _new_identity(self, number: int, member: Member) -> Identity:
        wanted = self._numbers.members.get(number)
        value = self._preferred("identity", wanted.identity if wanted else 0)
        if not value:
            value, self._next_identity = self._next_identity, self._next_identity + 1
        identity = Identity(value, member)
        self._in_namespace.setdefault(identity.namespace, set()).add(identity)
        for selection in self._selections.get(identity.namespace, {}).values():
            if selection.selector.matches(identity.labels):
                selection.identities.add(identity)
                identity.selected |= selection.policies
        for pods in self._pods.values():
            if pods.selects(identity):
                pods.identities.add(identity)
                self._rules_changed(pods.rules)
        if identity.ports:
            self._rules_changed(self._named_everybody)
        self._dirty_identities[identity] = None
        return identity

    def _preferred(self, kind: str, number: int) -> int:
        """The number, if it is one and nobody has taken it; else 0. Each is given once only."""
        if not number or number in self._taken[kind]:
            return 0
        self._taken[kind].add(number)
        return number

    def _drop_identity(self, identity: Identity) -> None:
        key = (
            identity.namespace,
            frozenset(identity.namespace_labels.items()),
            frozenset(identity.labels.items()),
            identity.ports,
        )
        del self._identities[key]
        same = self._in_namespace[identity.namespace]
        same.discard(identity)
        if not same:
            del self._in_namespace[identity.namespace]
        for policy in identity.selected:
            assert policy.selection is not None
            policy.selection.identities.discard(identity)
        identity.selected.clear()
        for pods in self._pods.values():
            if identity in pods.identities:
                pods.identities.discard(identity)
                self._rules_changed(pods.rules)
        if identity.ports:
            self._rules_changed(self._named_everybody)

    # Policies

    def set_policy(self, key: ObjectKey, value: NetworkPolicy) -> None:
        """A policy is there, or says something else now."""
        policy = self._policies.get(key)
        if policy is None:
            policy = self._policies[key] = Policied(key, value)
        before, policy.value = policy.value, value
        if policy.selection is None or before.pods != value.pods:
            self._select(policy, value.pods)
        named = policy.named
        isolating = [policy.rules[direction] is None for direction in Direction]
        for direction in Direction:
            self._replace_rules(policy, direction, _value(value, direction))
        policy.named = any(rule.names for rule in policy.rules[Direction.INGRESS] or ())
        if named != policy.named or isolating != [policy.rules[direction] is None for direction in Direction]:
            assert policy.selection is not None
            self._dirty_identities |= dict.fromkeys(policy.selection.identities)

    def remove_policy(self, key: ObjectKey) -> None:
        """The policy is gone. Idempotent."""
        policy = self._policies.pop(key, None)
        if policy is None:
            return
        self._unselect(policy)
        for direction in Direction:
            self._replace_rules(policy, direction, None)

    def policy(self, key: ObjectKey) -> NetworkPolicy | None:
        """What a policy says."""
        policy = self._policies.get(key)
        return None if policy is None else policy.value

    def _select(self, policy: Policied, selector: Selector) -> None:
        self._unselect(policy)
        namespace = policy.value.namespace
        selections = self._selections.setdefault(namespace, {})
        selection = selections.get(selector)
        if selection is None:
            selection = selections[selector] = Selection(selector)
            same = self._in_namespace.get(namespace, set())
            selection.identities = {identity for identity in same if selector.matches(identity.labels)}
        selection.policies.add(policy)
        policy.selection = selection
        for identity in selection.identities:
            identity.selected.add(policy)
            self._dirty_identities[identity] = None

    def _unselect(self, policy: Policied) -> None:
        selection, policy.selection = policy.selection, None
        if selection is None:
            return
        for identity in selection.identities:
            identity.selected.discard(policy)
            self._dirty_identities[identity] = None
        selection.policies.discard(policy)
        if not selection.policies:
            del self._selections[policy.value.namespace][selection.selector]

    def _replace_rules(self, policy: Policied, direction: Direction, values: tuple[Rule, ...] | None) -> None:
        """Keeps the rules at the beginning and at the end that are as before: of thousands mostly one has changed."""
        old, new = policy.rules[direction] or [], values or ()
        first, shorter = 0, min(len(old), len(new))
        while first < shorter and old[first].value == new[first]:
            first += 1
        last = 0
        while last < shorter - first and old[-1 - last].value == new[-1 - last]:
            last += 1
        # What comes before what goes: a block that both have keeps its classes.
        added = [self._begin_rule(policy, direction, value) for value in new[first : len(new) - last]]
        for rule in old[first : len(old) - last]:
            self._end_rule(rule)
        rules = [*old[:first], *added, *old[len(old) - last :]]
        policy.rules[direction] = None if values is None else rules

    def _begin_rule(self, policy: Policied, direction: Direction, value: Rule) -> PolicyRule:
        rule = PolicyRule(policy, direction, value)
        if value.peers:
            rule.peers = tuple(self._peers(policy.value.namespace, peer) for peer in value.peers)
            for peers in rule.peers:
                peers.rules[rule] = None
        elif rule.names and direction is Direction.EGRESS:
            self._named_everybody[rule] = None
        if rule.needs_hosts:
            self._with_hosts[rule] = None
            self._hosts_changed = True
        self._rules_changed([rule])
        return rule

    def _end_rule(self, rule: PolicyRule) -> None:
        rule.alive = False
        self._rules_changed([rule])
        for peer, peers in zip(rule.value.peers, rule.peers or (), strict=True):
            peers.rules.pop(rule, None)
            if peers.rules:
                continue
            if isinstance(peers, Blocks):
                assert peer.block is not None
                if self._blocks.pop(peer.block, None) is not None:
                    self.prefixes.remove_block(peers)
            else:
                self._pods.pop((peers.namespace, peers.peer), None)
        self._named_everybody.pop(rule, None)
        self._with_hosts.pop(rule, None)
        for prefix in rule.hosts:
            self.prefixes.release(prefix)
        rule.hosts = {}

    def _peers(self, namespace: str, peer: Peer) -> Pods | Blocks:
        if peer.block is not None:
            block = self._blocks.get(peer.block)
            if block is None:
                block = self._blocks[peer.block] = Blocks(peer.block)
                self.prefixes.add_block(block)
            return block
        pods = self._pods.get((namespace, peer))
        if pods is None:
            pods = self._pods[namespace, peer] = Pods(namespace, peer)
            pods.identities = {identity for identity in self._identities.values() if pods.selects(identity)}
        return pods

    def _block_changed(self, block: Block) -> None:
        assert isinstance(block, Blocks)
        self._rules_changed(block.rules)

    def _rules_changed(self, rules: Iterable[PolicyRule]) -> None:
        for rule in rules:
            for one in rule.policy.sets[rule.direction]:
                self._dirty[one, rule] = None

    # What follows

    def settle(self) -> None:
        """Brings ``wanted`` and everybody's sets to what has been entered."""
        for identity in [identity for identity in self._dirty_identities if not identity.members]:
            self._drop_identity(identity)
        changed, self._dirty_identities = self._dirty_identities, {}
        for direction in Direction:
            self._assign(direction, changed)
        if self._hosts_changed:
            self._hosts_changed = False
            for rule in self._with_hosts:
                self._find_hosts(rule)
        dirty, self._dirty = self._dirty, {}
        for one, rule in dirty:
            if self.sets.get(one.number) is one and rule.policy in one.policies:
                self._give(one, rule, self._allowed(one, rule) if rule.alive else set())

    def _assign(self, direction: Direction, identities: Iterable[Identity]) -> None:
        moves: dict[SetKey | None, list[Identity]] = {}
        for identity in identities:
            key = self._key_of(identity, direction)
            own = identity.sets[direction]
            if (own.key if own is not None else None) != key:
                moves.setdefault(key, []).append(identity)
        # Sets that are there and wanted stay, whoever leaves them; only then others are changed or made.
        there = {key: self._by_key[key] for key in moves if key is not None and key in self._by_key}
        wanted = set(there.values())
        left: dict[PolicySet, None] = {}
        for key, moving in moves.items():
            target = None if key is None else there.get(key) or self._set_for(key, moving, wanted)
            for identity in moving:
                before, identity.sets[direction] = identity.sets[direction], target
                if before is not None and before is not target:
                    before.users.discard(identity)
                    left[before] = None
                if target is not None:
                    target.users.add(identity)
                self.moved |= identity.members
        for one in left:
            if not one.users:
                self._drop_set(one)

    def _key_of(self, identity: Identity, direction: Direction) -> SetKey | None:
        policies = frozenset(policy for policy in identity.selected if policy.rules[direction] is not None)
        if not policies:
            return None
        named = direction is Direction.INGRESS and any(policy.named for policy in policies)
        return direction, policies, identity.ports if named else None

    def _set_for(self, key: SetKey, moving: list[Identity], wanted: set[PolicySet]) -> PolicySet:
        """A new set; or the one that all its users leave together for this: then only what differs is written."""
        direction, policies, ports = key
        for identity in moving:
            before = identity.sets[direction]
            if before is None or before in wanted or not before.users.issubset(moving):
                continue
            gone = before.policies - policies
            for rule in [rule for rule in before.given if rule.policy in gone]:
                self._give(before, rule, set())
            for policy in gone:
                policy.sets[direction].discard(before)
            again = policies if ports != before.key[2] else policies - before.policies
            del self._by_key[before.key]
            before.key = key
            self._enter(before, again)
            return before
        number = 0
        for identity in moving:
            for member in identity.members:
                was = self._numbers.members.get(member)
                if was is not None and not number:
                    number = self._preferred(
                        direction.value, was.ingress_set if direction is Direction.INGRESS else was.egress_set
                    )
        if not number or number in self.sets:
            number, self._next_set = self._next_set, self._next_set + 1
        one = self.sets[number] = PolicySet(number, key)
        self._enter(one, policies)
        return one

    def _enter(self, one: PolicySet, policies: Iterable[Policied]) -> None:
        self._by_key[one.key] = one
        direction = one.key[0]
        for policy in policies:
            policy.sets[direction].add(one)
            for rule in policy.rules[direction] or ():
                self._dirty[one, rule] = None

    def _drop_set(self, one: PolicySet) -> None:
        for rule in list(one.given):
            self._give(one, rule, set())
        for policy in one.policies:
            policy.sets[one.key[0]].discard(one)
        del self._by_key[one.key], self.sets[one.number]

    def _give(self, one: PolicySet, rule: PolicyRule, allowed: set[Allowed]) -> None:
        before = one.given.get(rule, set())
        for peer, match in allowed - before:
            entry = (one.number, peer, *match)
            count = self.wanted[entry] = self.wanted.get(entry, 0) + 1
            if count == 1:
                self.touched.add(entry)
        for peer, match in before - allowed:
            entry = (one.number, peer, *match)
            self.wanted[entry] -= 1
            if not self.wanted[entry]:
                del self.wanted[entry]
                self.touched.add(entry)
        if allowed:
            one.given[rule] = allowed
        else:
            one.given.pop(rule, None)

    def _find_hosts(self, rule: PolicyRule) -> None:
        """The pods in a rule's blocks that have ports by its names."""
        names = {(port.port, port.protocol) for port in rule.names}
        blocks = [peers for peers in rule.peers or () if isinstance(peers, Blocks)]
        found: dict[Prefix, frozenset[ContainerPort]] = {}
        for member in self.members.values():
            if any((port.name, port.protocol) in names for port in member.ports):
                for prefix in map(host_prefix, member.addresses):
                    if any(block.holds(prefix) for block in blocks):
                        found[prefix] = member.ports
        if found == rule.hosts:
            return
        before, rule.hosts = rule.hosts, found
        for prefix in found.keys() - before.keys():
            self.prefixes.acquire(prefix)
        for prefix in before.keys() - found.keys():
            self.prefixes.release(prefix)
        self._rules_changed([rule])

    def _allowed(self, one: PolicySet, rule: PolicyRule) -> set[Allowed]:
        own = rule.matches
        if rule.names and rule.direction is Direction.INGRESS:
            own = (*own, *(m for port in rule.names for m in matches.of_name(port, one.key[2] or ())))
        if rule.peers is None:
            found = {(PEER_ANY, match) for match in own}
            pods: Iterable[Identity] = self._identities.values()
        else:
            numbers: set[int] = set()
            pods = []
            for peers in rule.peers:
                if isinstance(peers, Blocks):
                    numbers.update(PEER_IS_PREFIX | number for number in peers.classes)
                else:
                    numbers.update(identity.number for identity in peers.identities)
                    pods.extend(peers.identities)
            found = {(number, match) for number in numbers for match in own}
        if rule.names and rule.direction is Direction.EGRESS:
            for port in rule.names:
                found |= {(i.number, match) for i in pods for match in matches.of_name(port, i.ports)}
                for prefix, ports in rule.hosts.items():
                    number = PEER_IS_PREFIX | self.prefixes.numbers[prefix]
                    found |= {(number, match) for match in matches.of_name(port, ports)}
        return found

    # What others ask

    def differs(self) -> bool:
        """Whether anything has changed that somebody must deal with."""
        return bool(self.touched or self.moved or self.prefixes.touched)

    def pod_policy(self, number: int) -> PodPolicy:
        """Of a member."""
        return self._identity_of[number].pod_policy()

    def selecting(self, number: int, direction: Direction) -> list[str]:
        """The policies that select a member in a direction, as namespace/name."""
        identity = self._identity_of.get(number)
        one = identity.sets[direction] if identity else None
        return sorted(f"{policy.key.namespace}/{policy.key.name}" for policy in one.policies) if one else []
