"""Wire formats of the maps: Python tables beside the C structs of bpf/, and the values they hold.

Opening an artifact compares every table with the offsets and sizes that the C compiler gave. Numbers are in the host's
byte order unless a field's comment says otherwise; addresses are address keys (16 bytes,
``rdmanet.model.address_key``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rdmanet.errors import InputError, StateError
from rdmanet.model import DatagramEntry, GuardEntry, GuardState

End = tuple[bytes, int]  # of a lease: address key, QPN

ADDRESS_BYTES = 16
NO_ADDRESS = bytes(ADDRESS_BYTES)
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2
MAC_BYTES = 6

HAS_DEVICE = 1  # bpf/endpoint.h
ENFORCE = 2
LIMITED = 4

DIRECTIONS = ("from_pod", "to_pod")  # enum direction in bpf/counters.h
KINDS = ("ip", "roce")
COUNTED = tuple((direction, kind) for direction in DIRECTIONS for kind in KINDS)
NEAR_PLACES = 4096  # bpf/endpoint.h
COUNTER_SLOTS = 4096  # bpf/counters.h
#: Leases have 63 bits, and the last one of their entries says whether this is the end that connected. The programs do
#: not look at it.
CONNECTS_SHIFT = 63
LEASE_MASK = (1 << CONNECTS_SHIFT) - 1
#: enum guard_state in bpf/guard.h.
_GUARD_STATES = {GuardState.GRANTED: 1, GuardState.REVOKED: 2, GuardState.DATAGRAM: 3}
_GUARD_STATE_NAMES = {number: state for state, number in _GUARD_STATES.items()}


class StructTable:
    """A C struct: field names with their struct(3) codes, in order, padding written out."""

    def __init__(self, name: str, *fields: tuple[str, str]):
        self.name = name
        self.fields = fields
        self._struct = struct.Struct("=" + "".join(code for _, code in fields))

    @property
    def size(self) -> int:
        """Bytes."""
        return self._struct.size

    def places(self) -> dict[str, tuple[int, int]]:
        """Field → (offset, size) in bytes; padding (code ``x``) left out."""
        found, offset = {}, 0
        for name, code in self.fields:
            size = struct.calcsize("=" + code)
            if not code.endswith("x"):
                found[name] = (offset, size)
            offset += size
        return found

    def pack(self, *values: int | bytes) -> bytes:
        """The fields' values, in order, as the struct's bytes."""
        return self._struct.pack(*values)

    def unpack(self, raw: bytes) -> tuple[int | bytes, ...]:
        """The struct's bytes as the fields' values, in order."""
        return self._struct.unpack(raw)


U32 = StructTable("__u32", ("value", "I"))
U64 = StructTable("__u64", ("value", "Q"))
ADDRESS_KEY = StructTable("address_key", ("word", "16s"))
NODE = StructTable(
    "node_entry",
    ("gateway_mac", "6s"),
    ("masquerade", "H"),
    ("host_ifindex", "I"),
    ("first_port", "H"),
    ("last_port", "H"),
    ("epoch", "I"),
    ("maglev_size", "I"),
    ("max_flows_per_pod", "I"),
    ("monitor", "I"),
)
ATTACHMENT = StructTable(
    "attachment_entry",
    ("id", "I"),
    ("flags", "H"),
    ("traffic_class", "B"),
    ("pad_class", "x"),
    ("ipv4", "16s"),
    ("ipv6", "16s"),
    ("mac", "6s"),
    ("pad", "2x"),
    ("slot", "I"),
    ("identity", "I"),
    ("ingress_set", "I"),
    ("egress_set", "I"),
)
ENDPOINT = StructTable(
    "endpoint_entry",
    ("ifindex", "I"),
    ("attachment", "I"),
    ("flags", "I"),
    ("mac", "6s"),
    ("pad", "2x"),
    ("slot", "I"),
    ("identity", "I"),
    ("ingress_set", "I"),
    ("egress_set", "I"),
)
NEAR_ATTACHMENT = StructTable("near_attachment", ("ifindex", "I"), ("entry", f"{ATTACHMENT.size}s"))
NEAR_ENDPOINT = StructTable("near_endpoint", ("address", "16s"), ("entry", f"{ENDPOINT.size}s"))
UPLINK = StructTable("uplink_entry", ("ipv4", "16s"), ("ipv6", "16s"))
GUARD_KEY = StructTable("guard_key", ("address", "16s"), ("qpn", "I"))
GUARD = StructTable(
    "guard_entry",
    ("lease", "Q"),
    ("packets", "Q"),
    ("bytes", "Q"),
    ("peer_address", "16s"),
    ("peer_qpn", "I"),
    ("state", "I"),
)
DATAGRAM_KEY = StructTable(
    "datagram_key",
    ("destination", "16s"),
    ("qpn", "I"),
    ("source", "16s"),
    ("source_qpn", "I"),
)
DATAGRAM = StructTable("datagram_entry", ("lease", "Q"), ("packets", "Q"), ("bytes", "Q"))
COUNTER = StructTable("counter_entry", ("packets", "4Q"), ("bytes", "4Q"))  # of COUNTED, in this order
DROP_KEY = StructTable("drop_key", ("attachment", "I"), ("reason", "H"), ("direction", "H"))
DEVICE_NUMBER = StructTable("device_number", ("major", "I"), ("minor", "I"))

#: Key and value of the maps described here; ``tables.MAPS`` has all.
MAPS: Mapping[str, tuple[StructTable, StructTable]] = {
    "node": (U32, NODE),
    "attachments": (U32, ATTACHMENT),
    "endpoints": (ADDRESS_KEY, ENDPOINT),
    "near_attachment": (U32, NEAR_ATTACHMENT),
    "near_endpoint": (U32, NEAR_ENDPOINT),
    "uplinks": (U32, UPLINK),
    "guard": (GUARD_KEY, GUARD),
    "datagrams": (DATAGRAM_KEY, DATAGRAM),
    "counters": (U32, COUNTER),
    "drops": (DROP_KEY, U64),
    "programs": (U32, U32),
    "rdma_majors": (U32, U32),
    "pod_devices": (DEVICE_NUMBER, U32),
}


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """Options of the node. Ports are the outside ports for masquerading, both included."""

    gateway_mac: bytes  # of rdmanet0, rdmanet1 and the host's end of every veth pair
    host_ifindex: int  # rdmanet0
    masquerade: bool = True
    first_port: int = 61000
    last_port: int = 65535
    epoch: int = 0  # of the policy
    maglev_size: int = 0
    max_flows_per_pod: int = 0
    monitor: bool = False  # whether somebody reads events

    def encode(self) -> bytes:
        """struct node_entry."""
        if not 0 < self.first_port <= self.last_port <= 65535:
            raise InputError(f"The masquerading ports {self.first_port}-{self.last_port} are no range of ports.")
        return NODE.pack(
            _mac(self.gateway_mac),
            int(self.masquerade),
            self.host_ifindex,
            self.first_port,
            self.last_port,
            self.epoch,
            self.maglev_size,
            self.max_flows_per_pod,
            int(self.monitor),
        )

    @classmethod
    def decode(cls, raw: bytes) -> NodeEntry:
        """From struct node_entry."""
        mac, masquerade, ifindex, first, last, epoch, maglev, flows, monitor = NODE.unpack(raw)
        return cls(
            gateway_mac=_raw(mac),
            host_ifindex=int(ifindex),
            masquerade=bool(masquerade),
            first_port=int(first),
            last_port=int(last),
            epoch=int(epoch),
            maglev_size=int(maglev),
            max_flows_per_pod=int(flows),
            monitor=bool(monitor),
        )


@dataclass(frozen=True, slots=True)
class AttachmentEntry:
    """Who may send from a veth; the map's key is the index of its host's end."""

    attachment_id: int
    mac: bytes
    ipv4: bytes = NO_ADDRESS  # address keys
    ipv6: bytes = NO_ADDRESS
    device: bool = False
    enforce: bool = False
    traffic_class: int = 0  # of its RoCE packets, the two ECN bits 0
    identity: int = 0
    ingress_set: int = 0  # of the policies that select its pod; 0: none does
    egress_set: int = 0
    limited: bool = False  # what it sends

    def encode(self, slot: int) -> bytes:
        """struct attachment_entry; ``slot`` is its counters'."""
        flags = _flags(self.device, self.enforce, self.limited)
        ipv4, ipv6, mac = address(self.ipv4), address(self.ipv6), _mac(self.mac)
        policy = (self.identity, self.ingress_set, self.egress_set)
        return ATTACHMENT.pack(self.attachment_id, flags, self.traffic_class, ipv4, ipv6, mac, slot, *policy)

    @classmethod
    def decode(cls, raw: bytes) -> AttachmentEntry:
        """From struct attachment_entry."""
        id_, flags, traffic_class, ipv4, ipv6, mac, _, *policy = ATTACHMENT.unpack(raw)
        return cls(
            attachment_id=int(id_),
            mac=_raw(mac),
            ipv4=_raw(ipv4),
            ipv6=_raw(ipv6),
            device=bool(int(flags) & HAS_DEVICE),
            enforce=bool(int(flags) & ENFORCE),
            traffic_class=int(traffic_class),
            identity=int(policy[0]),
            ingress_set=int(policy[1]),
            egress_set=int(policy[2]),
            limited=bool(int(flags) & LIMITED),
        )


@dataclass(frozen=True, slots=True)
class EndpointEntry:
    """Where an address is; the map's key is the address key."""

    ifindex: int  # the host's end of the veth pair
    mac: bytes  # the pod's end
    attachment_id: int
    device: bool = False
    enforce: bool = False
    identity: int = 0
    ingress_set: int = 0
    egress_set: int = 0
    limited: bool = False  # what goes there

    def encode(self, slot: int) -> bytes:
        """struct endpoint_entry; ``slot`` is its attachment's counters'."""
        flags = _flags(self.device, self.enforce, self.limited)
        policy = (self.identity, self.ingress_set, self.egress_set)
        return ENDPOINT.pack(self.ifindex, self.attachment_id, flags, _mac(self.mac), slot, *policy)

    @classmethod
    def decode(cls, raw: bytes) -> EndpointEntry:
        """From struct endpoint_entry."""
        ifindex, attachment, flags, mac, _, *policy = ENDPOINT.unpack(raw)
        return cls(
            ifindex=int(ifindex),
            mac=_raw(mac),
            attachment_id=int(attachment),
            device=bool(int(flags) & HAS_DEVICE),
            enforce=bool(int(flags) & ENFORCE),
            identity=int(policy[0]),
            ingress_set=int(policy[1]),
            egress_set=int(policy[2]),
            limited=bool(int(flags) & LIMITED),
        )


def attachment_slot(raw: bytes) -> tuple[int, int]:
    """(attachment id, slot) of a struct attachment_entry."""
    fields = ATTACHMENT.unpack(raw)
    return int(fields[0]), int(fields[6])


def endpoint_slot(raw: bytes) -> tuple[int, int]:
    """(attachment id, slot) of a struct endpoint_entry."""
    fields = ENDPOINT.unpack(raw)
    return int(fields[1]), int(fields[4])


def near_endpoint_place(key: bytes) -> int:
    """Where near_endpoint may have the address (near_endpoint_lookup() in bpf/endpoint.h)."""
    place = int.from_bytes(key[-4:], "big") % NEAR_PLACES
    return place if key[:12] == _MAPPED else NEAR_PLACES + place


@dataclass(frozen=True, slots=True)
class UplinkEntry:
    """Address keys to masquerade behind; zero where the uplink has none of that family."""

    ipv4: bytes = NO_ADDRESS
    ipv6: bytes = NO_ADDRESS

    def encode(self) -> bytes:
        """struct uplink_entry."""
        return UPLINK.pack(address(self.ipv4), address(self.ipv6))

    @classmethod
    def decode(cls, raw: bytes) -> UplinkEntry:
        """From struct uplink_entry."""
        ipv4, ipv6 = UPLINK.unpack(raw)
        return cls(_raw(ipv4), _raw(ipv6))


@dataclass(frozen=True, slots=True)
class Count:
    """Packets (a GSO frame as its segments) and bytes of frames."""

    packets: int
    bytes: int


def encode_guard(entry: GuardEntry) -> bytes:
    """A guard entry as the map holds it."""
    return GUARD.pack(
        entry.lease | entry.connects << CONNECTS_SHIFT,
        entry.packets,
        entry.bytes,
        address(entry.peer_address),
        entry.peer_qpn,
        _GUARD_STATES[entry.state],
    )


def decode_guard(raw: bytes) -> GuardEntry:
    """A guard entry from the map. Raises StateError for a state this version does not know."""
    lease, packets, size, peer, qpn, state = GUARD.unpack(raw)
    name = _GUARD_STATE_NAMES.get(int(state))
    if name is None:
        raise StateError(f"The guard map holds state {int(state)!r}, which this version does not know.")
    return GuardEntry(
        lease=int(lease) & LEASE_MASK,
        peer_address=_raw(peer),
        peer_qpn=int(qpn),
        state=name,
        packets=int(packets),
        bytes=int(size),
        connects=bool(int(lease) >> CONNECTS_SHIFT),
    )


def encode_guard_key(key: bytes, qpn: int) -> bytes:
    """The key of a queue pair's guard entry. Raises InputError for a QPN beyond 24 bits."""
    if not 0 <= qpn <= 0xFFFFFF:
        raise InputError(f"{qpn} is no queue pair number: those have 24 bits.")
    return GUARD_KEY.pack(address(key), qpn)


def encode_guards(entries: Sequence[tuple[tuple[bytes, int], GuardEntry]]) -> tuple[bytes, bytes]:
    """Many keys and their entries, one behind another. Raises InputError as ``encode_guard_key`` does."""
    keys, values = bytearray(), bytearray()
    granted, number = GuardState.GRANTED, _GUARD_STATES[GuardState.GRANTED]
    for (own, qpn), (lease, peer, peer_qpn, state, packets, size, connects) in entries:
        if not 0 <= qpn <= 0xFFFFFF or len(own) != ADDRESS_BYTES or len(peer) != ADDRESS_BYTES:
            raise InputError(f"{qpn} and {own.hex()} are no key of the guard map, or {peer.hex()} is none.")
        keys += GUARD_KEY.pack(own, qpn)
        kind = number if state is granted else _GUARD_STATES[state]
        values += GUARD.pack(lease | connects << CONNECTS_SHIFT, packets, size, peer, peer_qpn, kind)
    return bytes(keys), bytes(values)


def encode_datagram_key(key: tuple[End, End]) -> bytes:
    """The key of what one UD queue pair sends to another. Raises InputError for a QPN beyond 24 bits."""
    (own, qpn), (peer, peer_qpn) = key
    if not 0 <= qpn <= 0xFFFFFF or not 0 <= peer_qpn <= 0xFFFFFF:
        raise InputError(f"{qpn} or {peer_qpn} is no queue pair number: those have 24 bits.")
    return DATAGRAM_KEY.pack(address(own), qpn, address(peer), peer_qpn)


def decode_datagram_key(raw: bytes) -> tuple[End, End]:
    """Who may send to whom: the receiver's end, then the sender's."""
    own, qpn, peer, peer_qpn = DATAGRAM_KEY.unpack(raw)
    return (_raw(own), int(qpn)), (_raw(peer), int(peer_qpn))


def encode_datagram(entry: DatagramEntry) -> bytes:
    """An entry of the datagrams map."""
    return DATAGRAM.pack(entry.lease | entry.connects << CONNECTS_SHIFT, entry.packets, entry.bytes)


def decode_datagram(raw: bytes) -> DatagramEntry:
    """From struct datagram_entry."""
    lease, packets, size = map(int, DATAGRAM.unpack(raw))
    return DatagramEntry(lease & LEASE_MASK, packets, size, bool(lease >> CONNECTS_SHIFT))


def address(key: bytes) -> bytes:
    """The key, if it has the length of one. Raises InputError otherwise."""
    if len(key) != ADDRESS_BYTES:
        raise InputError(f"An address key has {ADDRESS_BYTES} bytes, not {len(key)}.")
    return key


def _mac(raw: bytes) -> bytes:
    if len(raw) != MAC_BYTES:
        raise InputError(f"A MAC address has {MAC_BYTES} bytes, not {len(raw)}.")
    return raw


def _flags(device: bool, enforce: bool, limited: bool) -> int:
    return (HAS_DEVICE if device else 0) | (ENFORCE if enforce else 0) | (LIMITED if limited else 0)


def _raw(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value
