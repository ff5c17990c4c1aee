"""The leases that are not revoked, with the indexes and counts that go with them."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rdmanet import lease as wire
from rdmanet.broker.values import EndView, Key, LeaseView
from rdmanet.lease import lease_text
from rdmanet.model import Device, PodName, Transport


class Phase(enum.Enum):
    """Where a lease is on its way (rdmanet.broker.core)."""

    PENDING = enum.auto()
    WRITING = enum.auto()
    GRANTED = enum.auto()


@dataclass(slots=True, eq=False)
class Side:
    """One end of a lease."""

    pod: PodName
    device: Device
    connection: int | None  # None: left by an earlier agent, and nobody has claimed it yet
    pid: int | None
    key: Key | None  # None: a listener that has not answered


@dataclass(slots=True, eq=False)
class Batch:
    """Leases that one connect asked for: granted together or not at all, and each on its own from then on."""

    connect_id: int
    phase: Phase = Phase.PENDING
    leases: list[Lease] = field(default_factory=list)  # with consecutive ids, in the order of the queue pairs
    accept_id: int = 0
    ends: wire.Ends | None = None  # the listener's, when it has answered

    @property
    def first(self) -> Lease:
        return self.leases[0]


@dataclass(slots=True, eq=False)
class Lease:
    """Two sides and what they are waiting for."""

    id: int
    connector: Side
    listener: Side
    service: str | None  # None for adopted leases
    since_s: float
    batch: Batch | None  # None: granted
    transport: Transport = Transport.RC
    deadline_s: float | None = None  # of a batch's first: when it times out; unclaimed: when it is revoked
    directed: bool = True  # False: adopted from a guard that does not say which side is the connector

    @property
    def phase(self) -> Phase:
        return Phase.GRANTED if self.batch is None else self.batch.phase

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.connector, self.listener


class Service(NamedTuple):
    """What others can connect to: who listens there, and for which queue pairs."""

    connection: int
    transport: Transport


@dataclass(slots=True, eq=False)
class Connection:
    """A process of a pod that is connected, and what goes with its connection."""

    pod: PodName
    cookie: int
    pid: int
    greeted: bool = False
    services: set[str] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)


class LeaseTable:
    """All leases, findable by id and by end, counted per pod."""

    def __init__(self, random_id: Callable[[], int]):
        self._random_id = random_id
        self._leases: dict[int, Lease] = {}
        self._by_end: dict[Key, int] = {}
        self._by_datagram: dict[Key, set[int]] = {}  # ends of UD queue pairs
        self._per_pod: Counter[PodName] = Counter()
        self._pending_per_pod: Counter[PodName] = Counter()
        self._with_deadline: set[int] = set()

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def __contains__(self, number: int) -> bool:
        return number in self._leases

    def get(self, number: int) -> Lease | None:
        return self._leases.get(number)

    def of_end(self, key: Key) -> list[Lease]:
        """The leases that this end is in: several where it is a UD queue pair's."""
        number = self._by_end.get(key)
        if number is not None:
            return [self._leases[number]]
        return [self._leases[number] for number in sorted(self._by_datagram.get(key, ()))]

    def between(self, one: Key, other: Key) -> Lease | None:
        """The lease of these two UD queue pairs with each other."""
        both = self._by_datagram.get(one, set()) & self._by_datagram.get(other, set())
        return self._leases[both.pop()] if both else None

    def unclaimed(self, keys: Collection[Key]) -> list[Lease]:
        """The leases in which one of these ends is, and nobody has claimed it yet."""
        if self._knows_none(keys):
            return []
        found = {lease.id: (lease, side) for key in keys for lease, side in self._sides(key) if side.connection is None}
        return [lease for lease, _ in found.values()]

    def in_guard(self, key: Key) -> bool:
        """Whether this end is in a lease that the guard knows of: granted, or being written."""
        return any(lease.phase is not Phase.PENDING for lease in self.of_end(key))

    def _knows_none(self, keys: Collection[Key]) -> bool:
        return self._by_end.keys().isdisjoint(keys) and self._by_datagram.keys().isdisjoint(keys)

    def _sides(self, key: Key) -> list[tuple[Lease, Side]]:
        return [(lease, side) for lease in self.of_end(key) for side in lease.sides if side.key == key]

    def _enter(self, lease: Lease, key: Key) -> None:
        if lease.transport is Transport.RC:
            self._by_end[key] = lease.id
        else:
            self._by_datagram.setdefault(key, set()).add(lease.id)

    def _take_out(self, lease: Lease, key: Key) -> None:
        if lease.transport is Transport.RC:
            del self._by_end[key]
            return
        numbers = self._by_datagram[key]
        numbers.discard(lease.id)
        if not numbers:
            del self._by_datagram[key]

    def new_ids(self, count: int) -> range:
        """Consecutive random ids that are not in use: nobody can guess another's, and a new agent cannot repeat one."""
        while True:
            first = self._random_id()
            numbers = range(first, first + count)
            if first > 0 and numbers[-1] < 1 << 63 and not any(number in self._leases for number in numbers):
                return numbers

    def add(self, lease: Lease) -> None:
        """Enter a lease, pending or adopted, with the keys its sides have by now."""
        self._leases[lease.id] = lease
        for side in lease.sides:
            self._per_pod[side.pod] += 1
            if side.key is not None:
                self._enter(lease, side.key)
        if lease.deadline_s is not None:
            self._with_deadline.add(lease.id)

    def add_batch(self, batch: Batch) -> None:
        """Enter a pending batch, whose connecting ends are known."""
        connector, listener = batch.first.sides
        for lease in batch.leases:
            self._leases[lease.id] = lease
            if lease.connector.key is not None:
                self._enter(lease, lease.connector.key)
        self._per_pod[connector.pod] += len(batch.leases)
        self._per_pod[listener.pod] += len(batch.leases)
        self._with_deadline.add(batch.first.id)
        self._pending_per_pod[connector.pod] += 1

    def answered(self, batch: Batch, ends: wire.Ends) -> None:
        """The listener has accepted with these ends: pending → writing."""
        batch.phase, batch.ends = Phase.WRITING, ends
        for lease, key in zip(batch.leases, ends.keys, strict=True):
            lease.listener.key = key
            self._enter(lease, key)
        self._pending_per_pod[batch.first.connector.pod] -= 1
        self.no_deadline(batch.first)

    def no_deadline(self, lease: Lease) -> None:
        lease.deadline_s = None
        self._with_deadline.discard(lease.id)

    def remove(self, lease: Lease) -> None:
        """Forget a lease; of a batch that is not granted all must go."""
        del self._leases[lease.id]
        for side in lease.sides:
            self._per_pod[side.pod] -= 1
            if side.key is not None:
                self._take_out(lease, side.key)
        if lease.batch is not None and lease.phase is Phase.PENDING and lease is lease.batch.first:
            self._pending_per_pod[lease.connector.pod] -= 1
        self._with_deadline.discard(lease.id)

    def held(self, keys: Collection[Key], transport: Transport, connection: int) -> Key | None:
        """The first of these ends that ``connection`` cannot lease: it is in a lease of a living connection. A UD queue
        pair may be in many leases, all of its own connection. An unclaimed one gives way: its QPN is in the hands of
        whoever names it now."""
        if self._knows_none(keys):
            return None
        for key in keys:
            for lease, side in self._sides(key):
                several = lease.transport is transport is Transport.UD and side.connection == connection
                if side.connection is not None and not several:
                    return key
        return None

    def ends_of(self, pod: PodName) -> int:
        """How many of the pod's leases are in use, pending ones included."""
        return self._per_pod[pod]

    def pending_of(self, pod: PodName) -> int:
        """How many connects of the pod wait for an answer."""
        return self._pending_per_pod[pod]

    def overdue(self, now_s: float) -> list[Lease]:
        return [self._leases[n] for n in sorted(self._with_deadline) if self._deadline_s(n) <= now_s]

    def next_deadline_s(self) -> float | None:
        return min(map(self._deadline_s, self._with_deadline), default=None)

    def _deadline_s(self, number: int) -> float:
        deadline_s = self._leases[number].deadline_s
        assert deadline_s is not None
        return deadline_s

    def snapshot(self, now_s: float) -> list[LeaseView]:
        """All leases, oldest first. Safe from any thread: sorted() copies the values in one step."""
        return [_view(lease, now_s) for lease in sorted(self._leases.values(), key=lambda x: x.since_s)]


def _view(lease: Lease, now_s: float) -> LeaseView:
    connector, listener = lease.sides
    unclaimed = any(side.connection is None for side in lease.sides)
    return LeaseView(
        lease=lease_text(lease.id),
        transport=lease.transport,
        state="unclaimed" if unclaimed else "granted" if lease.phase is Phase.GRANTED else "pending",
        connector=EndView(str(connector.pod), connector.key),
        listener=EndView(str(listener.pod), listener.key),
        service=lease.service,
        age_s=now_s - lease.since_s,
    )
