"""Unreliable datagrams: one queue pair (UD) that sends to many peers and receives from them, each leased by name.

A lease is one pair of queue pairs, so a datagram queue pair has a lease for each of its peers. What others send to it
is not delivered: on Soft-RoCE the guard drops it, everywhere this module does, which knows its peers by the source that
each message says it is from.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from rdmanet import lease as wire
from rdmanet.errors import (
    InputError,
    LeaseRefusedError,
    LeaseRevokedError,
    RdmanetError,
    RequestError,
    UnavailableError,
    VerbsError,
)
from rdmanet.lease import lease_text, pod_text
from rdmanet.model import IPAddress, PodName, Transport, address_key, address_of
from rdmanet.verbs import compat
from rdmanet.verbs.batch import address_vector
from rdmanet.verbs.device import PORT, OpenDevice
from rdmanet.verbs.endpoint import FIRST_RECEIVES, RECEIVE, Endpoint, Transfer
from rdmanet.verbs.failure import Failure
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from types import TracebackType

    from rdmanet.verbs.completions import CompletionQueue
    from rdmanet.verbs.memory import Buffer

#: Instead of a slot: the next recv is to raise something.
_COMPLAINT = -1
#: What a datagram's queues hold unless its maker says otherwise. A message that finds no receive posted is lost, so
#: there are more than for connected queue pairs, whose sender waits.
DATAGRAM_OPTIONS = Options(messages=127)
_log = logging.getLogger(__name__)

#: The device writes the packet's network header before each message (InfiniBand 11.4.1.2; RoCEv2, annex A17.4.5.2):
#: IPv6 as it is, IPv4 in the last 20 bytes.
GRH_BYTES = 40
_IPV4_OFFSET = 20
_IPV4_FIRST_BYTE = 0x45


class Leasing(Protocol):
    """What a datagram needs of its session."""

    async def lease(
        self,
        target: wire.Target,
        ends: wire.Ends,
        answered: Callable[[wire.ConnectReply], None],
        timeout_s: float | None,
    ) -> None:
        """Ask for the lease; ``answered`` is called with the broker's reply before any later message is handled."""

    def held(self, peer: Peer) -> None:
        """A peer has its lease."""

    async def ended(self, peers: list[Peer]) -> None:
        """These have been closed: give their leases back."""

    async def closed(self, datagram: Datagram) -> None:
        """The datagram is closed, and its peers."""


class Peer:
    """Another datagram queue pair, by its pod's name and the service through which the two met."""

    def __init__(self, datagram: Datagram, ends: wire.Ends, lease: int, pod: PodName, service: str):
        self.pod = pod
        self.service = service
        self.lease = lease
        #: Longest message between the two: the smaller of both path MTUs.
        self.mtu_bytes = min(datagram.mtu_bytes, ends.mtu_bytes)
        self.end = (ends.gid, ends.qpns[0])
        self.qkey = ends.qkey
        self._datagram = datagram
        self._failure: Failure | None = None
        self._handle: Any = None
        self._uses = 0  # sends under way

    @property
    def name(self) -> str:
        """The pod's name; with its namespace where that is not the default one."""
        return pod_text(self.pod)

    @property
    def qpn(self) -> int:
        """Of the process's own queue pair, as the lease has it."""
        return self._datagram.qpn

    @property
    def over(self) -> bool:
        """Whether it was revoked or closed: nothing can be sent to it any more."""
        return self._failure is not None

    def of(self, datagram: Datagram) -> bool:
        """Whether it is a peer of this datagram."""
        return self._datagram is datagram

    def check(self) -> None:
        """Raise why it is over, if it is."""
        if self._failure is not None:
            raise self._failure()

    def handle(self) -> Any:
        """The address handle, made once."""
        if self._handle is None:
            self._handle = self._datagram.address_handle(self.end[0])
        return self._handle

    # The device looks a send's handle up when it carries the send out, so the handle stays until then.

    def use(self) -> None:
        """A send to it is under way."""
        self._uses += 1

    def unuse(self) -> None:
        """A send to it has been completed, or its queue pair is gone."""
        self._uses -= 1
        self._tidy()

    def revoke(self, sentence: str) -> None:
        """The lease is over: sends raise LeaseRevokedError. Other peers are not concerned."""
        lease = lease_text(self.lease)
        self.fail(lambda: LeaseRevokedError(sentence, operation="lease", subject=lease))

    def fail(self, failure: Failure) -> None:
        """Sends to it raise this from now on."""
        if self._failure is None:
            self._failure = failure
        self._datagram.lost(self)
        self._tidy()

    def _tidy(self) -> None:
        if self._failure is not None and self._uses == 0 and self._handle is not None:
            handle, self._handle = self._handle, None
            handle.close()

    async def close(self) -> None:
        """Give the lease back: no messages to or from it any more. Idempotent."""
        await self._datagram.close_peers([self])

    def __str__(self) -> str:
        return f"{self.name}:{self.service}"

    def __repr__(self) -> str:
        return f"<Peer {self}, lease {lease_text(self.lease)}>"


class Datagram(Endpoint):
    """One UD queue pair and its peers. Made by ``rdmanet.verbs.datagram``.

    Messages arrive whole or not at all, in any order, and are lost where the receiver has no receive posted
    (``Options.messages``).
    """

    def __init__(
        self,
        leasing: Leasing,
        device: OpenDevice,
        addresses: Sequence[IPAddress],
        service: str | None,
        options: Options,
        *,
        traffic_class: int,
        service_level: int,
    ):
        port = device.port()
        mtu_bytes = device.mtu_bytes(port)
        longest = min(options.message_bytes, mtu_bytes)
        self._leasing = leasing
        self._traffic_class, self._service_level = traffic_class, service_level
        self._port_mtu_bytes = mtu_bytes
        self._gids = {address: address_key(address) for address in addresses}
        self._qkey = secrets.randbits(31)
        self._peers: dict[tuple[bytes, int], Peer] = {}
        self._senders: dict[int, Peer] = {}  # slot → who sent what is in it
        self._connecting = 0
        self._early: deque[tuple[int, int, tuple[bytes, int]]] = deque()  # slot, bytes, sender: who is not known yet
        self._complaints: deque[RdmanetError] = deque()
        self.service = service
        self.established = False  # others can connect to the service
        #: Messages that came from queue pairs that are no peers, and were not delivered.
        self.strangers = 0
        completions, verbs_qp = _made(device, options)
        super().__init__(completions, device, replace(options, message_bytes=longest + GRH_BYTES), verbs_qp)
        self.mtu_bytes = longest
        try:
            self._begin()
        except BaseException:
            self.destroy()
            raise

    def _begin(self) -> None:
        """Through INIT and RTR to RTS, with all receives posted (InfiniBand 10.3.1)."""
        name, enums, size = self._device.name, compat.enums, self._options.message_bytes
        with compat.call("no datagram queue pair could be set up", "ibv_modify_qp", name):
            attributes = compat.QPAttr(port_num=PORT)
            attributes.qkey = self._qkey
            attributes.qp_state = enums.IBV_QPS_INIT
            self.verbs_qp.modify(attributes, compat.UD_INIT_MASK)
            first = self._device.places.take(min(FIRST_RECEIVES, self._options.messages), size)
            with compat.element(size, 0) as sge:
                self.add_receives(first, sge)
            attributes.qp_state = enums.IBV_QPS_RTR
            self.verbs_qp.modify(attributes, compat.UD_RTR_MASK)
            attributes.qp_state = enums.IBV_QPS_RTS
            self.verbs_qp.modify(attributes, compat.UD_RTS_MASK)
        self._complete_receives()

    # The application's side

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Those that it can send to: that it connected to, and that connected to its service."""
        return tuple(self._peers.values())

    async def connect(self, target: str, *, address: IPAddress | None = None, timeout_s: float | None = 10.0) -> Peer:
        """Lease the pair of this queue pair and that of the datagram which serves [namespace/]pod:service.

        ``address`` chooses among this pod's own (default: the first, IPv4 where there is one). Raises RequestError for
        a malformed target, LeaseRefusedError with the broker's sentence (also where the two have each other as peers
        already: see ``peers``), UnavailableError when the agent is away, VerbsError when the device fails.
        """
        self._check()
        parsed = wire.Target.parse(target)
        ends = self.ends(self._own_address(address))
        made: list[Peer] = []

        def answered(reply: wire.ConnectReply) -> None:
            made.append(self.join(reply.ends, reply.lease, reply.peer, parsed.service))

        self._connecting += 1
        try:
            await self._leasing.lease(parsed, ends, answered, timeout_s)
            self._check()  # it may have been closed meanwhile
            made[0].handle()
        except BaseException:
            await self.close_peers(made)
            raise
        finally:
            self._connecting -= 1
            if not self._connecting:
                self._forget_early()
        return made[0]

    async def send(self, message: Buffer, peer: Peer, *, timeout_s: float | None = None) -> None:
        """Send one message, 1 to ``peer.mtu_bytes`` bytes; returns when it has left: whether it arrives is not known.
        Waits while ``Options.window`` messages are on their way to the device.

        Raises LeaseRevokedError when the lease with this peer is over; that of others is not concerned.
        """
        data = memoryview(message).cast("B")
        if not peer.of(self):
            raise InputError(f"{peer} is a peer of another datagram")
        if not 1 <= data.nbytes <= peer.mtu_bytes:
            raise InputError(
                f"a datagram to {peer} has 1 to {peer.mtu_bytes} bytes, which is what fits into one packet on this "
                f"path (its MTU), not {data.nbytes}; use rdmanet.verbs.connect for longer messages"
            )
        await self._within(self._send_to(data, peer), "send", timeout_s)

    async def recv(self, *, timeout_s: float | None = None) -> tuple[bytes, Peer]:
        """The next message that has arrived, and who sent it. Who is cancelled or timed out has taken none.

        Raises LeaseRefusedError, once, when the agent came back and does not let others connect to the service any
        more; messages of peers can still be received.
        """
        slot, size = await self._within(self._next_arrival(), "recv", timeout_s)
        if slot == _COMPLAINT:
            raise self._complaints.popleft()
        message = self._places[slot].read(size)[GRH_BYTES:]
        peer = self._senders.pop(slot)
        self._receive_again(slot)
        return message, peer

    async def close(self) -> None:
        """Destroy the queue pair, stop serving and give all leases back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.fail(lambda: UnavailableError("the datagram has been closed", operation="close"))
        peers = list(self._peers.values())
        self.__dict__.pop("_arrived", None)
        self._early.clear()
        try:
            self.destroy()
        finally:
            for peer in peers:
                peer.fail(_closed_peer)
            try:
                await self._leasing.ended(peers)
            finally:
                await self._leasing.closed(self)

    async def __aenter__(self) -> Datagram:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Datagram {self.qpn}, service {self.service or 'none'}, {len(self._peers)} peers>"

    # The session's and the peers' side

    def ends(self, address: IPAddress) -> wire.Ends:
        """This side of a lease, from an address of this pod."""
        # The PSN of datagrams means nothing to who receives them.
        gid = self._gids[address]
        return wire.Ends(gid, self._port_mtu_bytes, (self.qpn,), (0,), Transport.UD, self._qkey)

    def ends_towards(self, peer: wire.Ends) -> wire.Ends:
        """This side of a lease with these ends, of their address's family; raises UnavailableError."""
        family = address_of(peer.gid).version
        for address in self._gids:
            if address.version == family:
                return self.ends(address)
        raise UnavailableError(f"this pod has no IPv{family} address")

    def knows(self, ends: wire.Ends) -> bool:
        """Whether these are a peer's already."""
        return (ends.gid, ends.qpns[0]) in self._peers

    def join(self, ends: wire.Ends, lease: int, pod: PodName, service: str) -> Peer:
        """A lease has been granted, or is about to be: messages of these ends are a peer's from now on."""
        if ends.transport is not Transport.UD:
            raise LeaseRefusedError(f"{pod_text(pod)}:{service} is not for datagrams", operation="transport")
        peer = Peer(self, ends, lease, pod, service)
        self._peers[peer.end] = peer
        self._leasing.held(peer)
        early, self._early = self._early, deque()
        for slot, size, sender in early:
            if sender == peer.end:
                self._arrive(slot, size, peer)
            else:
                self._early.append((slot, size, sender))
        return peer

    def lost(self, peer: Peer) -> None:
        """Its lease is over. What it sent until now has arrived, or is lost."""
        if self._peers.get(peer.end) is not peer:
            return
        try:
            if not self._destroyed and self._failure is None:
                self._completions.poll()
        except VerbsError as error:  # the device may be gone as well, and the lease is over all the same
            _log.warning("datagram %d of a revoked lease: %s", self.qpn, error)
        del self._peers[peer.end]

    async def close_peers(self, peers: list[Peer]) -> None:
        """Give the leases of these back."""
        ending = [peer for peer in peers if not peer.over]
        for peer in ending:
            peer.fail(_closed_peer)
        if ending:
            await self._leasing.ended(ending)

    def complain(self, error: RdmanetError) -> None:
        """A recv raises this, once, when it has given what has arrived before."""
        self._complaints.append(error)
        self._arrived.append((_COMPLAINT, 0))
        self._arrivals.release()

    def address_handle(self, gid: bytes) -> Any:
        """What a send to this GID needs, made for the queue pair's own GID of that family; raises VerbsError."""
        family = address_of(gid).version
        own = next(key for address, key in self._gids.items() if address.version == family)
        index = self._device.gid_index(own, self._device.port())
        with compat.call(f"no way to {address_of(gid)} could be made", "ibv_create_ah", self._device.name):
            vector = address_vector(gid, index, self._traffic_class, self._service_level)
            return compat.AH(self._device.pd, attr=vector)

    def _own_address(self, address: IPAddress | None) -> IPAddress:
        """The one that is meant; RequestError when it is not this pod's."""
        if address is None and self._gids:
            return next(iter(self._gids))
        if address is None or address not in self._gids:
            listed = ", ".join(map(str, self._gids)) or "none"
            raise RequestError(f"{address} is not an address of this pod, which has: {listed}")
        return address

    # Inside

    async def _send_to(self, data: memoryview, peer: Peer) -> None:
        transfer = Transfer("send", peer)
        async with self._order:
            peer.check()
            await self._admitted()
            try:
                peer.check()  # it may have ended while this waited
                handle = peer.handle()
            except RdmanetError:
                self._window.release()
                raise
            slots = self._send_slots or self._new_send_slots()
            slot = self._free_slots.popleft()
            offset = slot * self._options.message_bytes
            slots.buffer[offset : offset + data.nbytes] = data
            if self._send is None:
                self._send = compat.SendRequest()
            assert peer.qkey is not None
            self._send.address = (handle, peer.end[1], peer.qkey)
            place = (slots.address + offset, data.nbytes, slots.lkey)
            self._post(transfer, compat.enums.IBV_WR_SEND, place, None, slot)
        await self._finished(transfer)

    def completed(self, number: int, status: int, size: int, source: int = 0) -> None:
        """As Endpoint's; a message must be from a peer, or from who may be one in a moment."""
        if status != 0 or not number & RECEIVE:
            super().completed(number, status, size)
            return
        slot = number & ~RECEIVE
        sender = (self._source(slot), source)
        peer = self._peers.get(sender)
        if peer is not None:
            self._arrive(slot, size, peer)
        elif self._connecting:
            # The other side hears of the lease first, and may have sent before this side has heard of it.
            self._early.append((slot, size, sender))
        else:
            self._ignore(slot)

    def _source(self, slot: int) -> bytes:
        """The source's address key in the header before a message; empty where it is not to this pod."""
        header = self._places[slot].read(GRH_BYTES)
        return source_of(header, self._gids.values())

    def _arrive(self, slot: int, size: int, peer: Peer) -> None:
        self._senders[slot] = peer
        super().completed(RECEIVE | slot, 0, size)

    def _forget_early(self) -> None:
        while self._early:
            self._ignore(self._early.popleft()[0])

    def _ignore(self, slot: int) -> None:
        self.strangers += 1
        self._receive_again(slot)


def source_of(header: bytes, own: Collection[bytes]) -> bytes:
    """The source's address key in the 40 bytes before a datagram, which was to one of these address keys; empty where
    it was not. Of an IPv4 header the 20 bytes before are not defined."""
    if header[0] >> 4 == 6 and header[24:40] in own:
        return header[8:24]
    packet = header[_IPV4_OFFSET:]
    if packet[0] == _IPV4_FIRST_BYTE and address_key(ipaddress.IPv4Address(packet[16:20])) in own:
        return address_key(ipaddress.IPv4Address(packet[12:16]))
    return b""


def _made(device: OpenDevice, options: Options) -> tuple[CompletionQueue, Any]:
    """A UD queue pair and the completion queue that has room for it; raises InputError and VerbsError."""
    entries = options.window + options.messages
    if max(options.window, options.messages) > device.max_wr or entries > device.max_cqe:
        raise InputError(f"{device.name} has room for {device.max_wr} requests of a queue pair; choose smaller Options")
    completions = device.completions.reserve(entries, polling=options.polling)
    try:
        with compat.call("no datagram queue pair could be made", "ibv_create_qp", device.name):
            capacity = compat.QPCap(max_send_wr=options.window, max_recv_wr=options.messages)
            request = compat.QPInitAttr(
                qp_type=compat.enums.IBV_QPT_UD, scq=completions.cq, rcq=completions.cq, cap=capacity, sq_sig_all=1
            )
            return completions, compat.QP(device.pd, request)
    except BaseException:
        device.completions.left(completions, entries)
        raise


def _closed_peer() -> RdmanetError:
    return UnavailableError("the peer has been closed", operation="close")
