"""Attachments: add, check, delete, collect, and what a start finds of them.

Synchronous; called from worker threads. Calls on one container id must not overlap: ``rdmanet.api`` holds a lock per
id.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import threading
from collections.abc import Iterable, Iterator

from rdmanet import adoption, ipam, looking, steps
from rdmanet.cni import CniCode, CniError, Interface, IpConfig, Request, Result, Route
from rdmanet.config import RdmaConfig
from rdmanet.errors import (
    ConflictError,
    ExhaustedError,
    NotFoundError,
    RdmanetError,
    RequestError,
    StateError,
    UnavailableError,
)
from rdmanet.expected import Expected
from rdmanet.model import (
    GATEWAY_MAC,
    Attachment,
    AttachmentState,
    IPAddress,
    NetnsId,
    address_key,
    address_of,
)
from rdmanet.netlink import namespace
from rdmanet.removal import Removals

log = logging.getLogger(__name__)

#: How long an ADD waits for what a DEL has left; runtimes give up after minutes.
REMOVAL_TIMEOUT_S = 10.0


class Attachments:
    """All attachments of this host."""

    def __init__(
        self,
        parts: steps.Parts,
        removals: Removals,
        rdma: RdmaConfig,
        fault_point: steps.FaultPoint = steps.no_fault,
    ):
        self._parts = parts
        self._removals = removals
        self._rdma = rdma
        self._fault_point = fault_point
        self._ranges = (ipam.Range(parts.network.ipv4_range), ipam.Range(parts.network.ipv6_range))
        # Choosing addresses and committing them is one act.
        self._choosing = threading.Lock()
        # Ids of what could not be taken back, which nobody else may come back for.
        self._unfinished: set[int] = set()
        self._host = namespace.own()

    # ADD

    def add(self, request: Request, slot: str | None = None) -> Result:
        """Makes an attachment and returns what CNI's ADD returns. ``slot`` is by which its container gets a device.

        Raises ConflictError where it or the interface exists or the slot is another's, ExhaustedError without a free
        address, NotFoundError without the namespace, UnavailableError for RDMA on a host without it, CniError (11)
        where what it needs is not removed in time. Leaves nothing behind on failure.
        """
        self._removals.linger()
        self._parts.reserve.require()
        wants_rdma = request.wants_rdma or slot is not None
        if wants_rdma and self._parts.devices is None:
            raise UnavailableError(
                "This host has no RDMA to give to pods, and the pod asks for it; `rdmanet doctor` says what is"
                " missing.",
                subject=request.container_id,
            )
        with namespace.opened(request.netns) as descriptor:
            identity = namespace.identify(descriptor)
            if identity == self._host:
                raise RequestError(
                    f"{request.netns} is the host's own network namespace; rdmanet attaches pods only.",
                    subject=request.netns,
                )
            self._wait_for_removals(request)
            existing = self._parts.store.find(request.container_id, request.ifname)
            if existing is not None:
                raise ConflictError(
                    f"Container {request.container_id} has an interface {request.ifname} from rdmanet already"
                    f" ({existing.state}); DEL it first.",
                    operation="ADD",
                    subject=f"{request.container_id}/{request.ifname}",
                )
            wanted = Attachment(
                id=0,
                container_id=request.container_id,
                ifname=request.ifname,
                network=request.config.name,
                netns=request.netns,
                netns_id=identity,
                pod=request.pod,
                state=AttachmentState.ADDING,
                mac=request.mac or "",
                mtu_bytes=request.config.mtu_bytes or self._parts.network.mtu_bytes,
                ipv4=None,
                ipv6=None,
                wants_rdma=wants_rdma,
                guard=request.config.guard or self._rdma.guard,
                max_leases=_chosen(request.config.max_leases, self._rdma.max_leases_per_pod),
                traffic_class=_chosen(request.config.traffic_class, self._rdma.traffic_class),
                service_level=_chosen(request.config.service_level, self._rdma.service_level),
                pod_uid=request.args.pod_uid,
                labels=request.labels,
                bandwidth=request.bandwidth,
                slot=slot,
            )
            attachment = self._reserve(wanted, request.ips)
            try:
                self._fault_point("reserved")
                making = steps.Making(
                    descriptor,
                    lambda: self._make_room(identity, request.ifname),
                    cgroup_path=request.config.runtime_config.cgroup_path,
                )
                attachment = steps.apply_all(self._parts, attachment, making, self._fault_point)
                result = self._result(attachment)
                self._fault_point("commit ready")
                self._parts.store.set_ready(attachment.id, result.to_json("1.1.0"))
            except BaseException:
                self._take_back(attachment)
                raise
        self._removals.linger()
        log.info("added %s %s for %s", attachment.host_ifname, attachment.addresses, attachment.pod)
        return result

    def holder(self, slot: str) -> Attachment | None:
        """Who has the slot."""
        return self._parts.store.holder(slot)

    def collect_ended(self, attachment_id: int) -> None:
        """Takes back an attachment whose pod has ended, or what a failed DEL has left of it; else does nothing.

        Kubelet gives a slot to another pod when the one before has ended, also where that one's DEL never came. In turn
        with the calls of the holder's own container: the reconciler may be collecting it as well.
        """
        holder = self._parts.store.get(attachment_id)
        if holder is None or holder.state is AttachmentState.ADDING:
            return
        with namespace.entered(holder.netns, holder.netns_id) as descriptor:
            there = descriptor is not None or not namespace.told(holder.netns)
            alive = holder.state is AttachmentState.READY and there
        if not alive:
            log.warning("%s is collected: its pod has ended, and %s is asked for", holder.host_ifname, holder.slot)
            self.release(holder)

    def _wait_for_removals(self, request: Request) -> None:
        """Until nothing that a DEL has left holds a name or an address that this ADD asks for."""
        key = (request.container_id, request.ifname)

        def in_the_way(old: Attachment) -> bool:
            return (old.container_id, old.ifname) == key or any(address in request.ips for address in old.addresses)

        if not self._removals.wait_for(in_the_way, REMOVAL_TIMEOUT_S):
            raise CniError(
                f"What a DEL has left of this interface or address is still there after {REMOVAL_TIMEOUT_S:g} s;"
                " `rdmanet status` says why. Ask again.",
                CniCode.TRY_AGAIN,
            )

    def _make_room(self, netns: NetnsId, ifname: str) -> bool:
        """Whether a DEL has left an interface of that name in the namespace, which is gone now.

        Asked only where there is an interface: the kernel soon gives a new namespace the number of one that is gone.
        """

        def in_the_way(old: Attachment) -> bool:
            return (old.netns_id, old.ifname) == (netns, ifname)

        return self._removals.any(in_the_way) and self._removals.wait_for(in_the_way, REMOVAL_TIMEOUT_S)

    def _reserve(self, wanted: Attachment, requested: tuple[IPAddress, ...]) -> Attachment:
        while True:
            try:
                return self._choose(wanted, requested)
            except ExhaustedError:
                # Addresses come back with the links that are being removed.
                if not self._removals.wait_for_one(REMOVAL_TIMEOUT_S):
                    raise

    def _choose(self, wanted: Attachment, requested: tuple[IPAddress, ...]) -> Attachment:
        with self._choosing:
            taken = self._parts.store.taken()
            chosen: dict[int, IPAddress] = {}
            for space in self._ranges:
                version = space.network.version
                asked = [address for address in requested if address.version == version]
                if len(asked) > 1:
                    raise RequestError(f"One address of each family per interface, not {len(asked)}.", subject="IP")
                chosen[version] = space.request(asked[0], taken) if asked else space.choose(taken)
            ipv4, ipv6 = chosen[4], chosen[6]
            assert isinstance(ipv4, ipaddress.IPv4Address)
            assert isinstance(ipv6, ipaddress.IPv6Address)
            return self._parts.store.reserve(dataclasses.replace(wanted, ipv4=ipv4, ipv6=ipv6))

    def _result(self, attachment: Attachment) -> Result:
        ips, routes = [], []
        for address in attachment.addresses:
            subnet = self._parts.network.ranges[0 if address.version == 4 else 1]
            ips.append(
                IpConfig(
                    address=ipaddress.ip_interface(f"{address}/{address.max_prefixlen}"),
                    gateway=ipam.gateway(subnet),
                    interface=1,
                )
            )
            everything = ipaddress.ip_network("0.0.0.0/0" if address.version == 4 else "::/0")
            routes.append(Route(destination=everything, gateway=steps.next_hop(subnet)))
        return Result(
            interfaces=(
                Interface(
                    name=attachment.host_ifname,
                    mac=GATEWAY_MAC,
                    sandbox="",
                    mtu_bytes=attachment.mtu_bytes,
                ),
                Interface(
                    name=attachment.ifname,
                    mac=attachment.mac,
                    sandbox=attachment.netns,
                    mtu_bytes=attachment.mtu_bytes,
                ),
            ),
            ips=tuple(ips),
            routes=tuple(routes),
        )

    def _take_back(self, attachment: Attachment) -> None:
        """What an ADD has made that has failed. Its row says ``adding``: if that cannot be changed now, a start takes
        it for what it is, and the background goes on trying to remove it."""
        try:
            self._commit_releasing(attachment)
        except StateError as error:
            log.warning("%s: %s", attachment.host_ifname, error)
        try:
            self._undo(attachment)
            self._removals.put(attachment)
        except RdmanetError as error:
            self._leave(attachment, error)

    def _leave(self, attachment: Attachment, error: RdmanetError) -> None:
        """The row stays, and with it the addresses: a DEL, GC, the watch or a start finishes it."""
        log.error("%s is left half-made: %s", attachment.host_ifname, error)
        self._unfinished.add(attachment.id)

    def ready(self) -> None:
        """CNI's STATUS: raises CniError (50) while no ADD can be served."""
        try:
            self._parts.reserve.require()
        except StateError as error:
            raise CniError(error.sentence, CniCode.NOT_AVAILABLE) from error

    # DEL and GC

    def delete(self, container_id: str, ifname: str) -> bool:
        """Cuts an attachment off and leaves its link to the background (``rdmanet.removal``).

        False when there was none, or another DEL has done this: no error (CNI specification, "DEL").
        """
        attachment = self._parts.store.find(container_id, ifname)
        if attachment is None or self._removals.pending(attachment.id):
            return False
        self._release(attachment)
        return True

    def release(self, attachment: Attachment) -> None:
        """Takes back an attachment whose pod is gone, as ``collect`` does."""
        if not self._removals.pending(attachment.id):
            self._release(attachment)

    def _release(self, attachment: Attachment) -> None:
        self._cut(attachment)
        self._removals.put(attachment)
        self._unfinished.discard(attachment.id)

    def finish(self, attachment_id: int) -> None:
        """Takes back what a failed ADD or a start has left half-made; nothing where there is no such thing.

        In turn with the calls of its container. Raises as ``delete``.
        """
        if attachment_id not in self._unfinished:
            return
        attachment = self._parts.store.get(attachment_id)
        if attachment is None:
            self._unfinished.discard(attachment_id)
        else:
            self.release(attachment)

    def _cut(self, attachment: Attachment) -> None:
        self._commit_releasing(attachment)
        self._undo(attachment)

    def _commit_releasing(self, attachment: Attachment) -> None:
        self._fault_point("commit releasing")
        self._parts.store.set_state(attachment.id, AttachmentState.RELEASING)

    def _undo(self, attachment: Attachment) -> None:
        with namespace.entered(attachment.netns, attachment.netns_id) as descriptor:
            steps.cut(self._parts, attachment, descriptor, self._fault_point)
        if attachment.slot is not None:
            self._fault_point("free slot")
            self._parts.slots.free(attachment)
        log.debug("cut off %s of %s", attachment.host_ifname, attachment.pod)

    def collect(self, network: str, valid: Iterable[tuple[str, str]]) -> list[Attachment]:
        """CNI's GC: removes every attachment of the network that is not in ``valid`` (container id, interface name)."""
        keep = set(valid)
        removed: list[Attachment] = []
        failures: list[RdmanetError] = []
        for attachment in self._parts.store.attachments():
            if attachment.network != network or (attachment.container_id, attachment.ifname) in keep:
                continue
            if self._removals.pending(attachment.id):
                continue
            try:
                self._release(attachment)
                removed.append(attachment)
            except RdmanetError as error:
                failures.append(error)
        if failures:
            # "Plugins should generally complete a GC action without error ... continue on error" (specification, "GC").
            raise failures[0]
        return removed

    # CHECK

    def check(self, request: Request) -> None:
        """CNI's CHECK: raises NotFoundError, naming the first thing that is not as the chain's ADDs left it."""
        subject = f"{request.container_id}/{request.ifname}"
        attachment = self._parts.store.find(request.container_id, request.ifname)
        if attachment is None or attachment.state is not AttachmentState.READY:
            raise NotFoundError(f"There is no attachment {subject}; ADD it again.", operation="CHECK", subject=subject)
        previous = request.config.prev_result
        expected = Expected.by_result(attachment, previous) if previous is not None else None
        for problem in self.problems(attachment, expected):
            raise NotFoundError(
                f"{attachment.pod}: {problem}; DEL and ADD the pod again.", operation="CHECK", subject=subject
            )

    def problems(self, attachment: Attachment, expected: Expected | None = None) -> Iterator[str]:
        """Sentences about what of a ready attachment is missing from the kernel; of what is expected, else of all."""
        expected = expected or Expected.all_of(attachment)
        found = looking.look(self._parts, attachment)
        if found.pod_end is not None:
            yield from expected.problems_of(attachment, found.pod_end, found.seen.routes)
        for broken in found.broken(expected.among(found.wanted.ways)):
            yield broken.sentence
        if (problem := self._parts.slots.problem(attachment)) is not None:
            yield problem

    # Start

    def recover(self) -> None:
        """Finishes what an earlier agent left: undoes half-made and half-removed attachments, adopts the ready ones.

        Where a pod's namespace is gone nothing of an attachment can be alive: it is taken back and its addresses are
        freed. After a reboot ``Store.begin`` has marked all of them. Where its folder is gone, too, it may be there all
        the same: such a pod is left as it is. What cannot be taken back now is left to
        ``finish``: it must not keep the agent from all other pods.
        """
        attachments = self._parts.store.attachments()
        for space in self._ranges:
            for attachment in attachments:
                address = attachment.ipv4 if space.network.version == 4 else attachment.ipv6
                if address is not None:
                    space.resume_after(address)
        ready = [attachment for attachment in attachments if attachment.state is AttachmentState.READY]
        adopted = adoption.adopt(self._parts, ready)
        others = [attachment for attachment in attachments if attachment.id not in adopted]
        self._find_host_ends({attachment.id for attachment in others})
        hidden = {attachment.id for attachment in others if self._hidden(attachment)}
        for cookie, number in self._parts.datapath.namespaces().items() if hidden else ():
            if number in hidden:
                self._parts.datapath.enter_namespace(cookie, number)
        left = [attachment for attachment in others if attachment.id not in hidden]
        cut = [attachment for attachment in left if self._cut_or_leave(attachment)]
        if cut:
            failures = self._removals.remove(cut)
            for attachment in cut:
                if attachment.id in failures:
                    log.warning("%s is not removed yet: %s", attachment.host_ifname, failures[attachment.id])
                    self._removals.put(attachment)
        self._forget_strangers()

    def _hidden(self, attachment: Attachment) -> bool:
        if attachment.state is not AttachmentState.READY or namespace.told(attachment.netns):
            return False
        log.error("%s: its namespace %s is hidden; mount that folder", attachment.pod, attachment.netns)
        return True

    def _cut_or_leave(self, attachment: Attachment) -> bool:
        try:
            self._cut(attachment)
        except RdmanetError as error:
            self._leave(attachment, error)
            return False
        return True

    def _find_host_ends(self, numbers: set[int]) -> None:
        """By what the datapath holds: the link may be gone, and its index another's."""
        if numbers:
            for ifindex, entry in self._parts.datapath.attachments().items():
                if entry.attachment_id in numbers:
                    self._parts.host_ends.set(entry.attachment_id, ifindex)

    def _forget_strangers(self) -> None:
        """Takes out of the datapath what no row speaks of (after a lost database): the addresses may be given away."""
        attachments = self._parts.store.attachments()
        datapath = self._parts.datapath
        keys = {address_key(address) for attachment in attachments for address in attachment.addresses}
        for key in datapath.endpoints().keys() - keys:
            log.warning("%s is nobody's that is known and leaves the datapath", address_of(key))
            datapath.delete_endpoint(key)
        for ifindex, entry in datapath.attachments().items():
            if self._parts.host_ends.get(entry.attachment_id) != ifindex:
                datapath.delete_attachment(ifindex)
        datapath.forget_namespaces()


def _chosen(overriding: int | None, configured: int) -> int:
    """A network configuration's word, which may be 0, before the agent's."""
    return configured if overriding is None else overriding
