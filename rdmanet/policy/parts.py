"""What the rulebook is made of, linked so that each part knows what depends on it."""

from __future__ import annotations

from rdmanet.objects.values import ContainerPort, IpBlock, NetworkPolicy, ObjectKey, Peer, Rule, Selector
from rdmanet.policy import matches
from rdmanet.policy.prefixes import Block, Prefix
from rdmanet.policy.values import Allowed, Direction, Member, PodPolicy


class Identity:
    """All pods that policies cannot tell apart: equal labels in a namespace, and equal names of ports."""

    __slots__ = ("labels", "members", "namespace", "namespace_labels", "number", "ports", "selected", "sets")

    def __init__(self, number: int, member: Member):
        self.number = number
        self.namespace = member.pod.namespace
        self.labels, self.namespace_labels, self.ports = member.labels, member.namespace_labels, member.ports
        self.members: set[int] = set()
        self.selected: set[Policied] = set()
        self.sets: dict[Direction, PolicySet | None] = dict.fromkeys(Direction)

    def pod_policy(self) -> PodPolicy:
        """The numbers."""
        ingress, egress = (self.sets[direction] for direction in (Direction.INGRESS, Direction.EGRESS))
        return PodPolicy(self.number, ingress.number if ingress else 0, egress.number if egress else 0)


class Pods:
    """Peers that are pods, and the identities that the selectors select."""

    __slots__ = ("identities", "namespace", "peer", "rules")

    def __init__(self, namespace: str, peer: Peer):
        self.namespace, self.peer = namespace, peer
        self.identities: set[Identity] = set()
        self.rules: dict[PolicyRule, None] = {}

    def selects(self, identity: Identity) -> bool:
        if self.peer.namespaces is None:
            if identity.namespace != self.namespace:
                return False
        elif not self.peer.namespaces.matches(identity.namespace_labels):
            return False
        return self.peer.pods is None or self.peer.pods.matches(identity.labels)


class Blocks(Block):
    """Peers that are addresses."""

    __slots__ = ("rules",)

    def __init__(self, block: IpBlock):
        super().__init__(block)
        self.rules: dict[PolicyRule, None] = {}


class Selection:
    """The pods that policies of a namespace select by one selector."""

    __slots__ = ("identities", "policies", "selector")

    def __init__(self, selector: Selector):
        self.selector = selector
        self.policies: set[Policied] = set()
        self.identities: set[Identity] = set()


class PolicyRule:
    """One rule of a policy, its peers resolved (None: everybody)."""

    __slots__ = ("alive", "direction", "hosts", "matches", "names", "peers", "policy", "value")

    def __init__(self, policy: Policied, direction: Direction, value: Rule):
        self.policy, self.direction, self.value = policy, direction, value
        self.alive = True
        self.peers: tuple[Pods | Blocks, ...] | None = None
        self.matches = matches.of_ports(value.ports) if value.ports else (matches.EVERYTHING,)
        self.names = tuple(port for port in value.ports if isinstance(port.port, str))
        #: Names of ports mean those of the pod that receives: classes of pods' addresses that blocks hold.
        self.hosts: dict[Prefix, frozenset[ContainerPort]] = {}

    @property
    def needs_hosts(self) -> bool:
        return bool(self.names) and self.direction is Direction.EGRESS and any(p.block for p in self.value.peers)


class Policied:
    """A policy, its rules resolved."""

    __slots__ = ("key", "named", "rules", "selection", "sets", "value")

    def __init__(self, key: ObjectKey, value: NetworkPolicy):
        self.key, self.value = key, value
        self.selection: Selection | None = None
        self.rules: dict[Direction, list[PolicyRule] | None] = dict.fromkeys(Direction)
        self.sets: dict[Direction, set[PolicySet]] = {direction: set() for direction in Direction}
        self.named = False  # whether ingress rules name ports, which are the selected pods' own


SetKey = tuple[Direction, frozenset["Policied"], frozenset[ContainerPort] | None]


class PolicySet:
    """What the same policies come to, for everybody whom they select (with the same ports, where that matters)."""

    __slots__ = ("given", "key", "number", "users")

    def __init__(self, number: int, key: SetKey):
        self.number, self.key = number, key
        self.users: set[Identity] = set()
        self.given: dict[PolicyRule, set[Allowed]] = {}

    @property
    def policies(self) -> frozenset[Policied]:
        return self.key[1]
