"""The datapath's maps of policy in memory, observed after every single write, and attachments to go with them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterable, Mapping

from rdmanet.datapath.layout import AttachmentEntry, NodeEntry
from rdmanet.datapath.policy import PolicyEntry, PrefixKey
from rdmanet.errors import BpfError
from rdmanet.model import Attachment, AttachmentState, IPAddress, NetnsId, PodName, address_key
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import Kind, Namespace, NetworkPolicy, Object, ObjectKey, Pod
from rdmanet.policy import verdict
from rdmanet.policy.engine import _prefix
from rdmanet.policy.values import PodPolicy
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld


class Kernel:
    """``PolicyMaps`` and ``PolicyDatapath`` in one."""

    def __init__(self, max_entries: int = 1 << 18, max_prefixes: int = 1 << 16):
        self.max_entries, self.max_prefixes = max_entries, max_prefixes
        self.allowed: set[PolicyEntry] = set()
        self.named: dict[PrefixKey, int] = {}
        self.pods: dict[int, PodPolicy] = {}  # by attachment, of those whose entries are there
        self.node = NodeEntry(bytes(6), 1)
        self.writes = 0
        self.fail_after: int | None = None
        self.observe: Callable[[], None] = lambda: None

    @property
    def policy(self) -> Kernel:
        return self

    def _wrote(self) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise BpfError("The kernel refuses.", operation="test")
        self.writes += 1
        self.observe()

    def entries(self) -> list[PolicyEntry]:
        return list(self.allowed)

    def allow(self, entries: Collection[PolicyEntry]) -> None:
        for entry in entries:
            self.allowed.add(entry)
            self._wrote()

    def forbid(self, entries: Collection[PolicyEntry]) -> None:
        for entry in entries:
            self.allowed.discard(entry)
            self._wrote()

    def prefixes(self) -> dict[PrefixKey, int]:
        return dict(self.named)

    def set_prefixes(self, classes: Mapping[PrefixKey, int]) -> None:
        for key, number in classes.items():
            self.named[key] = number
            self._wrote()

    def delete_prefixes(self, prefixes: Iterable[PrefixKey]) -> None:
        for key in prefixes:
            self.named.pop(key, None)
            self._wrote()

    def attachments(self) -> dict[int, AttachmentEntry]:
        return {
            number: AttachmentEntry(number, bytes(6), identity=one[0], ingress_set=one[1], egress_set=one[2])
            for number, one in self.pods.items()
        }

    def set_policy(self, attachment_id: int, addresses: Iterable[bytes], policy: tuple[int, int, int]) -> None:
        if self.pods.get(attachment_id, policy) != policy:
            self.pods[attachment_id] = PodPolicy(*policy)
            self._wrote()

    def change_node(self, change: Callable[[NodeEntry], NodeEntry]) -> None:
        self.node = change(self.node)

    def judge(self, flow: Flow, world: PolicyWorld) -> Judgement:
        """As the programs do; identities by address, as the endpoints' entries have them."""
        if flow.source in world.node_addresses or flow.destination in world.node_addresses:
            return Judgement.ALLOWED
        ends: list[tuple[PodPolicy | None, IPAddress]] = []
        for address in (flow.source, flow.destination):
            pod = world.pod_of(address)
            ends.append((self.pods[world.pods.index(pod)] if pod else None, address))
        if world.pod_of(flow.source) is world.pod_of(flow.destination):
            return Judgement.ALLOWED
        classes = {_prefix(*key): number for key, number in self.named.items()}
        source, destination = ends
        found = verdict.refused(source, destination, flow.protocol, flow.port, self.allowed, classes)
        return Judgement.ALLOWED if found is None else Judgement(f"policy_{found.value}")


def attachment(number: int, pod: PolicyPod) -> Attachment:
    """Of a pod of the model."""
    ipv4, ipv6 = pod.addresses
    assert isinstance(ipv4, ipaddress.IPv4Address)
    assert isinstance(ipv6, ipaddress.IPv6Address)
    return Attachment(
        id=number,
        container_id=f"c{number}",
        ifname="eth0",
        network="net",
        netns=f"/run/netns/{number}",
        netns_id=NetnsId(4, number),
        pod=PodName(pod.namespace, pod.name),
        state=AttachmentState.READY,
        mac="02:72:00:00:00:01",
        mtu_bytes=1500,
        ipv4=ipv4,
        ipv6=ipv6,
        wants_rdma=True,
    )


def objects(world: PolicyWorld) -> dict[ObjectKey, Object]:
    """All objects of a world."""
    found: dict[ObjectKey, Object] = {}
    for pod in world.pods:
        found[namespace_key(pod)] = Namespace(pod.namespace, pod.namespace_labels)
        name = PodName(pod.namespace, pod.name)
        found[ObjectKey(Kind.POD, pod.namespace, pod.name)] = Pod(name, pod.labels, pod.ports)
    for policy in world.policies:
        found[policy_key(policy)] = policy
    return found


def namespace_key(pod: PolicyPod) -> ObjectKey:
    return ObjectKey(Kind.NAMESPACE, "", pod.namespace)


def policy_key(policy: NetworkPolicy) -> ObjectKey:
    return ObjectKey(Kind.NETWORK_POLICY, policy.namespace, policy.name)


def changes(before: Mapping[ObjectKey, Object], after: Mapping[ObjectKey, Object]) -> Changes:
    """From one to the other."""
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    return Changes(changed, {key: value for key, value in before.items() if key not in after}, after)


def key_of(pod: PolicyPod, version: int) -> bytes:
    """The address key."""
    return address_key(next(a for a in pod.addresses if a.version == version))
