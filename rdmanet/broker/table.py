"""The leases that are not revoked, with the indexes and counts that go with them."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rdmanet import lease as wire
from rdmanet.broker.values import EndView, Key, LeaseView
from rdmanet.lease import lease_text
from rdmanet.model import Device, PodName


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
    end: wire.End | None  # None also for adopted leases: PSN and MTU are not in the guard


@dataclass(slots=True, eq=False)
class Lease:
    """Two sides and what they are waiting for."""

    id: int
    connector: Side
    listener: Side
    service: str | None  # None for adopted leases, whose connector and listener are not told apart either
    phase: Phase
    since_s: float
    deadline_s: float | None = None  # when a pending lease times out, or an unclaimed one is revoked
    connect_id: int = 0
    accept_id: int = 0

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.connector, self.listener


@dataclass(slots=True, eq=False)
class Connection:
    """A process of a pod that is connected, and what goes with its connection."""

    pod: PodName
    cookie: int
    pid: int
    greeted: bool = False
    services: set[str] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Claiming:
    """A claim that waits for the kernel to say whose the queue pairs are."""

    connection: int
    request_id: int
    waiting: dict[int, tuple[Lease, Side]]  # query → what it decides
    claimed: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


class LeaseTable:
    """All leases, findable by id and by end, counted per pod."""

    def __init__(self, random_id: Callable[[], int]):
        self._random_id = random_id
        self._leases: dict[int, Lease] = {}
        self._by_end: dict[Key, int] = {}
        self._per_pod: Counter[PodName] = Counter()
        self._pending_per_pod: Counter[PodName] = Counter()
        self._with_deadline: set[int] = set()

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def __contains__(self, number: int) -> bool:
        return number in self._leases

    def get(self, number: int) -> Lease | None:
        return self._leases.get(number)

    def by_end(self, key: Key) -> Lease | None:
        number = self._by_end.get(key)
        return None if number is None else self._leases[number]

    def new_id(self) -> int:
        """A random id that is not in use: nobody can guess another's, and a new agent cannot repeat one."""
        while (number := self._random_id()) in self._leases or number == 0:
            pass
        return number

    def add(self, lease: Lease) -> None:
        """Enter a lease, pending or adopted, with the keys its sides have by now."""
        self._leases[lease.id] = lease
        for side in lease.sides:
            self._per_pod[side.pod] += 1
            if side.key is not None:
                self._by_end[side.key] = lease.id
        if lease.phase is Phase.PENDING:
            self._pending_per_pod[lease.connector.pod] += 1
        if lease.deadline_s is not None:
            self._with_deadline.add(lease.id)

    def answered(self, lease: Lease, key: Key) -> None:
        """The listener has accepted with this end: pending → writing."""
        lease.phase = Phase.WRITING
        lease.listener.key = key
        self._by_end[key] = lease.id
        self._pending_per_pod[lease.connector.pod] -= 1
        self.no_deadline(lease)

    def no_deadline(self, lease: Lease) -> None:
        lease.deadline_s = None
        self._with_deadline.discard(lease.id)

    def remove(self, lease: Lease) -> None:
        del self._leases[lease.id]
        for side in lease.sides:
            self._per_pod[side.pod] -= 1
            if side.key is not None:
                del self._by_end[side.key]
        if lease.phase is Phase.PENDING:
            self._pending_per_pod[lease.connector.pod] -= 1
        self._with_deadline.discard(lease.id)

    def is_held(self, key: Key) -> bool:
        """Whether this end is in a lease of a living connection. An unclaimed one gives way: its QPN is in the
        hands of whoever names it now."""
        lease = self.by_end(key)
        return lease is not None and not any(s.key == key and s.connection is None for s in lease.sides)

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
        state="unclaimed" if unclaimed else "granted" if lease.phase is Phase.GRANTED else "pending",
        connector=EndView(str(connector.pod), connector.key),
        listener=EndView(str(listener.pod), listener.key),
        service=lease.service,
        age_s=now_s - lease.since_s,
    )
