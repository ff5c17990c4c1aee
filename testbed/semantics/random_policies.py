"""Random pods, policies and flows, small enough to meet often, with everything that NetworkPolicy has."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from random import Random

from rdmanet.model import IPAddress, PodName
from rdmanet.objects.values import (
    ContainerPort,
    IpBlock,
    IPNetwork,
    Namespace,
    NetworkPolicy,
    Peer,
    Pod,
    PolicyPort,
    Protocol,
    Requirement,
    Rule,
    Selector,
)
from testbed.semantics.network_policy import Flow, PolicyPod, PolicyWorld

NAMESPACE_NAMES = ("default", "shop", "lab")
KEYS = ("app", "tier", "stage")
VALUES = ("a", "b", "")
PORT_NAMES = ("http", "dns", "admin")
#: Ports that rules and flows share; the last two are the ends of what there is.
PORTS = (53, 80, 443, 1000, 1023, 1024, 8080, 32767, 32768, 4791, 1, 65535)
NAME_LABEL = "kubernetes.io/metadata.name"
ICMP = {4: 1, 6: 58}


def namespaces(random: Random) -> dict[str, Namespace]:
    """By name, labelled as the API server would have them."""
    return {name: Namespace(name, {**labels(random), NAME_LABEL: name}) for name in NAMESPACE_NAMES}


def labels(random: Random) -> dict[str, str]:
    """Some, or none."""
    return {key: random.choice(VALUES) for key in KEYS if random.random() < 0.5}


def pods(
    random: Random, spaces: dict[str, Namespace], addresses: Sequence[tuple[IPAddress, ...]]
) -> tuple[PolicyPod, ...]:
    """One pod for each set of addresses. Several may have the same labels and other ports."""
    made: list[PolicyPod] = []
    for number, owned in enumerate(addresses):
        twin = random.choice(made) if made and random.random() < 0.3 else None
        namespace = twin.namespace if twin else random.choice(NAMESPACE_NAMES)
        own = twin.labels if twin else labels(random)
        made.append(
            PolicyPod(namespace, f"pod-{number}", spaces[namespace].labels, own, owned, container_ports(random))
        )
    return tuple(made)


def container_ports(random: Random) -> tuple[ContainerPort, ...]:
    """Some names, each for one port of a protocol; one name may stand for both TCP and UDP."""
    found = []
    for name in PORT_NAMES:
        for protocol in (Protocol.TCP, Protocol.UDP):
            if random.random() < 0.4:
                found.append(ContainerPort(name, random.choice(PORTS), protocol))
    return tuple(found)


def pod_object(pod: PolicyPod) -> Pod:
    """The object that says of the pod what policies ask."""
    return Pod(PodName(pod.namespace, pod.name), pod.labels, pod.ports)


def selector(random: Random) -> Selector:
    """Often everything; else up to two requirements."""
    return Selector(frozenset(requirement(random) for _ in range(random.choice((0, 0, 1, 1, 2)))))


def requirement(random: Random) -> Requirement:
    """One that some labels here meet, mostly."""
    operator = random.choice(("In", "In", "NotIn", "Exists", "DoesNotExist"))
    key = random.choice((*KEYS, "nobody-has-it", NAME_LABEL))
    if operator in ("Exists", "DoesNotExist"):
        return Requirement(key, operator)
    known = NAMESPACE_NAMES if key == NAME_LABEL else VALUES
    return Requirement(key, operator, frozenset(random.sample(known, random.randint(1, 2))))


def block(random: Random, around: Sequence[IPAddress]) -> IpBlock:
    """Around one of the addresses; exceptions lie inside, and some inside one another, and may be all of it."""
    address = random.choice(around)
    longest = address.max_prefixlen
    bits = random.choice((0, random.randint(0, longest), longest - random.randint(0, 8), longest))
    cidr = network(address, bits)
    excepted = []
    for _ in range(random.choice((0, 0, 1, 2, 3))):
        inside = [a for a in around if a in cidr]
        excepted.append(network(random.choice(inside), random.randint(bits, longest)))
    return IpBlock(cidr, tuple(excepted))


def network(address: IPAddress, bits: int) -> IPNetwork:
    """The prefix of so many bits that holds the address."""
    return ipaddress.ip_network((address, bits), strict=False)


def peer(random: Random, around: Sequence[IPAddress]) -> Peer:
    """Each of the shapes that a NetworkPolicyPeer may have."""
    match random.randrange(5):
        case 0 | 1:
            return Peer(block=block(random, around))
        case 2:
            return Peer(pods=selector(random))
        case 3:
            return Peer(namespaces=selector(random))
        case _:
            return Peer(pods=selector(random), namespaces=selector(random))


def policy_port(random: Random) -> PolicyPort:
    """A protocol alone, a number, a name, or a range."""
    protocol = random.choice((Protocol.TCP, Protocol.TCP, Protocol.UDP, Protocol.SCTP))
    match random.randrange(5):
        case 0:
            return PolicyPort(protocol)
        case 1 | 2:
            return PolicyPort(protocol, random.choice(PORTS))
        case 3:
            return PolicyPort(protocol, random.choice(PORT_NAMES))
        case _:
            first, last = sorted((random.choice(PORTS), random.choice((*PORTS, random.randint(1, 65535)))))
            return PolicyPort(protocol, first, last)


def rule(random: Random, around: Sequence[IPAddress]) -> Rule:
    """Without peers: everybody. Without ports: every port of every protocol."""
    peers = tuple(peer(random, around) for _ in range(random.choice((0, 1, 1, 2))))
    return Rule(peers, tuple(policy_port(random) for _ in range(random.choice((0, 0, 1, 2, 3)))))


def policy(random: Random, number: int, around: Sequence[IPAddress]) -> NetworkPolicy:
    """One of either direction, or both; an empty list of rules allows nothing."""
    directions = random.choice((("ingress",), ("egress",), ("ingress", "egress"), ("ingress", "egress"), ()))
    rules = {name: tuple(rule(random, around) for _ in range(random.choice((0, 1, 1, 2, 3)))) for name in directions}
    return NetworkPolicy(
        random.choice(NAMESPACE_NAMES),
        f"policy-{number}",
        selector(random),
        rules.get("ingress"),
        rules.get("egress"),
    )


def world(
    random: Random,
    addresses: Sequence[tuple[IPAddress, ...]],
    node_addresses: frozenset[IPAddress],
    outside: Sequence[IPAddress],
) -> tuple[PolicyWorld, dict[str, Namespace]]:
    """A node with a pod for each set of addresses, and up to 8 policies about these and about outside."""
    spaces = namespaces(random)
    everybody = pods(random, spaces, addresses)
    around = [address for owned in addresses for address in owned] + list(outside) + sorted(node_addresses, key=str)
    policies = tuple(policy(random, number, around) for number in range(random.randint(1, 8)))
    return PolicyWorld(everybody, node_addresses, policies), spaces


def flow(random: Random, world: PolicyWorld, outside: Sequence[IPAddress]) -> Flow:
    """From or to a pod; ports are near those of the rules."""
    version = random.choice((4, 6))
    pod_addresses = [a for pod in world.pods for a in pod.addresses if a.version == version]
    others = [a for a in (*outside, *sorted(world.node_addresses, key=str)) if a.version == version]
    ends = [random.choice(pod_addresses), random.choice(pod_addresses if random.random() < 0.6 else others)]
    random.shuffle(ends)
    if ends[0] == ends[1]:
        return flow(random, world, outside)
    protocol = random.choice((6, 6, 17, 17, 132, ICMP[version]))
    near = random.choice(PORTS) + random.choice((0, 0, 0, -1, 1))
    return Flow(ends[0], ends[1], protocol, None if protocol == ICMP[version] else max(1, min(near, 65535)))
