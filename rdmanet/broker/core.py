"""The broker's decisions, without I/O and without a clock.

The server reports what happened (connected, received, disconnected, guard written, holder found, time passed) and
does the effects that come back, in their order. A lease goes pending → writing → granted:

* ``pending``: the listener has been told and has not answered;
* ``writing``: it has accepted, and its guard entries are being written. Only ``guard_written`` grants, so nobody
  hears of a lease whose packets the datapath would drop;
* ``granted``: until one side releases it, disconnects, or its pod goes.

Entries that an earlier agent left become leases without connections, until their processes claim them. Revoked
entries stay in the guard for a while (rdmanet.broker.revoked).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping

from rdmanet import lease as wire
from rdmanet.broker import rules
from rdmanet.broker.revoked import RevokedEnds, queries
from rdmanet.broker.table import Claiming, Connection, Lease, LeaseTable, Phase, Side
from rdmanet.broker.values import (
    Cause,
    Close,
    Counts,
    DeleteGuard,
    Directory,
    Effect,
    FindHolder,
    Granted,
    Key,
    LeaseView,
    Limits,
    PodView,
    Reason,
    Send,
    SetGuard,
    dismiss,
    error,
    reply,
)
from rdmanet.errors import RequestError
from rdmanet.lease import pod_text
from rdmanet.model import GuardEntry, GuardState, PodName, address_of


class BrokerCore:
    """State machine of all leases on this host. Not thread-safe; every method returns effects to do in order."""

    def __init__(
        self,
        directory: Directory,
        *,
        limits: Limits | None = None,
        permits: Callable[[PodView, PodView], str | None] = rules.permits_all,
        random_id: Callable[[], int] = lambda: secrets.randbits(63),
    ):
        self.counts = Counts()
        self._directory = directory
        self._limits = limits or Limits()
        self._permits = permits
        self._connections: dict[int, Connection] = {}
        self._listening: dict[tuple[PodName, str], int] = {}
        self._leases = LeaseTable(random_id)
        self._queries = queries()
        self._revoked = RevokedEnds(self._limits, self._queries)
        self._claims: dict[int, Claiming] = {}  # query → the claim that waits for it

    # What the server reports

    def connected(self, connection: int, cookie: int, pid: int, now_s: float) -> list[Effect]:
        """A process opened a connection in the network namespace with this cookie."""
        view = self._directory.by_cookie(cookie)
        if view is None:
            sentence = "this network namespace is not a pod of rdmanet (any more)"
            return dismiss(connection, Reason.NO_SUCH_POD, sentence)
        if sum(c.pod == view.name for c in self._connections.values()) >= self._limits.connections_per_pod:
            limit = self._limits.connections_per_pod
            sentence = f"{pod_text(view.name)} has {limit} connections to the agent, the most; close some"
            return dismiss(connection, Reason.LIMIT, sentence)
        self._connections[connection] = Connection(view.name, cookie, pid)
        return []

    def receive(self, connection: int, text: str, now_s: float) -> list[Effect]:
        """A message came. A connection that the core has closed may still have some under way: they are ignored."""
        state = self._connections.get(connection)
        if state is None:
            return []
        view = self._directory.by_cookie(state.cookie)
        if view is None or view.name != state.pod:
            return [
                *self.disconnected(connection, now_s),
                Close(connection, "this network namespace is not a pod of rdmanet any more"),
            ]
        try:
            request = wire.parse_request(text)
        except RequestError as refused:
            return [error(connection, wire.request_id(text), Reason.MALFORMED, refused.sentence)]
        if isinstance(request, wire.Hello):
            return self._hello(connection, state, view, request)
        if not state.greeted:
            return [error(connection, request.id, Reason.ORDER, "the first message must be hello")]
        match request:
            case wire.Unlisten():
                self._unlisten(state, request.service)
                return [reply(connection, request.id)]
            case wire.Listen():
                return self._listen(connection, state, view, request)
            case wire.Connect():
                return self._connect(connection, state, view, request, now_s)
            case wire.Accept() | wire.Reject():
                lease = self._leases.get(request.lease)
                pending = lease is not None and lease.phase is Phase.PENDING
                if lease is None or not pending or lease.listener.connection != connection:
                    sentence = rules.unknown_lease(request.lease)
                    return [error(connection, request.id, Reason.UNKNOWN_LEASE, sentence)]
                if isinstance(request, wire.Accept):
                    return self._accept(connection, view, lease, request, now_s)
                return self._reject(connection, lease, request, now_s)
            case wire.Claim():
                return self._claim(connection, state, request)
            case wire.Release():
                return self._release(connection, state, request, now_s)

    def disconnected(self, connection: int, now_s: float) -> list[Effect]:
        """The connection is gone, and with it its listeners and leases."""
        state = self._connections.pop(connection, None)
        if state is None:
            return []
        for service in list(state.services):
            self._unlisten(state, service)
        effects: list[Effect] = []
        sentence = f"{pod_text(state.pod)} closed its end: its process ended or left the agent"
        for number in sorted(state.leases):
            lease = self._leases.get(number)
            if lease is not None:
                effects += self._end(lease, Cause.DISCONNECTED, Reason.PEER_GONE, sentence, now_s)
        return effects

    def guard_written(self, number: int, failure: str | None, now_s: float) -> list[Effect]:
        """The entries of a SetGuard are in the map, or are not and ``failure`` says why."""
        lease = self._leases.get(number)
        if lease is None or lease.phase is not Phase.WRITING:
            return []  # ended meanwhile; what was written is being revoked
        if failure is not None:
            sentence = f"the datapath could not take the lease: {failure}"
            return self._end(lease, Cause.INCOMPLETE, Reason.UNAVAILABLE, sentence, now_s)
        connector, listener = lease.sides
        assert connector.connection is not None
        assert listener.connection is not None
        assert listener.end is not None
        lease.phase = Phase.GRANTED
        seconds, lease.since_s = now_s - lease.since_s, now_s
        self.counts.granted += 1
        answer = wire.ConnectReply(number, listener.end, listener.pod)
        return [
            reply(listener.connection, lease.accept_id),
            reply(connector.connection, lease.connect_id, answer.to_json()),
            Granted(seconds),
        ]

    def holder_found(self, query: int, pid: int | None, now_s: float) -> list[Effect]:
        """The answer to FindHolder: the pid of the queue pair's creator, 0 when the kernel does not know it (the thread
        has ended), None when there is no such queue pair."""
        claim = self._claims.pop(query, None)
        if claim is None:
            return self._revoked.holder_found(query, pid, now_s)
        lease, side = claim.waiting.pop(query)
        state = self._connections.get(claim.connection)
        if state is None:
            return []
        # Where the kernel cannot say whose the queue pair is, pod, QPN and the lease's secret id have to do.
        if pid in (state.pid, 0) and lease.id in self._leases and side.connection is None:
            side.connection, side.pid = claim.connection, state.pid
            state.leases.add(lease.id)
            claim.claimed.append(lease.id)
            self.counts.claimed += 1
            if all(s.connection is not None for s in lease.sides):
                self._leases.no_deadline(lease)
        else:
            claim.lost.append(lease.id)
        return self._claim_answer(claim)

    def holder_unknown(self, query: int, now_s: float) -> list[Effect]:
        """FindHolder could not be answered: what depends on it is asked again later."""
        claim = self._claims.pop(query, None)
        if claim is None:
            self._revoked.holder_unknown(query, now_s)
            return []
        for other in claim.waiting:
            self._claims.pop(other, None)
        sentence = "the kernel's list of queue pairs could not be read; claim again"
        return [error(claim.connection, claim.request_id, Reason.UNAVAILABLE, sentence)]

    def adopt(self, guards: Mapping[Key, GuardEntry], now_s: float) -> list[Effect]:
        """Take over what an earlier agent left in the guard map; before the first connection."""
        effects: list[Effect] = []
        for key, entry in sorted(guards.items(), key=lambda item: (item[1].lease, item[0])):
            if self._leases.by_end(key) is not None:
                continue  # came with its other end
            view = self._directory.by_address(key[0])
            if view is None:
                effects.append(DeleteGuard(*key))
                continue
            lease = self._adoptable(guards, key, entry, view, now_s)
            if lease is not None:
                self._leases.add(lease)
                self.counts.adopted += 1
                continue
            if entry.state is GuardState.GRANTED:
                self.counts.revoked[Cause.INCOMPLETE] += 1
                revoked = GuardEntry(entry.lease, entry.peer_address, entry.peer_qpn, GuardState.REVOKED)
                effects.append(SetGuard(entry.lease, ((key, revoked),)))
            self._revoked.add(key, view.device, None, now_s)
        return effects

    def _adoptable(
        self, guards: Mapping[Key, GuardEntry], key: Key, entry: GuardEntry, view: PodView, now_s: float
    ) -> Lease | None:
        """The lease that this entry and its peer's make, None unless each names the other and both can go on."""
        peer_key = (entry.peer_address, entry.peer_qpn)
        peer, peer_view = guards.get(peer_key), self._directory.by_address(peer_key[0])
        if peer is None or peer_view is None or view.device is None or peer_view.device is None:
            return None
        mutual = peer_key != key and (peer.lease, peer.peer_address, peer.peer_qpn) == (entry.lease, *key)
        granted = entry.state is peer.state is GuardState.GRANTED
        if not mutual or not granted or entry.lease in self._leases:
            return None
        return Lease(
            entry.lease,
            Side(view.name, view.device, None, None, key, None),
            Side(peer_view.name, peer_view.device, None, None, peer_key, None),
            None,
            Phase.GRANTED,
            now_s,
            deadline_s=now_s + self._limits.grace_s,
        )

    def pod_gone(self, name: PodName, addresses: Collection[bytes], cookie: int | None, now_s: float) -> list[Effect]:
        """A pod loses these addresses (address keys) and, with a cookie, its network namespace: nothing of them stays,
        so that others can have them. Not by name: a new pod of that name may be there already."""
        effects: list[Effect] = []
        sentence = f"{pod_text(name)} has been deleted"
        for lease in self._leases:
            if any(side.key is not None and side.key[0] in addresses for side in lease.sides):
                effects += self._end(lease, Cause.POD_GONE, Reason.PEER_GONE, sentence, now_s)
        for connection, state in list(self._connections.items()):
            if state.cookie == cookie:
                effects += [*self.disconnected(connection, now_s), Close(connection, sentence)]
        return effects + self._revoked.addresses_gone(addresses)

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed: end what is overdue, ask the kernel about revoked queue pairs."""
        effects: list[Effect] = []
        limits = self._limits
        for lease in self._leases.overdue(now_s):
            if lease.phase is Phase.GRANTED:
                sentence = f"nobody claimed the other end within {limits.grace_s:g} s of the agent's start"
                effects += self._end(lease, Cause.UNCLAIMED, Reason.PEER_GONE, sentence, now_s)
            else:
                place = f"{pod_text(lease.listener.pod)}:{lease.service}"
                sentence = f"{place} did not answer within {limits.pending_s:g} s"
                effects += self._end(lease, Cause.RELEASED, Reason.TIMED_OUT, sentence, now_s)
        return effects + self._revoked.due(now_s)

    def next_deadline_s(self) -> float | None:
        """When ``tick`` has something to do next, on the clock of ``now_s``; None: not before something happens."""
        times_s = (self._leases.next_deadline_s(), self._revoked.next_check_s())
        return min((t for t in times_s if t is not None), default=None)

    def snapshot(self, now_s: float) -> list[LeaseView]:
        """All leases that are not revoked, oldest first."""
        return self._leases.snapshot(now_s)

    def services(self) -> list[tuple[PodName, str]]:
        """What can be connected to: pods and their services."""
        return list(self._listening)

    # Requests

    def _hello(self, connection: int, state: Connection, view: PodView, request: wire.Hello) -> list[Effect]:
        if state.greeted:
            return [error(connection, request.id, Reason.ORDER, "hello was said already")]
        if request.version != wire.PROTOCOL_VERSION:
            sentence = (
                f"the agent speaks version {wire.PROTOCOL_VERSION} of the lease protocol and the library "
                f"{request.version}: install the same rdmanet on both sides"
            )
            return [error(connection, request.id, Reason.VERSION, sentence)]
        state.greeted = True
        device = view.device.name if view.device else None
        answer = wire.HelloReply(view.name, device, tuple(map(address_of, view.addresses)), view.max_leases)
        return [reply(connection, request.id, answer.to_json())]

    def _listen(self, connection: int, state: Connection, view: PodView, request: wire.Listen) -> list[Effect]:
        place = (view.name, request.service)
        name = pod_text(view.name)
        if view.device is None:
            return [error(connection, request.id, Reason.NO_DEVICE, wire.no_device(view.name))]
        if place in self._listening:
            sentence = f"a process of {name} listens on {request.service} already"
            return [error(connection, request.id, Reason.CONFLICT, sentence)]
        if sum(pod == view.name for pod, _ in self._listening) >= self._limits.listeners_per_pod:
            sentence = f"{name} listens on {self._limits.listeners_per_pod} services already, the most"
            return [error(connection, request.id, Reason.LIMIT, sentence)]
        self._listening[place] = connection
        state.services.add(request.service)
        return [reply(connection, request.id)]

    def _unlisten(self, state: Connection, service: str) -> None:
        if service in state.services:
            state.services.remove(service)
            del self._listening[state.pod, service]

    def _connect(
        self, connection: int, state: Connection, view: PodView, request: wire.Connect, now_s: float
    ) -> list[Effect]:
        target, service = request.target.pod_name(view.name), request.target.service
        peer = self._directory.by_name(target)
        key = (request.end.gid, request.end.qpn)
        refusal = rules.connect_refusal(
            view,
            peer,
            target,
            service,
            key,
            leases=self._leases,
            listening=self._listening,
            limits=self._limits,
            permits=self._permits,
        )
        if refusal is not None:
            self.counts.refused[refusal[0]] += 1
            return [error(connection, request.id, *refusal)]
        assert peer is not None
        assert peer.device is not None
        assert view.device is not None
        effects = self._supersede(key, view, now_s)
        listening = self._listening[target, service]
        lease = Lease(
            self._leases.new_id(),
            Side(view.name, view.device, connection, state.pid, key, request.end),
            Side(peer.name, peer.device, listening, self._connections[listening].pid, None, None),
            service,
            Phase.PENDING,
            now_s,
            deadline_s=now_s + self._limits.pending_s,
            connect_id=request.id,
        )
        self._leases.add(lease)
        state.leases.add(lease.id)
        self._connections[listening].leases.add(lease.id)
        return [*effects, Send(listening, wire.Incoming(lease.id, view.name, service, request.end))]

    def _accept(self, connection: int, view: PodView, lease: Lease, request: wire.Accept, now_s: float) -> list[Effect]:
        connector, listener = lease.sides
        assert connector.key is not None
        key = (request.end.gid, request.end.qpn)
        problem = rules.foreign_gid(view, key[0])
        if problem is None and address_of(key[0]).version != address_of(connector.key[0]).version:
            problem = "the two ends use addresses of different families"
        if problem is None and self._leases.is_held(key):
            problem = f"queue pair {key[1]} of {pod_text(view.name)} has a lease already"
        if problem is not None:
            return [
                error(connection, request.id, Reason.CONFLICT, problem),
                *self._end(lease, Cause.RELEASED, Reason.REJECTED, problem, now_s, by=listener),
            ]
        effects = self._supersede(key, view, now_s)
        self._leases.answered(lease, key)
        listener.end, lease.accept_id = request.end, request.id
        for own in (key, connector.key):
            self._revoked.forget(own)
        entries = (
            (connector.key, GuardEntry(lease.id, *key, GuardState.GRANTED)),
            (key, GuardEntry(lease.id, *connector.key, GuardState.GRANTED)),
        )
        return [*effects, SetGuard(lease.id, entries)]

    def _reject(self, connection: int, lease: Lease, request: wire.Reject, now_s: float) -> list[Effect]:
        sentence = f"{pod_text(lease.listener.pod)}:{lease.service} refused: {request.sentence}"
        return [
            reply(connection, request.id),
            *self._end(lease, Cause.RELEASED, Reason.REJECTED, sentence, now_s, by=lease.listener),
        ]

    def _release(self, connection: int, state: Connection, request: wire.Release, now_s: float) -> list[Effect]:
        lease = self._leases.get(request.lease)
        if lease is None or lease.id not in state.leases or lease.phase is not Phase.GRANTED:
            sentence = rules.unknown_lease(request.lease)
            return [error(connection, request.id, Reason.UNKNOWN_LEASE, sentence)]
        side = next(side for side in lease.sides if side.connection == connection)
        sentence = f"{pod_text(state.pod)} closed its end"
        return [
            *self._end(lease, Cause.RELEASED, Reason.PEER_GONE, sentence, now_s, by=side),
            reply(connection, request.id),
        ]

    def _claim(self, connection: int, state: Connection, request: wire.Claim) -> list[Effect]:
        claim = Claiming(connection, request.id, {})
        effects: list[Effect] = []
        for item in request.leases:
            lease = self._leases.get(item.lease)
            side = next(
                (
                    s
                    for s in (lease.sides if lease is not None else ())
                    if s.connection is None and s.pod == state.pod and s.key is not None and s.key[1] == item.qpn
                ),
                None,
            )
            if lease is None or side is None:
                claim.lost.append(item.lease)
                continue
            query = next(self._queries)
            claim.waiting[query] = (lease, side)
            self._claims[query] = claim
            effects.append(FindHolder(query, side.device, item.qpn))
        return effects + self._claim_answer(claim)

    def _claim_answer(self, claim: Claiming) -> list[Effect]:
        if claim.waiting:
            return []
        answer = wire.ClaimReply(tuple(claim.claimed), tuple(claim.lost))
        return [reply(claim.connection, claim.request_id, answer.to_json())]

    # How leases end

    def _supersede(self, key: Key, view: PodView, now_s: float) -> list[Effect]:
        """An unclaimed lease ends when its QPN is named for a new one: the old queue pair cannot exist any more."""
        old = self._leases.by_end(key)
        if old is None:
            return []
        sentence = f"{pod_text(view.name)} uses the queue pair for another lease"
        return self._end(old, Cause.SUPERSEDED, Reason.PEER_GONE, sentence, now_s)

    def _end(
        self,
        lease: Lease,
        cause: Cause,
        reason: Reason,
        sentence: str,
        now_s: float,
        *,
        by: Side | None = None,
    ) -> list[Effect]:
        """The lease is over. Its packets are dropped first; then whoever is left and did not end it is told."""
        self._leases.remove(lease)
        for side in lease.sides:
            state = self._connections.get(side.connection) if side.connection is not None else None
            if state is not None:
                state.leases.discard(lease.id)
        effects: list[Effect] = []
        if lease.phase is not Phase.PENDING:
            effects.append(self._revoke(lease, now_s))
        if lease.phase is Phase.GRANTED:
            self.counts.revoked[cause] += 1
        else:
            self.counts.refused[reason] += 1
        for side in lease.sides:
            if side is by or side.connection is None or side.connection not in self._connections:
                continue
            if lease.phase is not Phase.GRANTED and side is lease.connector:
                effects.append(error(side.connection, lease.connect_id, reason, sentence))
            elif lease.phase is Phase.WRITING:
                effects.append(error(side.connection, lease.accept_id, reason, sentence))
            else:
                effects.append(Send(side.connection, wire.Revoked(lease.id, sentence)))
        return effects

    def _revoke(self, lease: Lease, now_s: float) -> SetGuard:
        first, second = lease.sides
        entries = []
        for side, peer in ((first, second), (second, first)):
            assert side.key is not None
            assert peer.key is not None
            entries.append((side.key, GuardEntry(lease.id, *peer.key, GuardState.REVOKED)))
            self._revoked.add(side.key, side.device, side.pid, now_s)
        return SetGuard(lease.id, tuple(entries))
