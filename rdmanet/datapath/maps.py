"""The datapath as the agent uses it: entries in, counters out, programs swapped.

Synchronous, and safe to call from several threads: the kernel's maps are the only state that lasts.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType

from rdmanet.datapath import bpf, devices, layout, loader, near, tables
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.bandwidth import BandwidthMap
from rdmanet.datapath.flows import FlowMaps
from rdmanet.datapath.kept import Kept
from rdmanet.datapath.layout import (
    COUNTED,
    AttachmentEntry,
    Count,
    End,
    EndpointEntry,
    NodeEntry,
    UplinkEntry,
)
from rdmanet.datapath.pins import Pins
from rdmanet.datapath.policy import PolicyMaps
from rdmanet.datapath.ring import Events
from rdmanet.datapath.services import ServiceMaps
from rdmanet.datapath.slots import Slots
from rdmanet.errors import BpfError, ExhaustedError
from rdmanet.model import UNLIMITED, Bandwidth, DatagramEntry, GuardEntry

__all__ = ["AttachmentEntry", "Count", "Datapath", "EndpointEntry", "NodeEntry", "UplinkEntry"]

#: A newer version may have counted reasons that this one has no name for.
SPARE_DROP_REASONS = 16


class Datapath:
    """The pinned maps and programs. Deleting what is not there is no error; writing into a full map is one
    (ExhaustedError). Address keys are 16 bytes, as ``rdmanet.model.address_key`` makes them."""

    def __init__(self, pinned: loader.Pinned):
        self._pinned = pinned
        self._lock = threading.Lock()
        self._slots: Slots | None = None
        self._sizes: Mapping[str, int] = {}
        self._cookies: dict[int, int] = {}  # attachment id → its namespace's
        self._attached: dict[int, int] = {}  # index of the host's end → attachment id, once the slots are known

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        pins: Path,
        sizes: Mapping[str, int] = MappingProxyType({}),
        kept: Path | None = None,
    ) -> Datapath:
        """Loads and pins, or adopts what is pinned below ``pins``, a directory inside a bpffs.

        ``sizes``: maximum numbers of entries by map, where the artifact's are not wanted. ``kept``: a directory in
        which the running artifact and the one before it are kept (``rdmanet.datapath.kept``); without it what is pinned
        with another layout cannot be carried over. Raises UnavailableError when there is no bpffs or eBPF is refused,
        StateError when a pinned map cannot be carried over.
        """
        artifact = artifact.sized(sizes)
        tables.check(artifact)
        datapath = cls(loader.open_pins(artifact, pins, None if kept is None else Kept(kept)))
        datapath._sizes = sizes
        return datapath

    def __enter__(self) -> Datapath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the descriptors back; the datapath goes on working. Idempotent."""
        self._pinned.close()

    @staticmethod
    def remove(pins: Path) -> None:
        """Unpins everything below ``pins``; filters must be gone before. Idempotent."""
        loader.remove(pins)

    def dispatcher(self, hook: str) -> int:
        """The program descriptor for the tc filter of ``pod``, ``host`` or ``uplink``; it stays ours to close."""
        return self._pinned.dispatchers[hook]

    def dispatcher_id(self, hook: str) -> int:
        """The kernel's number of that program, as filters show it."""
        return bpf.program_info(self._pinned.dispatchers[hook]).id

    def swap(self, artifact: Artifact) -> None:
        """Replaces the programs behind all filters and on sockets without losing a packet; errors as ``open``, and
        BpfError where the verifier refuses a program. The old ones go on then."""
        artifact = artifact.sized(self._sizes)
        tables.check(artifact)
        with self._lock:  # copies beside hashes are filled anew: nobody may write both meanwhile
            loader.swap(self._pinned, artifact)

    def attach_sockets(self, cgroup: Path) -> None:
        """Lets sockets reach services, by the root of the cgroup2 hierarchy; see ``sockets.attach``. Idempotent."""
        loader.attach_sockets(self._pinned, cgroup)

    def running(self) -> dict[str, str]:
        """Hook → kernel name of the program that runs there: the hook and 8 digits of its artifact's hash."""
        return loader.running(self._pinned)

    @property
    def pins(self) -> Pins:
        """Whether everything is in its place still."""
        return Pins(self._pinned)

    @property
    def policy(self) -> PolicyMaps:
        """The maps that say who may talk to whom."""
        return PolicyMaps(self._pinned.maps)

    @property
    def events(self) -> Events:
        """Drops and new flows."""
        return Events(self._pinned.maps)

    @property
    def drop_reasons(self) -> tuple[str, ...]:
        """Names of all drop reasons of the programs that run; their numbers begin with 1."""
        return self._pinned.artifact.drop_reasons

    # What the agent writes

    def configure(self, node: NodeEntry) -> None:
        """Sets the node's options; before the first time everything is dropped as ``no_node``. The epoch stays as it
        is, where there is one."""
        with self._lock:
            before = self.node()
            self._update(
                "node", layout.U32.pack(0), replace(node, epoch=before.epoch if before else node.epoch).encode()
            )

    def change_node(self, change: Callable[[NodeEntry], NodeEntry]) -> None:
        """Changes some of the node's options, once they have been set."""
        with self._lock:
            before = self.node()
            if before is not None:
                self._update("node", layout.U32.pack(0), change(before).encode())

    def node(self) -> NodeEntry | None:
        """The node's options, or None before they were set."""
        raw = self._lookup("node", layout.U32.pack(0))
        entry = None if raw is None else NodeEntry.decode(raw)
        return entry if entry is not None and entry.host_ifindex else None

    def set_attachment(self, ifindex: int, entry: AttachmentEntry) -> None:
        """Lets the veth whose host's end is ``ifindex`` send as this attachment."""
        key = layout.U32.pack(ifindex)
        with self._lock:
            raw = entry.encode(self._slot(entry.attachment_id))
            self._set("attachments", key, raw)
            self._attached[ifindex] = entry.attachment_id

    def delete_attachment(self, ifindex: int) -> None:
        """From now on nothing that the veth sends passes."""
        with self._lock:
            near.leave(self._pinned.maps, "attachments", layout.U32.pack(ifindex))
            self._delete("attachments", layout.U32.pack(ifindex))
            self._attached.pop(ifindex, None)

    def attachments(self) -> dict[int, AttachmentEntry]:
        """By the index of the host's end."""
        return {_number(key): AttachmentEntry.decode(value) for key, value in self._items("attachments")}

    def attachment(self, ifindex: int) -> AttachmentEntry | None:
        """The one whose host's end has this index, or None."""
        raw = self._lookup("attachments", layout.U32.pack(ifindex))
        return None if raw is None else AttachmentEntry.decode(raw)

    def set_endpoint(self, address: bytes, entry: EndpointEntry) -> None:
        """Delivers packets to ``address`` there from now on."""
        key = layout.address(address)
        with self._lock:
            raw = entry.encode(self._slot(entry.attachment_id))
            self._set("endpoints", key, raw)

    def delete_endpoint(self, address: bytes) -> None:
        """From now on packets to ``address`` are dropped as ``no_endpoint``."""
        key = layout.address(address)
        with self._lock:
            near.leave(self._pinned.maps, "endpoints", key)
            self._delete("endpoints", key)

    def endpoints(self) -> dict[bytes, EndpointEntry]:
        """By address key."""
        return {key: EndpointEntry.decode(value) for key, value in self._items("endpoints")}

    def set_policy(self, attachment_id: int, addresses: Iterable[bytes], policy: tuple[int, int, int]) -> None:
        """Identity, ingress set and egress set of an attachment, in those entries of it that are there."""
        identity, ingress_set, egress_set = policy
        with self._lock:
            self._known_slots()
            for ifindex in [ifindex for ifindex, number in self._attached.items() if number == attachment_id]:
                own = self.attachment(ifindex)
                if own is not None and (own.identity, own.ingress_set, own.egress_set) != policy:
                    own = replace(own, identity=identity, ingress_set=ingress_set, egress_set=egress_set)
                    key = layout.U32.pack(ifindex)
                    self._set("attachments", key, own.encode(self._slot(attachment_id)))
            for key in addresses:
                there = self.endpoint(key)
                if there is None or there.attachment_id != attachment_id:
                    continue
                if (there.identity, there.ingress_set, there.egress_set) != policy:
                    there = replace(there, identity=identity, ingress_set=ingress_set, egress_set=egress_set)
                    self._set("endpoints", key, there.encode(self._slot(attachment_id)))

    def set_bandwidth(self, attachment_id: int, bandwidth: Bandwidth) -> None:
        """Limits the attachment's kernel traffic: before the entries that say that it is limited. Buckets of limits
        that are there already stay as they are."""
        with self._lock:
            BandwidthMap(self._pinned.maps).set(self._slot(attachment_id), bandwidth)

    def bandwidth(self, attachment_id: int) -> Bandwidth:
        """What of the attachment's limits the programs find."""
        with self._lock:
            slot = self._known_slots().find(attachment_id)
            return UNLIMITED if slot is None else BandwidthMap(self._pinned.maps).get(slot)

    def endpoint(self, address: bytes) -> EndpointEntry | None:
        """Where packets to this address key go, or None."""
        raw = self._lookup("endpoints", layout.address(address))
        return None if raw is None else EndpointEntry.decode(raw)

    def set_uplink(self, ifindex: int, entry: UplinkEntry) -> None:
        """Lets pods out through this device."""
        self._update("uplinks", layout.U32.pack(ifindex), entry.encode())

    def delete_uplink(self, ifindex: int) -> None:
        """From now on nothing goes out there, nor comes back."""
        self._delete("uplinks", layout.U32.pack(ifindex))

    def uplinks(self) -> dict[int, UplinkEntry]:
        """By index."""
        return {_number(key): UplinkEntry.decode(value) for key, value in self._items("uplinks")}

    def set_guard(self, address: bytes, qpn: int, entry: GuardEntry) -> None:
        """Says who may send to the queue pair ``qpn`` of ``address``; packets and bytes start from the entry's."""
        self._update("guard", layout.encode_guard_key(address, qpn), layout.encode_guard(entry))

    def set_guards(self, entries: Sequence[tuple[tuple[bytes, int], GuardEntry]]) -> None:
        """``set_guard`` of many in one call, by (address key, QPN). Raises as it does; what comes before the entry that
        failed has been written."""
        keys, values = layout.encode_guards(entries)
        with self._full("guard"):
            bpf.update_batch(self._pinned.maps["guard"], keys, values, len(entries))

    def delete_guard(self, address: bytes, qpn: int) -> None:
        """Forgets the queue pair: it is unleased from now on."""
        self._delete("guard", layout.encode_guard_key(address, qpn))

    def delete_guards(self, keys: Sequence[tuple[bytes, int]]) -> None:
        """``delete_guard`` of many in one call."""
        packed = b"".join([layout.encode_guard_key(*key) for key in keys])
        bpf.delete_batch(self._pinned.maps["guard"], packed, layout.GUARD_KEY.size)

    def guards(self) -> dict[tuple[bytes, int], GuardEntry]:
        """By (address key, QPN)."""
        found = {}
        for key, value in self._items("guard"):
            address, qpn = layout.GUARD_KEY.unpack(key)
            assert isinstance(address, bytes)
            found[address, int(qpn)] = layout.decode_guard(value)
        return found

    # Whose sockets see services

    def enter_namespace(self, cookie: int, attachment_id: int) -> None:
        """Sockets of the network namespace with this cookie (SO_NETNS_COOKIE) reach services from now on; where there
        is no backend, that is counted with one of the namespace's attachments, 0 in the host's."""
        with self._lock:
            self._cookies[attachment_id] = cookie
            self._update("namespaces", layout.U64.pack(cookie), layout.U32.pack(attachment_id))

    def leave_namespace(self, attachment_id: int) -> None:
        """The attachment is in its namespace no more; with the last one its sockets are not touched any longer, and
        connections go on."""
        with self._lock:
            cookie = self._cookies.pop(attachment_id, None)
            if cookie is None:  # of an earlier agent
                cookies = [known for known, number in self.namespaces().items() if number == attachment_id]
            else:
                cookies = [cookie]
            for left in cookies:
                other = next((number for number, known in self._cookies.items() if known == left), None)
                if other is None:
                    self._delete("namespaces", layout.U64.pack(left))
                else:
                    self._update("namespaces", layout.U64.pack(left), layout.U32.pack(other))

    def forget_namespaces(self) -> None:
        """Takes out those that nobody has entered since this was opened: what an earlier agent left."""
        with self._lock:
            for cookie in self.namespaces().keys() - set(self._cookies.values()):
                self._delete("namespaces", layout.U64.pack(cookie))

    def namespaces(self) -> dict[int, int]:
        """Attachment ids (the host's: 0) by cookie."""
        return {_number(key): _number(value) for key, value in self._items("namespaces")}

    # Which RDMA devices cgroups may open

    def set_rdma_majors(self, majors: Collection[int]) -> None:
        """The majors of RDMA character devices, of which cgroups may open their own alone."""
        for raw in self._keys("rdma_majors"):
            if _number(raw) not in majors:
                self._delete("rdma_majors", raw)
        for major in majors:
            self._update("rdma_majors", layout.U32.pack(major), layout.U32.pack(1))

    def restrict_devices(self, cgroup: Path, numbers: Collection[devices.Number]) -> None:
        """Lets a cgroup open no other RDMA devices than these; see ``devices.restrict``. One call at a time for each
        cgroup."""
        devices.restrict(self._pinned, cgroup, numbers)

    @staticmethod
    def release_devices(cgroup: Path) -> None:
        """Takes that back. Idempotent."""
        devices.release(cgroup)

    def set_datagrams(self, entries: Sequence[tuple[tuple[End, End], DatagramEntry]]) -> None:
        """Lets UD queue pairs send to others, by the receiver's and the sender's end. The receivers' guard entries must
        say DATAGRAM, else nothing looks here. Raises as ``set_guards``."""
        keys = b"".join([layout.encode_datagram_key(key) for key, _ in entries])
        values = b"".join([layout.encode_datagram(entry) for _, entry in entries])
        with self._full("datagrams"):
            bpf.update_batch(self._pinned.maps["datagrams"], keys, values, len(entries))

    def delete_datagrams(self, keys: Sequence[tuple[End, End]]) -> None:
        """From now on what these send to those is dropped as ``roce_not_peer``."""
        packed = b"".join([layout.encode_datagram_key(key) for key in keys])
        bpf.delete_batch(self._pinned.maps["datagrams"], packed, layout.DATAGRAM_KEY.size)

    def datagrams(self) -> dict[tuple[End, End], DatagramEntry]:
        """By the receiver's and the sender's end."""
        items = self._items("datagrams")
        return {layout.decode_datagram_key(key): layout.decode_datagram(value) for key, value in items}

    def services(self) -> ServiceMaps:
        """The maps of services."""
        return ServiceMaps(self._pinned)

    @property
    def flows(self) -> FlowMaps:
        """The table of tracked flows, and each pod's share of it."""
        return FlowMaps(self._pinned)

    # What the programs counted

    def counters(self) -> dict[tuple[int, str, str], Count]:
        """By (attachment id, ``from_pod`` or ``to_pod``, ``ip`` or ``roce``), summed over the CPUs."""
        found = {}
        for _, raw in self._items("attachments"):
            attachment, slot = layout.attachment_slot(raw)
            values = self._lookup("counters", layout.U32.pack(slot))
            assert values is not None, "an array has all its elements"
            counts = [layout.COUNTER.unpack(value) for value in _per_cpu(values, layout.COUNTER.size)]
            sums = [sum(int(count[place]) for count in counts) for place in range(2 * len(COUNTED))]
            for (direction, kind), packets, size in zip(COUNTED, sums, sums[len(COUNTED) :], strict=False):
                if packets:
                    found[attachment, direction, kind] = Count(packets, size)
        return found

    def drops(self) -> dict[tuple[int, str], int]:
        """Packets by (attachment id, or 0 where it is not known; drop reason), summed over the CPUs."""
        found: dict[tuple[int, str], int] = {}
        for (attachment, _, reason), packets in self.drops_by_direction().items():
            found[attachment, reason] = found.get((attachment, reason), 0) + packets
        return found

    def drops_by_direction(self) -> dict[tuple[int, str, str], int]:
        """The same by (attachment id, ``from_pod`` or ``to_pod``, drop reason)."""
        found = {}
        for key, values in self._items("drops"):
            attachment, number, direction = (int(field) for field in layout.DROP_KEY.unpack(key))
            place = attachment, layout.DIRECTIONS[direction], self.drop_reason(number)
            found[place] = sum(_number(value) for value in _per_cpu(values, layout.U64.size))
        return found

    def drop_reason(self, number: int) -> str:
        """The name of a drop reason; a newer version may have left one that this one has no name for."""
        reasons = self._pinned.artifact.drop_reasons
        return reasons[number - 1] if 0 < number <= len(reasons) else f"reason_{number}"

    def forget(self, attachment_id: int) -> None:
        """Removes the counters and drops of an attachment; its slot, if it has gone, is free for others."""
        with self._lock:
            slots = self._known_slots()
            slot = slots.find(attachment_id)
            if slot is not None:
                self._clear(slot)
            if attachment_id not in self._attached.values():
                slots.give_back(attachment_id)
        # By every key that there can be: the map holds the drops of all attachments.
        for reason in range(1, len(self._pinned.artifact.drop_reasons) + 1 + SPARE_DROP_REASONS):
            for direction in range(len(layout.DIRECTIONS)):
                self._delete("drops", layout.DROP_KEY.pack(attachment_id, reason, direction))

    # Slots of counters, and the places that are reached without hashing

    def _known_slots(self) -> Slots:
        if self._slots is None:
            taken = dict(layout.endpoint_slot(raw) for _, raw in self._items("endpoints"))
            for key, raw in self._items("attachments"):
                attachment, slot = layout.attachment_slot(raw)
                taken[attachment] = slot
                self._attached[_number(key)] = attachment
            self._slots = Slots(layout.COUNTER_SLOTS, taken)
        return self._slots

    def _slot(self, attachment_id: int) -> int:
        slot, new = self._known_slots().of(attachment_id)
        if new:
            self._clear(slot)
            BandwidthMap(self._pinned.maps).set(slot, UNLIMITED)
        return slot

    def _clear(self, slot: int) -> None:
        for name in ("counters", "flows_begun", "flow_counts"):
            definition = self._pinned.artifact.maps[name]
            zeros = bytes(bpf.buffer_bytes(definition.type, definition.value_size))
            self._update(name, layout.U32.pack(slot), zeros)

    def _set(self, name: str, key: bytes, raw: bytes) -> None:
        """Writes into the hash, and into the near place if that is nobody else's."""
        free = near.leave(self._pinned.maps, name, key)
        self._update(name, key, raw)
        if free:
            near.enter(self._pinned.maps, name, key, raw)

    # One map

    def _update(self, name: str, key: bytes, value: bytes) -> None:
        with self._full(name):
            bpf.update(self._pinned.maps[name], key, value)

    @contextlib.contextmanager
    def _full(self, name: str) -> Iterator[None]:
        """Turns the kernel's answer that a map is full into ExhaustedError."""
        try:
            yield
        except BpfError as error:
            if error.errno in (errno.E2BIG, errno.ENOMEM):
                bound = self._pinned.artifact.maps[name].max_entries
                raise ExhaustedError(
                    f"The datapath's map {name} is full: it holds at most {bound} entries.",
                    operation=error.operation,
                    subject=name,
                    errno=error.errno,
                ) from error
            raise

    def _delete(self, name: str, key: bytes) -> None:
        bpf.delete(self._pinned.maps[name], key)

    def _lookup(self, name: str, key: bytes) -> bytes | None:
        definition = self._pinned.artifact.maps[name]
        return bpf.lookup(self._pinned.maps[name], key, bpf.buffer_bytes(definition.type, definition.value_size))

    def _keys(self, name: str) -> list[bytes]:
        definition = self._pinned.artifact.maps[name]
        return list(dict.fromkeys(bpf.keys(self._pinned.maps[name], definition.key_size, definition.max_entries)))

    def _items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        for key in self._keys(name):
            value = self._lookup(name, key)
            # Gone since the keys were read.
            if value is not None:
                yield key, value


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, sys.byteorder)


def _per_cpu(values: bytes, size: int) -> Iterator[bytes]:
    """Each CPU's value; the kernel pads them to 8 bytes."""
    step = (size + 7) // 8 * 8
    for offset in range(0, len(values), step):
        yield values[offset : offset + size]
