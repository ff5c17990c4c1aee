"""The steps that make an attachment, in order, each with its idempotent undo.

Undo takes back also what a crash left half-made, and works when the pod's namespace is gone. No step keeps a
descriptor of the pod's
namespace.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rdmanet import ipam
from rdmanet.datapath.layout import AttachmentEntry, EndpointEntry
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import ConflictError, NotFoundError, UnavailableError
from rdmanet.model import GATEWAY_MAC, Attachment, GuardMode, IPAddress, NetnsId, address_key
from rdmanet.netlink import namespace
from rdmanet.netlink.route import RouteSocket
from rdmanet.node import NodeNetwork
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.store import Store

LOOPBACK_INDEX = 1
LINK_LOCAL_GATEWAY = ipaddress.IPv6Address("fe80::1")
_EVERYTHING = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))


class Listeners(Protocol):
    """The lease sockets inside the pods' namespaces."""

    def open(self, attachment: Attachment, descriptor: int) -> None:
        """Makes sure that the pod has its listener, and knows this attachment."""

    def close(self, attachment: Attachment) -> None:
        """Forgets the attachment; closes the pod's listener with its last one. Ends leases. Idempotent."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What steps work with."""

    store: Store
    network: NodeNetwork
    datapath: Datapath
    devices: DeviceBackend | None
    listeners: Listeners


class Step(Protocol):
    """One effect. ``apply`` may raise; then its own ``undo`` and those of the steps before run."""

    name: str

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        """Makes the effect; returns the attachment, with what became known."""

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        """Takes it back; ``descriptor`` is None where the pod's namespace is gone."""


class LinkStep:
    """The veth pair, its far end straight in the pod's namespace."""

    name = "link"

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        def add(host: RouteSocket) -> None:
            host.add_veth(
                attachment.host_ifname,
                GATEWAY_MAC,
                attachment.mtu_bytes,
                peer_name=attachment.ifname,
                peer_mac=attachment.mac,
                peer_namespace=descriptor,
            )

        with RouteSocket.here() as host:
            try:
                try:
                    add(host)
                except ConflictError:
                    # Ids are never used twice: a link of this name is left from a database that was lost.
                    if not host.delete_link(attachment.host_ifname):
                        raise
                    add(host)
            except ConflictError as error:
                raise ConflictError(
                    f"The interface {attachment.ifname} exists already in {attachment.netns}.",
                    operation=error.operation,
                    subject=attachment.ifname,
                    errno=error.errno,
                ) from error
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        with RouteSocket.here() as host:
            host.delete_link(attachment.host_ifname)


def next_hop(subnet: ipam.IPNetwork) -> IPAddress:
    """Through which address a pod's routes lead; its MAC is the gateway's.

    IPv6 takes a gateway only where no other interface's route covers it (net/ipv6/route.c,
    ip6_route_check_nh_onlink); a link-local one is each interface's own.
    """
    return LINK_LOCAL_GATEWAY if subnet.version == 6 else ipam.gateway(subnet)


class AddressStep:
    """Addresses, permanent neighbours for the gateways and routes, inside the pod."""

    name = "addresses"

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        network = parts.network
        with RouteSocket.inside(descriptor) as pod:
            link = pod.link(attachment.ifname)
            if link is None:
                raise NotFoundError(f"{attachment.ifname} vanished from the pod.", subject=attachment.ifname)
            pod.set_up(LOOPBACK_INDEX)
            pod.set_up(link.index)
            default_mtu = None
            if attachment.mtu_bytes > network.outside_mtu_bytes:
                default_mtu = network.outside_mtu_bytes
            for address in attachment.addresses:
                subnet = network.ipv4_range if address.version == 4 else network.ipv6_range
                gateway = next_hop(subnet)
                pod.add_address(link.index, address, address.max_prefixlen)
                pod.add_permanent_neighbour(link.index, gateway, GATEWAY_MAC)
                # A pod may have several interfaces, with the same routes. The first made is preferred; what is bound
                # to another one (an RDMA device is) finds its own.
                metric = link.index
                if default_mtu is not None:
                    # Local pods get the interface's whole MTU, the outside no more than what fits through the uplink.
                    pod.add_route(subnet, link.index, gateway=gateway, metric=metric)
                everything = _EVERYTHING[0] if address.version == 4 else _EVERYTHING[1]
                pod.add_route(everything, link.index, gateway=gateway, mtu_bytes=default_mtu, metric=metric)
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        """They go with the link."""


class FilterStep:
    """The pod hook's dispatcher at the host end's tc ingress."""

    name = "filter"

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        attach_filter(parts.datapath, attachment)
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        """It goes with the link."""


def attach_filter(datapath: Datapath, attachment: Attachment) -> None:
    """Puts the dispatcher in place and the host end up; replaces what is there without loss."""
    with RouteSocket.here() as host:
        link = host.link(attachment.host_ifname)
        if link is None:
            raise NotFoundError(f"{attachment.host_ifname} vanished from the host.", subject=attachment.host_ifname)
        host.add_clsact(link.index)
        host.set_ingress_filter(link.index, datapath.dispatcher("pod"), "rdmanet/pod")
        host.set_up(link.index, link_local=False)


class DeviceStep:
    """The RDMA device, where the attachment wants one."""

    name = "device"

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        if not attachment.wants_rdma:
            return attachment
        if parts.devices is None:
            raise UnavailableError(
                'This host has no RDMA to give to pods; `rdmanet doctor` says what is missing. Leave "rdma" away'
                " in the network"
                " configuration, or move the pod."
            )
        device = parts.devices.create(attachment, descriptor)
        parts.store.set_device(attachment.id, device)
        return dataclasses.replace(attachment, device=device)

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        if attachment.wants_rdma and parts.devices is not None:
            parts.devices.remove(attachment, descriptor)


class ListenerStep:
    """The lease socket in the pod's namespace."""

    name = "listener"

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        parts.listeners.open(attachment, descriptor)
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        parts.listeners.close(attachment)


class EndpointStep:
    """The datapath's entries: from here on traffic flows, and with their removal it stops."""

    name = "endpoint"

    def apply(self, parts: Parts, attachment: Attachment, descriptor: int) -> Attachment:
        with RouteSocket.here() as host:
            link = host.link(attachment.host_ifname)
        if link is None:
            raise NotFoundError(f"{attachment.host_ifname} vanished from the host.", subject=attachment.host_ifname)
        set_entries(parts.datapath, attachment, link.index)
        return attachment

    def undo(self, parts: Parts, attachment: Attachment, descriptor: int | None) -> None:
        datapath = parts.datapath
        keys = [address_key(address) for address in attachment.addresses]
        for key in keys:
            datapath.delete_endpoint(key)
        # By content, not by the link's index: the link may be gone and its index another's.
        for ifindex, entry in datapath.attachments().items():
            if entry.attachment_id == attachment.id:
                datapath.delete_attachment(ifindex)
        if attachment.wants_rdma:
            for address, qpn in datapath.guards():
                if address in keys:
                    datapath.delete_guard(address, qpn)
        datapath.forget(attachment.id)


def set_entries(datapath: Datapath, attachment: Attachment, ifindex: int) -> None:
    """Writes the attachment's entries; those of endpoints last, as they let packets in."""
    own, endpoint = entries(attachment, ifindex)
    datapath.set_attachment(ifindex, own)
    for address in attachment.addresses:
        datapath.set_endpoint(address_key(address), endpoint)


def entries(attachment: Attachment, ifindex: int) -> tuple[AttachmentEntry, EndpointEntry]:
    """What the datapath should hold for an attachment."""
    mac = bytes.fromhex(attachment.mac.replace(":", ""))
    enforce = attachment.guard is GuardMode.ENFORCE
    own = AttachmentEntry(
        attachment_id=attachment.id,
        mac=mac,
        ipv4=address_key(attachment.ipv4) if attachment.ipv4 else bytes(16),
        ipv6=address_key(attachment.ipv6) if attachment.ipv6 else bytes(16),
        device=attachment.wants_rdma,
        enforce=enforce,
    )
    endpoint = EndpointEntry(
        ifindex=ifindex, mac=mac, attachment_id=attachment.id, device=attachment.wants_rdma, enforce=enforce
    )
    return own, endpoint


#: In the order of ADD; DEL undoes them in reverse, so traffic is cut first and the link goes last.
STEPS: tuple[Step, ...] = (
    LinkStep(),
    # The host's end comes up here. The pod's end then finds its carrier and can send the moment it is up, instead of
    # when the kernel's link watch gets round to it.
    FilterStep(),
    AddressStep(),
    DeviceStep(),
    ListenerStep(),
    EndpointStep(),
)

#: Called with a step's name and "apply" or "undo" before each effect: where tests kill the agent.
FaultPoint = Callable[[str], None]


def no_fault(point: str) -> None:
    """The fault point of a running agent."""


def apply_all(parts: Parts, attachment: Attachment, descriptor: int, before: FaultPoint) -> Attachment:
    """Makes every effect; on failure takes back what was made, in reverse, and raises the first failure."""
    done: list[Step] = []
    try:
        for step in STEPS:
            before(f"apply {step.name}")
            done.append(step)
            attachment = step.apply(parts, attachment, descriptor)
    except BaseException:
        for step in reversed(done):
            before(f"undo {step.name}")
            step.undo(parts, attachment, descriptor)
        raise
    return attachment


def undo_all(parts: Parts, attachment: Attachment, descriptor: int | None, before: FaultPoint) -> None:
    """Takes every effect back, whatever of them was made."""
    for step in reversed(STEPS):
        before(f"undo {step.name}")
        step.undo(parts, attachment, descriptor)


def same_namespace(descriptor: int, wanted: NetnsId) -> bool:
    """Whether an open descriptor is the namespace that the attachment was made in, not a later one at its path."""
    return namespace.identify(descriptor) == wanted
