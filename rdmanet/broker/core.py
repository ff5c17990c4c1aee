"""The broker's decisions, without I/O and without a clock.

The server reports what happened (connected, received, disconnected, guard written, holder found, time passed) and
does the effects that come back, in their order. A lease goes pending → writing → granted:

* ``pending``: the listener has been told and has not answered;
* ``writing``: it has accepted, and its guard entries are being written. Only ``guard_written`` grants, so nobody
  hears of a lease whose packets the datapath would drop;
* ``granted``: until one side releases it, disconnects, or its pod goes.

The leases that one connect asks for are a batch: they go this way together, and none is granted alone. Granted, each
is a lease like any other.

Entries that an earlier agent left become leases without connections, until their processes claim them. Revoked
entries stay in the guard for a while (rdmanet.broker.revoked).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from rdmanet import lease as wire
from rdmanet.broker import rules
from rdmanet.broker.adopted import adopted
from rdmanet.broker.claims import Claims
from rdmanet.broker.judging import Judging, Permits
from rdmanet.broker.revoked import RevokedEnds, queries
from rdmanet.broker.table import Batch, Connection, Lease, LeaseTable, Phase, Service, Side
from rdmanet.broker.values import (
    Cause,
    Close,
    Counts,
    DatagramKey,
    DeleteGuard,
    Directory,
    Effect,
    Granted,
    Greeted,
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
from rdmanet.model import DatagramEntry, GuardEntry, GuardState, PodName, Transport, address_of

#: The own entry of a UD queue pair; who may send to it is in the datagrams map.
DATAGRAM = GuardEntry(0, bytes(16), 0, GuardState.DATAGRAM)


class BrokerCore:
    """State machine of all leases on this host. Not thread-safe; every method returns effects to do in order."""

    def __init__(
        self,
        directory: Directory,
        *,
        limits: Limits | None = None,
        permits: Permits = rules.permits_all,
        random_id: Callable[[], int] = lambda: secrets.randbits(63),
    ):
        self.counts = Counts()
        self._directory = directory
        self._limits = limits or Limits()
        self._permits = permits
        self._connections: dict[int, Connection] = {}
        self._listening: dict[tuple[PodName, str], Service] = {}
        self._leases = LeaseTable(random_id)
        self._judging = Judging(directory, permits, self._leases)
        self._queries = queries()
        self._revoked = RevokedEnds(self._limits, self._queries)
        self._claims = Claims(self._connections, self._leases, self._queries, self.counts)

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
                batch = self._pending_batch(request.lease)
                if batch is None or batch.first.listener.connection != connection:
                    sentence = rules.unknown_lease(request.lease)
                    return [error(connection, request.id, Reason.UNKNOWN_LEASE, sentence)]
                if isinstance(request, wire.Accept):
                    return self._accept(connection, view, batch, request, now_s)
                return self._reject(connection, batch, request, now_s)
            case wire.Claim():
                return self._claims.ask(connection, state, request)
            case wire.Release():
                return self._release(connection, state, request, now_s)

    def disconnected(self, connection: int, now_s: float) -> list[Effect]:
        """The connection is gone, and with it its listeners and leases."""
        state = self._connections.pop(connection, None)
        if state is None:
            return []
        for service in list(state.services):
            self._unlisten(state, service)
        sentence = f"{pod_text(state.pod)} closed its end: its process ended or left the agent"
        found = [lease for number in sorted(state.leases) if (lease := self._leases.get(number)) is not None]
        return self._end(found, Cause.DISCONNECTED, Reason.PEER_GONE, sentence, now_s)

    def guard_written(self, number: int, failure: str | None, now_s: float) -> list[Effect]:
        """The entries of a SetGuard are in the map, or are not and ``failure`` says why."""
        lease = self._leases.get(number)
        batch = None if lease is None else lease.batch
        if batch is None or batch.phase is not Phase.WRITING or batch.ends is None:
            return []  # ended meanwhile; what was written is being revoked
        if failure is not None:
            sentence = f"the datapath could not take the lease: {failure}"
            return self._end(batch.leases, Cause.INCOMPLETE, Reason.UNAVAILABLE, sentence, now_s)
        connector, listener = batch.first.sides
        assert connector.connection is not None
        assert listener.connection is not None
        seconds = now_s - batch.first.since_s
        for lease in batch.leases:
            lease.batch, lease.since_s = None, now_s
        self.counts.granted += len(batch.leases)
        answer = wire.ConnectReply(number, batch.ends, listener.pod)
        return [
            reply(listener.connection, batch.accept_id),
            reply(connector.connection, batch.connect_id, answer.to_json()),
            Granted(seconds),
        ]

    def holders_found(self, holders: Mapping[int, int | None], now_s: float) -> list[Effect]:
        """The answers to FindHolders, by query: the pid of the queue pair's creator, 0 when the kernel does not know it
        (the thread has ended), None when there is no such queue pair."""
        effects: list[Effect] = []
        gone = []
        for query, pid in holders.items():
            claimed = self._claims.holder_found(query, pid)
            if claimed is not None:
                effects += claimed
            elif (key := self._revoked.holder_found(query, pid, now_s)) is not None:
                gone.append(key)
        return [*effects, DeleteGuard(tuple(gone))] if gone else effects

    def holders_unknown(self, queries: Iterable[int], now_s: float) -> list[Effect]:
        """FindHolders could not be answered: what depends on it is asked again later."""
        effects: list[Effect] = []
        for query in queries:
            refused = self._claims.holder_unknown(query)
            if refused is None:
                self._revoked.holder_unknown(query, now_s)
            else:
                effects += refused
        return effects

    def adopt(
        self, guards: Mapping[Key, GuardEntry], datagrams: Mapping[DatagramKey, DatagramEntry], now_s: float
    ) -> list[Effect]:
        """Take over what an earlier agent left in the guard's maps; before the first connection."""
        found = adopted(guards, datagrams, self._directory, now_s, now_s + self._limits.grace_s)
        for lease in found.leases:
            self._leases.add(lease)
        self.counts.adopted += len(found.leases)
        for key, device in found.revoked:
            self._revoked.add(key, device, None, now_s)
        effects: list[Effect] = []
        if found.incomplete:
            self.counts.revoked[Cause.INCOMPLETE] += len(found.incomplete)
            effects.append(SetGuard(found.incomplete[0][1].lease, tuple(found.incomplete)))
        if found.strange or found.strange_datagrams:
            effects.append(DeleteGuard(tuple(found.strange), tuple(found.strange_datagrams)))
        return effects

    def pod_gone(self, name: PodName, addresses: Collection[bytes], cookie: int | None, now_s: float) -> list[Effect]:
        """A pod loses these addresses (address keys) and, with a cookie, its network namespace: nothing of them stays,
        so that others can have them. Not by name: a new pod of that name may be there already."""
        effects: list[Effect] = []
        sentence = f"{pod_text(name)} has been deleted"
        gone = [x for x in self._leases if any(s.key is not None and s.key[0] in addresses for s in x.sides)]
        effects += self._end(gone, Cause.POD_GONE, Reason.PEER_GONE, sentence, now_s)
        for connection, state in list(self._connections.items()):
            if state.cookie == cookie:
                effects += [*self.disconnected(connection, now_s), Close(connection, sentence)]
        return effects + self._revoked.addresses_gone(addresses)

    def device_gone(self, cookie: int, sentence: str, now_s: float) -> list[Effect]:
        """The device of the pod in this network namespace cannot be used any more: its leases are over, and its
        processes are told why. Its view says so from now on (``PodView.unhealthy``)."""
        effects = self._tell_of_device(cookie, sentence)
        connections = {number for number, state in self._connections.items() if state.cookie == cookie}
        view = self._directory.by_cookie(cookie)
        addresses = () if view is None else view.addresses
        ended = [
            lease
            for lease in self._leases
            if any(s.connection in connections or (s.key is not None and s.key[0] in addresses) for s in lease.sides)
        ]
        return effects + self._end(ended, Cause.DEVICE_GONE, Reason.NO_DEVICE, sentence, now_s)

    def device_back(self, cookie: int) -> list[Effect]:
        """It can be used again."""
        return self._tell_of_device(cookie, None)

    def _tell_of_device(self, cookie: int, sentence: str | None) -> list[Effect]:
        message = wire.DeviceState(None if sentence is None else wire.sentence_of(sentence))
        told = [number for number, state in self._connections.items() if state.cookie == cookie and state.greeted]
        return [Send(number, message) for number in told]

    def policy_changed(self, now_s: float) -> list[Effect]:
        """Asks again for every lease, also for those that wait: who may not have it any more is told which policy."""
        refused = self._judging.refused().items()
        return [e for s, found in refused for e in self._end(found, Cause.POLICY, Reason.POLICY, s, now_s)]

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed: end what is overdue, ask the kernel about revoked queue pairs."""
        effects: list[Effect] = []
        limits = self._limits
        overdue = self._leases.overdue(now_s)
        sentence = f"nobody claimed the other end within {limits.grace_s:g} s of the agent's start"
        unclaimed = [lease for lease in overdue if lease.batch is None]
        effects += self._end(unclaimed, Cause.UNCLAIMED, Reason.PEER_GONE, sentence, now_s)
        for batch in [lease.batch for lease in overdue if lease.batch is not None]:
            place = f"{pod_text(batch.first.listener.pod)}:{batch.first.service}"
            sentence = f"{place} did not answer within {limits.pending_s:g} s"
            effects += self._end(batch.leases, Cause.RELEASED, Reason.TIMED_OUT, sentence, now_s)
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
        answer = wire.HelloReply(
            view.name,
            view.device.name if view.device else None,
            tuple(map(address_of, view.addresses)),
            view.max_leases,
            view.traffic_class,
            view.service_level,
            view.unhealthy,
        )
        return [reply(connection, request.id, answer.to_json()), Greeted(state.cookie, state.pid)]

    def _listen(self, connection: int, state: Connection, view: PodView, request: wire.Listen) -> list[Effect]:
        place = (view.name, request.service)
        name = pod_text(view.name)
        if view.device is None:
            return [error(connection, request.id, Reason.NO_DEVICE, wire.no_device(view.name))]
        if view.unhealthy is not None:
            return [error(connection, request.id, Reason.NO_DEVICE, view.unhealthy)]
        if place in self._listening:
            sentence = f"a process of {name} listens on {request.service} already"
            return [error(connection, request.id, Reason.CONFLICT, sentence)]
        if sum(pod == view.name for pod, _ in self._listening) >= self._limits.listeners_per_pod:
            sentence = f"{name} listens on {self._limits.listeners_per_pod} services already, the most"
            return [error(connection, request.id, Reason.LIMIT, sentence)]
        self._listening[place] = Service(connection, request.transport)
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
        keys = request.ends.keys
        refusal = rules.connect_refusal(
            view,
            peer,
            target,
            service,
            keys,
            transport=request.ends.transport,
            connection=connection,
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
        effects = self._supersede(keys, view, now_s)
        listening = self._listening[target, service].connection
        listener = self._connections[listening]
        batch = Batch(request.id)
        for number, key in zip(self._leases.new_ids(len(keys)), keys, strict=True):
            connecting = Side(view.name, view.device, connection, state.pid, key)
            accepting = Side(peer.name, peer.device, listening, listener.pid, None)
            batch.leases.append(Lease(number, connecting, accepting, service, now_s, batch, request.ends.transport))
        batch.first.deadline_s = now_s + self._limits.pending_s
        self._leases.add_batch(batch)
        numbers = [lease.id for lease in batch.leases]
        state.leases.update(numbers)
        listener.leases.update(numbers)
        return [*effects, Send(listening, wire.Incoming(batch.first.id, view.name, service, request.ends))]

    def _pending_batch(self, number: int) -> Batch | None:
        """The batch whose first lease this is, while its listener has not answered."""
        lease = self._leases.get(number)
        batch = None if lease is None else lease.batch
        return batch if batch is not None and batch.first is lease and batch.phase is Phase.PENDING else None

    def _accept(self, connection: int, view: PodView, batch: Batch, request: wire.Accept, now_s: float) -> list[Effect]:
        listener = batch.first.listener
        refusal = rules.acceptance_refusal(view, batch, request.ends, self._leases, self._judging)
        if refusal is not None:
            told, reason, problem = refusal
            return [
                error(connection, request.id, told, problem),
                *self._end(batch.leases, Cause.RELEASED, reason, problem, now_s, by=listener.connection),
            ]
        effects = self._supersede(request.ends.keys, view, now_s)
        self._leases.answered(batch, request.ends)
        batch.accept_id = request.id
        entries = []
        datagrams: list[tuple[DatagramKey, DatagramEntry]] = []
        for lease, key in zip(batch.leases, request.ends.keys, strict=True):
            connecting = lease.connector.key
            assert connecting is not None
            if lease.transport is Transport.UD:
                entries += [(connecting, DATAGRAM), (key, DATAGRAM)]
                datagrams += [
                    ((connecting, key), DatagramEntry(lease.id, connects=True)),
                    ((key, connecting), DatagramEntry(lease.id)),
                ]
                continue
            entries.append((connecting, GuardEntry(lease.id, *key, GuardState.GRANTED, connects=True)))
            entries.append((key, GuardEntry(lease.id, *connecting, GuardState.GRANTED)))
        self._revoked.forget([key for key, _ in entries])
        return [*effects, SetGuard(batch.first.id, tuple(entries), tuple(datagrams))]

    def _reject(self, connection: int, batch: Batch, request: wire.Reject, now_s: float) -> list[Effect]:
        listener = batch.first.listener
        sentence = f"{pod_text(listener.pod)}:{batch.first.service} refused: {request.sentence}"
        return [
            reply(connection, request.id),
            *self._end(batch.leases, Cause.RELEASED, Reason.REJECTED, sentence, now_s, by=listener.connection),
        ]

    def _release(self, connection: int, state: Connection, request: wire.Release, now_s: float) -> list[Effect]:
        held = [self._leases.get(number) for number in dict.fromkeys(request.leases) if number in state.leases]
        found = [lease for lease in held if lease is not None and lease.phase is Phase.GRANTED]
        if not found:
            sentence = rules.unknown_lease(request.leases[0])
            return [error(connection, request.id, Reason.UNKNOWN_LEASE, sentence)]
        sentence = f"{pod_text(state.pod)} closed its end"
        return [
            *self._end(found, Cause.RELEASED, Reason.PEER_GONE, sentence, now_s, by=connection),
            reply(connection, request.id),
        ]

    # How leases end

    def _supersede(self, keys: Collection[Key], view: PodView, now_s: float) -> list[Effect]:
        """An unclaimed lease ends when its QPN is named for a new one: the old queue pair cannot exist any more."""
        sentence = f"{pod_text(view.name)} uses the queue pair for another lease"
        return self._end(self._leases.unclaimed(keys), Cause.SUPERSEDED, Reason.PEER_GONE, sentence, now_s)

    def _end(
        self,
        leases: Sequence[Lease],
        cause: Cause,
        reason: Reason,
        sentence: str,
        now_s: float,
        *,
        by: int | None = None,
    ) -> list[Effect]:
        """These leases are over; of a batch that is not granted yet all are, or none. Their packets are dropped first;
        then whoever is left is told, except the side of connection ``by``, which ended them."""
        entries: list[tuple[Key, GuardEntry]] = []
        datagrams: list[DatagramKey] = []
        told: dict[int, list[int]] = {}
        effects: list[Effect] = []
        for lease in leases:
            self._leases.remove(lease)
            for side in lease.sides:
                state = None if side.connection is None else self._connections.get(side.connection)
                if state is not None:
                    state.leases.discard(lease.id)
            if lease.phase is not Phase.PENDING:
                entries += self._revoke(lease, now_s)
                if lease.transport is Transport.UD:
                    one, other = (side.key for side in lease.sides)
                    assert one is not None
                    assert other is not None
                    datagrams += [(one, other), (other, one)]
            if lease.batch is not None:
                if lease is lease.batch.first:
                    self.counts.refused[reason] += 1
                    effects += self._batch_ended(lease.batch, reason, sentence, by)
                continue
            self.counts.revoked[cause] += 1
            # A process that leases to itself is told of its other end.
            silent = None if by is None else next((s for s in lease.sides if s.connection == by), None)
            for side in lease.sides:
                if side is not silent and side.connection is not None and side.connection in self._connections:
                    told.setdefault(side.connection, []).append(lease.id)
        for connection, numbers in told.items():
            for first in range(0, len(numbers), wire.MAX_BATCH):
                some = tuple(numbers[first : first + wire.MAX_BATCH])
                effects.append(Send(connection, wire.Revoked(some, sentence)))
        # First what says that nobody may send, then the peers of datagrams: never is a queue pair without either.
        guard: list[Effect] = [SetGuard(leases[0].id, tuple(entries))] if entries else []
        if datagrams:
            guard.append(DeleteGuard((), tuple(datagrams)))
        return guard + effects

    def _batch_ended(self, batch: Batch, reason: Reason, sentence: str, by: int | None) -> list[Effect]:
        """What to say about a batch that is never granted; ``by`` is its listener's connection or None."""
        effects: list[Effect] = []
        connector, listener = (side.connection for side in batch.first.sides)
        if connector is not None and connector in self._connections:
            effects.append(error(connector, batch.connect_id, reason, sentence))
        if by is None and listener is not None and listener in self._connections:
            if batch.phase is Phase.WRITING:
                effects.append(error(listener, batch.accept_id, reason, sentence))
            else:
                effects.append(Send(listener, wire.Revoked(tuple(lease.id for lease in batch.leases), sentence)))
        return effects

    def _revoke(self, lease: Lease, now_s: float) -> list[tuple[Key, GuardEntry]]:
        entries = []
        for side, peer in (lease.sides, lease.sides[::-1]):
            assert side.key is not None
            assert peer.key is not None
            if self._leases.in_guard(side.key):
                continue  # a UD queue pair that has other peers
            entries.append((side.key, GuardEntry(lease.id, *peer.key, GuardState.REVOKED)))
            self._revoked.add(side.key, side.device, side.pid, now_s)
        return entries
