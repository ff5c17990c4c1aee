"""What goes into and comes out of the broker's core: views of pods, limits, effects, counts."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from rdmanet.lease import Answer, Json, Refusal, Reply, sentence_of
from rdmanet.model import DatagramEntry, Device, GuardEntry, PodName, Transport

Key = tuple[bytes, int]  # one end: address key, QPN
DatagramKey = tuple[Key, Key]  # what one UD queue pair sends to another: the receiver's end, then the sender's


@dataclass(frozen=True, slots=True)
class PodView:
    """What the broker knows of a pod: its name, addresses (address keys, IPv4 first), device, limit and class."""

    name: PodName
    addresses: tuple[bytes, ...]
    device: Device | None
    max_leases: int
    traffic_class: int = 0
    service_level: int = 0
    unhealthy: str | None = None  # a sentence: why its device cannot be used now


class Directory(Protocol):
    """Who is on this host. Asked on the event loop: answers come from memory."""

    def by_cookie(self, cookie: int) -> PodView | None:
        """The pod whose network namespace has this cookie (SO_NETNS_COOKIE)."""

    def by_name(self, name: PodName) -> PodView | None: ...

    def by_address(self, address: bytes) -> PodView | None:
        """The pod that has this address key; asked for what an earlier agent left in the guard map."""


class Reason(enum.StrEnum):
    """Why a request was refused; also the metric's label and ``kind`` of ``error`` messages."""

    MALFORMED = "malformed"
    VERSION = "version"
    ORDER = "order"  # something else before hello, or hello twice
    NO_SUCH_POD = "no_such_pod"
    NO_DEVICE = "no_device"  # the caller has none
    PEER_NO_DEVICE = "peer_no_device"
    NOT_LISTENING = "not_listening"
    TRANSPORT = "transport"  # the service is of the other one
    ADDRESS_FAMILY = "address_family"
    FOREIGN_GID = "foreign_gid"
    CONFLICT = "conflict"
    LIMIT = "limit"
    POLICY = "policy"
    REJECTED = "rejected"  # by the listening process
    TIMED_OUT = "timed_out"
    PEER_GONE = "peer_gone"
    UNKNOWN_LEASE = "unknown_lease"
    UNAVAILABLE = "unavailable"  # the kernel did not do its part; ask again


class Cause(enum.StrEnum):
    """Why a granted lease ended; also the metric's label."""

    RELEASED = "released"
    DISCONNECTED = "disconnected"
    POD_GONE = "pod_gone"
    DEVICE_GONE = "device_gone"
    UNCLAIMED = "unclaimed"
    SUPERSEDED = "superseded"
    POLICY = "policy"  # it was allowed, and is no more
    INCOMPLETE = "incomplete"  # an earlier agent died while it wrote the guard


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and times of the broker; leases per pod come with the pod (PodView.max_leases)."""

    connections_per_pod: int = 64
    listeners_per_pod: int = 64
    pending_per_pod: int = 64  # connects, whatever their batches' sizes
    pending_s: float = 30.0  # how long a listener may take to answer
    grace_s: float = 30.0  # how long leases of an earlier agent wait to be claimed
    first_check_s: float = 0.5  # after a revocation, until the kernel is asked whether the queue pair is gone
    longest_check_s: float = 60.0  # the interval doubles up to this while the queue pair stays


@dataclass(frozen=True, slots=True)
class Send:
    connection: int
    message: Answer


@dataclass(frozen=True, slots=True)
class SetGuard:
    """Write these entries, then report ``core.guard_written(lease, ...)``; of a batch ``lease`` is the first."""

    lease: int
    entries: tuple[tuple[Key, GuardEntry], ...]
    datagrams: tuple[tuple[DatagramKey, DatagramEntry], ...] = ()  # written after the entries


@dataclass(frozen=True, slots=True)
class DeleteGuard:
    keys: tuple[Key, ...]
    datagrams: tuple[DatagramKey, ...] = ()


@dataclass(frozen=True, slots=True)
class FindHolders:
    """Ask the kernel who holds queue pairs of one device, then report ``core.holders_found`` or ``holders_unknown``."""

    device: Device
    queries: tuple[tuple[int, int], ...]  # query, QPN


@dataclass(frozen=True, slots=True)
class Close:
    connection: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Granted:
    """A batch of leases became usable; ``seconds`` is from the connect message until its guard was written."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Greeted:
    """A process with this pid has said hello from the network namespace with this cookie."""

    cookie: int
    pid: int


def reply(connection: int, number: int, values: Json | None = None) -> Send:
    """Answer the request ``number``."""
    return Send(connection, Reply(number, values or {}))


def error(connection: int, number: int | None, reason: Reason, sentence: str) -> Send:
    """Refuse the request ``number``."""
    return Send(connection, Refusal(number, reason, sentence_of(sentence)))


def dismiss(connection: int, reason: Reason, sentence: str) -> list[Effect]:
    """Say why and hang up."""
    return [error(connection, None, reason, sentence), Close(connection, sentence)]


Effect = Send | SetGuard | DeleteGuard | FindHolders | Close | Granted | Greeted


@dataclass(slots=True)
class Counts:
    """Since the agent started."""

    granted: int = 0
    claimed: int = 0  # ends, not leases: each process claims its own
    adopted: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # connects, by Reason
    revoked: Counter[str] = field(default_factory=Counter)  # granted leases, by Cause


@dataclass(frozen=True, slots=True)
class EndView:
    """One end of a lease as ``rdmanet status`` shows it."""

    pod: str
    key: Key | None  # None until the listener has answered


@dataclass(frozen=True, slots=True)
class LeaseView:
    """One lease as ``rdmanet status`` shows it."""

    lease: str
    transport: Transport
    state: str  # "pending", "granted" or "unclaimed"
    connector: EndView  # of adopted leases only the two ends are known, not who connected
    listener: EndView
    service: str | None
    age_s: float
