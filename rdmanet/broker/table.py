"""The leases that are not revoked, with the indexes and counts that go with them."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from rdmanet import lease as wire
from rdmanet.broker.values import Directory, EndView, Key, LeaseView
from rdmanet.lease import lease_text
from rdmanet.model import Device, GuardEntry, GuardState, PodName


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
    service: str | None  # None for adopted leases, whose connector and listener are not told apart either
    since_s: float
    batch: Batch | None  # None: granted
    deadline_s: float | None = None  # of a batch's first: when it times out; unclaimed: when it is revoked

    @property
    def phase(self) -> Phase:
        return Phase.GRANTED if self.batch is None else self.batch.phase

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

    def by_ends(self, keys: Collection[Key]) -> list[Lease]:
        """The leases that these ends are in."""
        if self._by_end.keys().isdisjoint(keys):
            return []
        return [self._leases[number] for number in {self._by_end[key] for key in keys if key in self._by_end}]

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
                self._by_end[side.key] = lease.id
        if lease.deadline_s is not None:
            self._with_deadline.add(lease.id)

    def add_batch(self, batch: Batch) -> None:
        """Enter a pending batch, whose connecting ends are known."""
        connector, listener = batch.first.sides
        for lease in batch.leases:
            self._leases[lease.id] = lease
            if lease.connector.key is not None:
                self._by_end[lease.connector.key] = lease.id
        self._per_pod[connector.pod] += len(batch.leases)
        self._per_pod[listener.pod] += len(batch.leases)
        self._with_deadline.add(batch.first.id)
        self._pending_per_pod[connector.pod] += 1

    def answered(self, batch: Batch, ends: wire.Ends) -> None:
        """The listener has accepted with these ends: pending → writing."""
        batch.phase, batch.ends = Phase.WRITING, ends
        for lease, key in zip(batch.leases, ends.keys, strict=True):
            lease.listener.key = key
            self._by_end[key] = lease.id
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
                del self._by_end[side.key]
        if lease.batch is not None and lease.phase is Phase.PENDING and lease is lease.batch.first:
            self._pending_per_pod[lease.connector.pod] -= 1
        self._with_deadline.discard(lease.id)

    def held(self, keys: Collection[Key]) -> Key | None:
        """The first of these ends that is in a lease of a living connection. An unclaimed one gives way: its QPN is in
        the hands of whoever names it now."""
        if self._by_end.keys().isdisjoint(keys):
            return None
        for key in keys:
            lease = self.by_end(key)
            if lease is not None and not any(s.key == key and s.connection is None for s in lease.sides):
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
        state="unclaimed" if unclaimed else "granted" if lease.phase is Phase.GRANTED else "pending",
        connector=EndView(str(connector.pod), connector.key),
        listener=EndView(str(listener.pod), listener.key),
        service=lease.service,
        age_s=now_s - lease.since_s,
    )


def adoptable(
    guards: Mapping[Key, GuardEntry], key: Key, directory: Directory, now_s: float, deadline_s: float
) -> Lease | None:
    """The lease that this entry of an earlier agent and its peer's make, None unless each names the other and both can
    go on."""
    entry = guards[key]
    peer_key = (entry.peer_address, entry.peer_qpn)
    peer, view, peer_view = guards.get(peer_key), directory.by_address(key[0]), directory.by_address(peer_key[0])
    if peer is None or view is None or peer_view is None or view.device is None or peer_view.device is None:
        return None
    mutual = peer_key != key and (peer.lease, peer.peer_address, peer.peer_qpn) == (entry.lease, *key)
    if not mutual or not entry.state is peer.state is GuardState.GRANTED:
        return None
    return Lease(
        entry.lease,
        Side(view.name, view.device, None, None, key),
        Side(peer_view.name, peer_view.device, None, None, peer_key),
        None,
        now_s,
        None,
        deadline_s=deadline_s,
    )
