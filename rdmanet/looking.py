"""What there is of an attachment: looked up in the kernel, for CHECK and for what repairs (``rdmanet.reconcile``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rdmanet import reconcile, steps
from rdmanet.errors import NotFoundError, UnavailableError
from rdmanet.model import GATEWAY_MAC, Attachment, address_key
from rdmanet.netlink import messages, namespace
from rdmanet.netlink.batch import BatchSocket
from rdmanet.rdma.backend import Condition
from rdmanet.reconcile import Broken, PodSeen, PodWanted


@dataclass(frozen=True, slots=True)
class Look:
    """What should be, what there is, and where: the pod's end, the index of the host's, the cookie of the pod's
    namespace and our number for it, where they are known."""

    wanted: PodWanted
    seen: PodSeen
    host_ifindex: int = 0
    pod_end: messages.Link | None = None
    cookie: int = 0
    peer_namespace: int | None = None

    def broken(self, ways: Sequence[steps.Way] | None = None) -> Iterator[Broken]:
        """See ``reconcile.broken_pod``; ``ways``: of what there should be inside the pod, only these."""
        wanted = self.wanted if ways is None else dataclasses.replace(self.wanted, ways=ways)
        return reconcile.broken_pod(wanted, self.seen, GATEWAY_MAC)


@dataclass(frozen=True, slots=True)
class _Inside:
    cookie: int
    link: messages.Link | None
    addresses: list[bytes]
    neighbours: list[bytes]
    routes: list[bytes]


def look(parts: steps.Parts, attachment: Attachment) -> Look:
    """One visit of the pod's namespace and a few questions to the host. Raises KernelError where the kernel does not
    answer."""
    ways = steps.ways(parts.network, attachment)
    program = parts.datapath.dispatcher_id("pod")
    nothing = PodWanted(attachment, ways, program, None, None)
    with namespace.entered(attachment.netns, attachment.netns_id) as descriptor:
        if descriptor is None:
            return Look(nothing, PodSeen(folder=namespace.told(attachment.netns)))
        inside = namespace.run_inside(descriptor, lambda: _look_inside(attachment.ifname))
        condition = _device(parts, attachment, descriptor)
    pod = inside.link
    (reply,) = parts.host.exchange([messages.get_link(attachment.host_ifname)])
    host = None if reply.errno else messages.link(reply.payloads[0])
    if pod is None or host is None or pod.peer_index != host.index:
        whole = pod is not None and (host is None or pod.peer_index == host.index)
        seen = PodSeen(namespace=True, pod_end=whole, host_end=host is not None)
        return Look(nothing, seen, host_ifindex=host.index if host else 0, cookie=inside.cookie)
    (reply,) = parts.host.exchange([messages.get_ingress_filter(host.index)])
    datapath = parts.datapath
    own, endpoint = steps.entries(attachment, host.index, parts.policy.of(attachment.id))
    seen = PodSeen(
        namespace=True,
        pod_end=True,
        pod_end_up=pod.up,
        addresses=frozenset(filter(None, map(messages.address, inside.addresses))),
        neighbours=frozenset(filter(None, map(messages.permanent_neighbour, inside.neighbours))),
        routes=frozenset(filter(None, map(messages.route, inside.routes))),
        host_end=True,
        host_end_up=host.up,
        program_ids=tuple(messages.bpf_filter(payload).program_id for payload in reply.payloads),
        condition=condition,
        own=datapath.attachment(host.index),
        bandwidth=datapath.bandwidth(attachment.id),
        endpoints={address: datapath.endpoint(address_key(address)) for address in attachment.addresses},
    )
    return Look(
        PodWanted(attachment, ways, program, own, endpoint),
        seen,
        host.index,
        pod,
        inside.cookie,
        host.peer_namespace,
    )


def _look_inside(ifname: str) -> _Inside:
    cookie = namespace.own_cookie()
    with BatchSocket() as pod:
        (reply,) = pod.exchange([messages.get_link(ifname)])
        if reply.errno:
            return _Inside(cookie, None, [], [], [])
        link = messages.link(reply.payloads[0])
        try:
            return _Inside(
                cookie,
                link,
                pod.dump(messages.get_addresses(link.index)),
                pod.dump(messages.get_neighbours(link.index)),
                [route for version in (4, 6) for route in pod.dump(messages.get_routes(version, link.index))],
            )
        except NotFoundError:  # it has gone since
            return _Inside(cookie, None, [], [], [])


def _device(parts: steps.Parts, attachment: Attachment, descriptor: int) -> Condition | None:
    if parts.devices is None or attachment.device is None:
        return None
    try:
        return parts.devices.examine(attachment, attachment.device, descriptor)
    except UnavailableError as error:  # the kernel has no RDMA any more
        return Condition(attachment.device, error.sentence.removesuffix("."))
