"""The steps that make an attachment, in order, each with its idempotent undo.

Undo takes back also what a crash left half-made, and works when the pod's namespace is gone. No step keeps a
descriptor of the pod's namespace. The link, and with it what hangs on it, is removed last and apart
(``rdmanet.removal``): that takes the kernel long.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rdmanet import alias, ipam
from rdmanet.datapath.layout import AttachmentEntry, EndpointEntry
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import ConflictError, NotFoundError, UnavailableError
from rdmanet.model import GATEWAY_MAC, Attachment, Backend, GuardMode, IPAddress, NetnsId, address_key
from rdmanet.netlink import messages, namespace
from rdmanet.netlink.batch import BatchSocket, BatchSockets
from rdmanet.netlink.namespace import Listening
from rdmanet.node import NodeNetwork
from rdmanet.policy.values import PodPolicy
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.reserve import Reserve
from rdmanet.store import Store

LOOPBACK_INDEX = 1
FILTER_NAME = "rdmanet/pod"
LINK_LOCAL_GATEWAY = ipaddress.IPv6Address("fe80::1")
_EVERYTHING = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))


class Listeners(Protocol):
    """The lease sockets inside the pods' namespaces (``rdmanet.pods``)."""

    def listen(self, netns: NetnsId) -> Listening:
        """Makes the pod's listening socket where it has none; called by a thread inside the namespace."""

    def open(self, *opened: tuple[Attachment, Listening]) -> None:
        """Knows the attachments from now on, and serves their pods' sockets."""

    def close(self, attachment: Attachment) -> None:
        """Forgets the attachment; closes the pod's listener with its last one. Ends leases. Idempotent."""


class Limits(Protocol):
    """What the kernel enforces on pods' cgroups (``rdmanet.limits``)."""

    def add(self, attachment: Attachment, cgroup_path: str | None) -> Attachment:
        """Limits a new attachment with a device, where its pod's cgroup is known; returns it with its cgroup."""

    def remove(self, attachment: Attachment) -> None:
        """Takes its limits back, whatever of them was made. Idempotent."""

    def adopt(self, attachments: Sequence[Attachment]) -> None:
        """Knows attachments that are ready, and puts their limits right."""


class Policies(Protocol):
    """Who may talk to whom (``rdmanet.policy.engine``)."""

    def join(self, attachment: Attachment, write: Callable[[PodPolicy], None]) -> PodPolicy:
        """Makes what policy says of the attachment; ``write`` writes its entries before anything changes again."""

    def of(self, attachment_id: int) -> PodPolicy:
        """What its entries say."""

    def leave(self, attachment_id: int) -> None:
        """Its entries are gone. Idempotent."""


class LocalBackends(Protocol):
    """Services, some of whose backends are on this host (``rdmanet.services.engine``)."""

    def local(self, addresses: Iterable[IPAddress], *, present: bool) -> None:
        """These addresses are on this host now, or no more. Idempotent."""


class Slots(Protocol):
    """What containers get by their slots (``rdmanet.slots``)."""

    def give(self, attachment: Attachment, descriptor: int) -> None:
        """Lets the container of the attachment's slot have its device."""

    def problem(self, attachment: Attachment) -> str | None:
        """Why a container would not get it, a sentence without its end; None where it would, or has no slot."""

    def withdraw(self, attachment: Attachment) -> None:
        """No further container gets it. Idempotent."""

    def free(self, attachment: Attachment) -> None:
        """Another attachment may have the slot: its device is gone. Idempotent."""


class HostEnds:
    """Which index the host's end of each attachment has, so that nobody has to look through all entries for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index: dict[int, int] = {}
        self._attachment: dict[int, int] = {}

    def set(self, attachment_id: int, ifindex: int) -> None:
        """Remembers; whoever had the index before has it no more (the kernel may use one again)."""
        with self._lock:
            self._index[attachment_id] = ifindex
            self._attachment[ifindex] = attachment_id

    def owner(self, ifindex: int) -> int | None:
        """Whose host's end has that index, or None."""
        return self._attachment.get(ifindex)

    def get(self, attachment_id: int) -> int | None:
        """The index, or None where it is not known or another's by now."""
        with self._lock:
            ifindex = self._index.get(attachment_id)
            return ifindex if ifindex is not None and self._attachment.get(ifindex) == attachment_id else None

    def forget(self, attachment_id: int) -> None:
        """The attachment is gone."""
        with self._lock:
            ifindex = self._index.pop(attachment_id, None)
            if ifindex is not None and self._attachment.get(ifindex) == attachment_id:
                del self._attachment[ifindex]


@dataclass(slots=True)
class Parts:
    """What steps work with. ``host`` is rtnetlink of the host's namespace; ``network`` becomes another one when the
    node's links have changed (``rdmanet.nodesetup``)."""

    store: Store
    network: NodeNetwork
    datapath: Datapath
    devices: DeviceBackend | None
    listeners: Listeners
    limits: Limits
    slots: Slots
    policy: Policies
    services: LocalBackends
    host: BatchSockets
    host_ends: HostEnds
    reserve: Reserve


@dataclass(slots=True)
class Making:
    """What the steps of one ADD tell each other: the pod's namespace, the indexes of both ends, the new socket.

    ``make_room`` waits until what a DEL has left of the pod's interface is gone; False where there is nothing.
    ``cgroup_path`` is the pod's cgroup, where the runtime says it.
    """

    descriptor: int
    make_room: Callable[[], bool]
    cgroup_path: str | None = None
    host_ifindex: int = 0
    pod_ifindex: int = 0
    netns_cookie: int = 0
    listening: Listening = dataclasses.field(default_factory=Listening)


class Step(Protocol):
    """One effect, or a group of effects that go together."""

    name: str

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        """Makes the effect; returns the attachment, with what became known."""


class Cut(Step, Protocol):
    """A step that is undone by itself. The others' effects go with the link."""

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        """Takes it back, whatever of it was made; ``descriptor`` is None where the pod's namespace is gone."""


class LinkStep:
    """The veth pair, its far end straight in the pod's namespace."""

    name = "link"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        name = attachment.host_ifname
        batch = (
            messages.add_veth(
                name,
                GATEWAY_MAC,
                attachment.mtu_bytes,
                peer_name=attachment.ifname,
                peer_mac=attachment.mac,
                peer_namespace=making.descriptor,
            ),
            messages.set_alias(name, alias.of_attachment(attachment)),
            messages.get_link(name),
        )
        try:
            try:
                *_, reply = parts.host.send(batch)
            except ConflictError:
                (left,) = parts.host.exchange([messages.get_link(name)])
                if not left.errno:
                    # Ids are never used twice: a link of this name is left from a database that was lost.
                    parts.host.send([messages.delete_link(name)])
                elif not making.make_room():
                    raise
                *_, reply = parts.host.send(batch)
        except ConflictError as error:
            raise ConflictError(
                f"The interface {attachment.ifname} exists already in {attachment.netns}.",
                operation=error.operation,
                subject=attachment.ifname,
                errno=error.errno,
            ) from error
        link = messages.link(reply.payloads[0])
        if link.peer_index is None:
            raise NotFoundError(f"{attachment.ifname} vanished from the pod.", subject=attachment.ifname)
        making.host_ifindex, making.pod_ifindex = link.index, link.peer_index
        parts.host_ends.set(attachment.id, link.index)
        return attachment


def next_hop(subnet: ipam.IPNetwork) -> IPAddress:
    """Through which address a pod's routes lead; its MAC is the gateway's.

    IPv6 takes a gateway only where no other interface's route covers it (net/ipv6/route.c,
    ip6_route_check_nh_onlink); a link-local one is each interface's own.
    """
    return LINK_LOCAL_GATEWAY if subnet.version == 6 else ipam.gateway(subnet)


class AddressStep:
    """One visit of the pod's namespace: addresses, permanent neighbours for the gateways, routes, and the listening
    socket."""

    name = "addresses"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        batch = _inside(parts.network, attachment, making.pod_ifindex)

        def visit() -> tuple[Listening, int]:
            with BatchSocket() as pod:
                pod.send(batch)
            cookie = namespace.own_cookie()
            return parts.listeners.listen(attachment.netns_id), cookie

        making.listening, making.netns_cookie = namespace.run_inside(making.descriptor, visit)
        return attachment


class Way(NamedTuple):
    """How one family of an attachment gets out of its pod: its address, the gateway, and routes through it by
    destination, with the MTU that they carry."""

    address: IPAddress
    gateway: IPAddress
    routes: dict[ipam.IPNetwork, int | None]


def ways(network: NodeNetwork, attachment: Attachment) -> list[Way]:
    """What an attachment has inside its pod, beside the interface."""
    default_mtu = network.outside_mtu_bytes if attachment.mtu_bytes > network.outside_mtu_bytes else None
    found = []
    for address in attachment.addresses:
        subnet = network.ipv4_range if address.version == 4 else network.ipv6_range
        # Local pods get the interface's whole MTU, the outside no more than what fits through the uplink.
        routes: dict[ipam.IPNetwork, int | None] = {} if default_mtu is None else {subnet: None}
        routes[_EVERYTHING[0] if address.version == 4 else _EVERYTHING[1]] = default_mtu
        found.append(Way(address, next_hop(subnet), routes))
    return found


def _inside(network: NodeNetwork, attachment: Attachment, index: int) -> list[messages.Message]:
    """What is sent inside the pod."""
    batch = [messages.set_up(LOOPBACK_INDEX), messages.set_up(index)]
    for address, gateway, routes in ways(network, attachment):
        batch.append(messages.add_address(index, address, address.max_prefixlen))
        batch.append(messages.add_permanent_neighbour(index, gateway, GATEWAY_MAC))
        # Plugins behind ours take the result's gateway for a neighbour (sbr makes routes through it).
        shown = ipam.gateway(network.ipv4_range if address.version == 4 else network.ipv6_range)
        alone = ipaddress.ip_network(f"{shown}/{shown.max_prefixlen}")
        batch.append(messages.add_route(alone, index, metric=index))
        if shown != gateway:
            batch.append(messages.add_permanent_neighbour(index, shown, GATEWAY_MAC))
        for destination, mtu_bytes in routes.items():
            # A pod may have several interfaces, with the same routes. The first made is preferred; what is bound to
            # another one (an RDMA device is) finds its own.
            batch.append(messages.add_route(destination, index, gateway=gateway, mtu_bytes=mtu_bytes, metric=index))
    return batch


class FilterStep:
    """The pod hook's dispatcher at the host end's tc ingress, and the host's end up."""

    name = "filter"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        parts.host.send(filter_messages(parts.datapath, making.host_ifindex))
        return attachment


def filter_messages(datapath: Datapath, host_ifindex: int) -> list[messages.Message]:
    """Puts the dispatcher in place; replaces what is there without loss. Then the host's end up."""
    return [
        messages.add_clsact(host_ifindex),
        messages.set_ingress_filter(host_ifindex, datapath.dispatcher("pod"), FILTER_NAME),
        messages.no_link_local(host_ifindex),
        messages.set_up(host_ifindex),
    ]


class DeviceStep:
    """The RDMA device, where the attachment wants one."""

    name = "device"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        if not attachment.wants_rdma:
            return attachment
        if parts.devices is None:
            raise UnavailableError(
                'This host has no RDMA to give to pods; `rdmanet doctor` says what is missing. Leave "rdma" away'
                " in the network"
                " configuration, or move the pod."
            )
        device = parts.devices.create(attachment, making.descriptor)
        parts.store.set_device(attachment.id, device)
        return dataclasses.replace(attachment, device=device)

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        if attachment.wants_rdma and parts.devices is not None:
            parts.devices.remove(attachment, descriptor)


class SlotStep:
    """What the runtime gives to the container that has the attachment's slot, where it has one."""

    name = "slot"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        if attachment.slot is not None:
            parts.slots.give(attachment, making.descriptor)
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        if attachment.slot is not None:
            parts.slots.withdraw(attachment)


class LimitsStep:
    """The pod's cgroup may open its own device alone, and so many objects of it."""

    name = "limits"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        return parts.limits.add(attachment, making.cgroup_path)

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        if attachment.wants_rdma:
            parts.limits.remove(attachment)


class ListenerStep:
    """The lease socket goes to the broker."""

    name = "listener"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        listening, making.listening = making.listening, Listening()
        parts.listeners.open((attachment, listening))
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        parts.listeners.close(attachment)


class EndpointStep:
    """The datapath's entries: from here on traffic flows, and with their removal it stops."""

    name = "endpoint"

    def apply(self, parts: Parts, attachment: Attachment, making: Making) -> Attachment:
        parts.datapath.enter_namespace(making.netns_cookie, attachment.id)
        datapath, ifindex = parts.datapath, making.host_ifindex
        parts.policy.join(attachment, lambda policy: set_entries(datapath, attachment, ifindex, policy))
        parts.services.local(attachment.addresses, present=True)
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        datapath = parts.datapath
        parts.services.local(attachment.addresses, present=False)
        for address in attachment.addresses:
            datapath.delete_endpoint(address_key(address))
        ifindex = parts.host_ends.get(attachment.id)
        if ifindex is not None:
            datapath.delete_attachment(ifindex)
        datapath.leave_namespace(attachment.id)
        parts.policy.leave(attachment.id)


def set_entries(datapath: Datapath, attachment: Attachment, ifindex: int, policy: PodPolicy) -> None:
    """Writes the attachment's entries; first what they refer to, those of endpoints last: they let packets in."""
    own, endpoint = entries(attachment, ifindex, policy)
    datapath.set_bandwidth(attachment.id, attachment.bandwidth)
    datapath.set_attachment(ifindex, own)
    for address in attachment.addresses:
        datapath.set_endpoint(address_key(address), endpoint)


def entries(attachment: Attachment, ifindex: int, policy: PodPolicy) -> tuple[AttachmentEntry, EndpointEntry]:
    """What the datapath should hold for an attachment."""
    mac = bytes.fromhex(attachment.mac.replace(":", ""))
    enforce = attachment.guard is GuardMode.ENFORCE
    # A device that it shares has another netdev: what looks like RoCE on the attachment's own is made by hand.
    shared = attachment.device is not None and attachment.device.backend is Backend.SHARED
    roce = attachment.wants_rdma and not shared
    own = AttachmentEntry(
        attachment_id=attachment.id,
        mac=mac,
        ipv4=address_key(attachment.ipv4) if attachment.ipv4 else bytes(16),
        ipv6=address_key(attachment.ipv6) if attachment.ipv6 else bytes(16),
        device=roce,
        enforce=enforce,
        traffic_class=attachment.traffic_class,
        identity=policy.identity,
        ingress_set=policy.ingress_set,
        egress_set=policy.egress_set,
        limited=attachment.bandwidth.egress is not None,
    )
    endpoint = EndpointEntry(
        ifindex=ifindex,
        mac=mac,
        attachment_id=attachment.id,
        device=roce,
        enforce=enforce,
        identity=policy.identity,
        ingress_set=policy.ingress_set,
        egress_set=policy.egress_set,
        limited=attachment.bandwidth.ingress is not None,
    )
    return own, endpoint


#: In the order in which a DEL undoes them: traffic is cut first.
CUTS: tuple[Cut, ...] = (EndpointStep(), ListenerStep(), LimitsStep(), SlotStep(), DeviceStep())

#: In the order of ADD.
STEPS: tuple[Step, ...] = (
    LinkStep(),
    # The host's end comes up here. The pod's end then finds its carrier and can send the moment it is up, instead of
    # when the kernel's link watch gets round to it.
    FilterStep(),
    AddressStep(),
    *reversed(CUTS),
)

#: Called with a step's name and "apply" or "undo" before each effect: where tests kill the agent.
FaultPoint = Callable[[str], None]


def no_fault(point: str) -> None:
    """The fault point of a running agent."""


def apply_all(parts: Parts, attachment: Attachment, making: Making, before: FaultPoint) -> Attachment:
    """Makes every effect. What was made before one failed is the caller's to undo."""
    try:
        for step in STEPS:
            before(f"apply {step.name}")
            attachment = step.apply(parts, attachment, making)
    finally:
        making.listening.close()
    return attachment


def cut(parts: Parts, attachment: Attachment, descriptor: int | None, before: FaultPoint) -> None:
    """Takes back everything but the link, whatever of it was made: no traffic, no leases, no device. The link, and
    what goes with it, is left to ``rdmanet.removal``."""
    for step in CUTS:
        before(f"undo {step.name}")
        step.undo(parts, attachment, descriptor)
