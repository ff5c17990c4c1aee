"""The nouns of rdmanet (docs/design/first-way.md, "Words"), as plain values without I/O."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Leases that one pod may hold at a time, unless somebody says otherwise.
DEFAULT_MAX_LEASES = 256

#: What names look like without Kubernetes: pods live in this namespace unless CNI_ARGS says otherwise.
DEFAULT_NAMESPACE = "default"


def address_key(address: IPAddress | str) -> bytes:
    """The 16-byte address key: IPv6 as it is, IPv4 mapped (RFC 4291 2.5.5.2), as a RoCE GID is written."""
    if isinstance(address, str):
        address = ipaddress.ip_address(address)
    if isinstance(address, ipaddress.IPv4Address):
        return b"\x00" * 10 + b"\xff\xff" + address.packed
    return address.packed


def address_of(key: bytes) -> IPAddress:
    """The address that a 16-byte address key stands for."""
    address = ipaddress.IPv6Address(key)
    return address.ipv4_mapped or address


def is_prime(number: int) -> bool:
    """By trial division: for sizes of tables."""
    return number >= 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


#: The MAC of rdmanet0, rdmanet1 and every attachment's host end: pods' frames to their gateway are addressed to us.
GATEWAY_MAC = "02:72:00:00:00:00"


def pod_mac(attachment_id: int) -> str:
    """A locally administered MAC made from the attachment's id; 0 is the gateway's."""
    return "02:72:" + ":".join(f"{byte:02x}" for byte in (attachment_id & 0xFFFFFFFF).to_bytes(4, "big"))


class RdmaMode(enum.StrEnum):
    """The RDMA subsystem's network namespace mode (RDMA_NLDEV_SYS_ATTR_NETNS_MODE)."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Backend(enum.StrEnum):
    """Where pods' RDMA devices come from; later also virtual functions."""

    RXE = "rxe"
    SHARED = "shared"


class GuardMode(enum.StrEnum):
    """What happens to RoCE packets of queue pairs without a lease."""

    OBSERVE = "observe"
    ENFORCE = "enforce"


class GuardState(enum.StrEnum):
    """What a guard entry says about packets to its queue pair."""

    GRANTED = "granted"
    REVOKED = "revoked"
    DATAGRAM = "datagram"  # a leased UD queue pair: who may send to it has entries of its own


class Transport(enum.StrEnum):
    """The transport service of a queue pair (InfiniBand 3.2.2)."""

    RC = "rc"  # reliable connection: one peer
    UD = "ud"  # unreliable datagram: many peers, one lease with each


class AttachmentState(enum.StrEnum):
    """Where an attachment is in its life; committed before the effect it announces."""

    ADDING = "adding"
    READY = "ready"
    RELEASING = "releasing"


@dataclass(frozen=True, slots=True)
class PodName:
    """namespace/name, unique on the host among attachments that are not releasing."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Device:
    """An RDMA device that a pod can use, and how it got there."""

    name: str
    backend: Backend
    mode: RdmaMode
    index: int  # the kernel's device index, unique on the host
    uverbs: str  # the character device's name below /dev/infiniband
    major: int
    minor: int


class GuardEntry(NamedTuple):  # there are two per lease, and a frozen dataclass takes six times as long to make
    """What the guard map holds for one queue pair; its key is (address key of the queue pair's pod, QPN). In state
    DATAGRAM the lease and the peer are 0: DatagramEntry has them."""

    lease: int  # lease id, 63 bits, never 0
    peer_address: bytes  # address key of the only source that may send to it
    peer_qpn: int
    state: GuardState
    packets: int = 0  # counted by the datapath; writing an entry starts again from these
    bytes: int = 0
    connects: bool = False  # whether this is the end that connected: policy is asked from it to the other


class DatagramEntry(NamedTuple):
    """What the datagrams map holds for packets to one UD queue pair from another; its key is both ends, each (address
    key, QPN), first that of the receiver."""

    lease: int
    packets: int = 0  # as in GuardEntry
    bytes: int = 0
    connects: bool = False  # of the receiver, as in GuardEntry


@dataclass(frozen=True, slots=True)
class NetnsId:
    """What a network namespace is, whatever path leads to it: device and inode number of its nsfs file."""

    dev: int
    ino: int


@dataclass(frozen=True, slots=True)
class PodCgroup:
    """The cgroup whose processes a pod's limits hold for."""

    path: str  # in the cgroup2 hierarchy, from its root "/"
    id: int  # inode number: a later cgroup of that name is another one
    before: dict[str, str] = field(default_factory=dict)  # what its rdma.max said of the attachment's device


class Limit(NamedTuple):
    """How much of a pod's kernel traffic passes in one direction: so much on average, and at once no more than this."""

    bits_per_s: int
    burst_bytes: int  # of frames


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The limits of a pod's kernel traffic, as CNI's conventions call its directions. None: no limit."""

    ingress: Limit | None = None  # what the pod gets
    egress: Limit | None = None  # what it sends


UNLIMITED = Bandwidth()


@dataclass(frozen=True, slots=True)
class Attachment:
    """One (container id, interface name) that CNI added."""

    id: int  # row number; also the number in map values and the suffix of kernel object names
    container_id: str
    ifname: str
    network: str  # the network configuration's name
    netns: str  # path as the runtime gave it
    netns_id: NetnsId
    pod: PodName
    state: AttachmentState
    mac: str
    mtu_bytes: int
    ipv4: ipaddress.IPv4Address | None
    ipv6: ipaddress.IPv6Address | None
    wants_rdma: bool
    guard: GuardMode = GuardMode.OBSERVE
    device: Device | None = None
    max_leases: int = DEFAULT_MAX_LEASES
    traffic_class: int = 0  # of its RoCE packets, the two ECN bits 0
    service_level: int = 0
    pod_uid: str | None = None  # Kubernetes'
    cgroup: PodCgroup | None = None  # None: not known (yet)
    labels: Mapping[str, str] = field(default_factory=dict)  # args.cni.labels; those of a Pod object come before them
    bandwidth: Bandwidth = UNLIMITED
    slot: str | None = None  # the CDI device by which its container gets its RDMA device: rdmanet.io/rdma=slot-3
    result: dict[str, object] = field(default_factory=dict)  # the CNI result as 1.1.0, empty until ready

    @property
    def host_ifname(self) -> str:
        """The host's end of the veth pair."""
        return f"rn-{self.id}"

    @property
    def device_name(self) -> str:
        """The rxe device's name: unique on the host, as shared mode shows every name to everybody."""
        return f"rxe_rn{self.id}"

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """IPv4 before IPv6, those that exist."""
        return tuple(a for a in (self.ipv4, self.ipv6) if a is not None)
