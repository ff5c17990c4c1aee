"""Policy at work: brings the datapath's maps to what pods, labels and policies say, and answers for leases.

Everything is worked out in memory first (``rulebook``); only what differs from what has been written is written then.
Nobody who is allowed before and after a change is refused in between: what is new is written first, and what is stale
goes when nothing leads to it any more. The epoch comes after what still could allow a flow has gone: flows that are
judged from then on are judged by what is true.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from rdmanet.datapath.layout import AttachmentEntry, NodeEntry
from rdmanet.datapath.policy import PolicyEntry, PrefixKey
from rdmanet.errors import ExhaustedError
from rdmanet.model import Attachment, IPAddress, PodName, address_key, address_of
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import Kind, Namespace, NetworkPolicy, Object, ObjectKey, Pod
from rdmanet.policy import verdict
from rdmanet.policy.prefixes import Prefix
from rdmanet.policy.rulebook import Rulebook
from rdmanet.policy.values import PEER_IS_PREFIX, Direction, Entry, Member, Numbers, PodPolicy

#: The API server labels every namespace with its name (core/v1, LabelMetadataName).
NAME_LABEL = "kubernetes.io/metadata.name"
_KINDS = (Kind.NAMESPACE, Kind.POD, Kind.NETWORK_POLICY)
#: Epochs are 32 bits.
_EPOCHS = 1 << 32


class PolicyMaps(Protocol):
    """``rdmanet.datapath.policy.PolicyMaps``."""

    @property
    def max_entries(self) -> int: ...
    @property
    def max_prefixes(self) -> int: ...
    def entries(self) -> list[PolicyEntry]: ...
    def allow(self, entries: Collection[PolicyEntry]) -> None: ...
    def forbid(self, entries: Collection[PolicyEntry]) -> None: ...
    def prefixes(self) -> dict[PrefixKey, int]: ...
    def set_prefixes(self, classes: Mapping[PrefixKey, int]) -> None: ...
    def delete_prefixes(self, prefixes: Iterable[PrefixKey]) -> None: ...


class PolicyDatapath(Protocol):
    """What of ``rdmanet.datapath.maps.Datapath`` policy uses."""

    @property
    def policy(self) -> PolicyMaps: ...
    def attachments(self) -> dict[int, AttachmentEntry]: ...
    def set_policy(self, attachment_id: int, addresses: Iterable[bytes], policy: tuple[int, int, int]) -> None: ...
    def change_node(self, change: Callable[[NodeEntry], NodeEntry]) -> None: ...


class Policy:
    """All pods' policy. Calls may come from several threads; one change is made at a time, and ``permits`` waits for
    none of them."""

    def __init__(self, datapath: PolicyDatapath, changed: Callable[[], None] = lambda: None):
        """``changed`` is called after every change that may have taken something away, in the thread that made it."""
        self._datapath = datapath
        self._maps = datapath.policy
        self._changed = changed
        self._lock = threading.Lock()
        self._book = Rulebook()
        self._pods: dict[PodName, Pod] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._attachments: dict[int, Attachment] = {}
        self._of_pod: dict[PodName, set[int]] = {}
        self._of_namespace: dict[str, set[int]] = {}
        # What the maps hold: what failed to be written is tried again with the next change.
        self._entries: set[Entry] = set()
        self._classes: dict[Prefix, int] = {}
        self._written: dict[int, PodPolicy] = {}
        self._by_address: dict[bytes, int] = {}
        self._epoch_due = False
        self._prepared: tuple[Changes, Changes] | None = None  # looked at, and what takes it back

    # A start

    def recover(self, attachments: Iterable[Attachment], objects: Mapping[ObjectKey, Object]) -> None:
        """Before anything else: what an earlier agent left, the attachments that are ready, and all objects. Numbers
        that are in use go on meaning what they meant, so that nobody who is allowed is refused meanwhile.

        Raises ExhaustedError where the maps are too small, KernelError where the kernel refuses.
        """
        with self._lock:
            entries = self._maps.entries()
            self._entries = set(entries)
            self._classes = {_prefix(*key): number for key, number in self._maps.prefixes().items()}
            found = {
                one.attachment_id: PodPolicy(one.identity, one.ingress_set, one.egress_set)
                for one in self._datapath.attachments().values()
            }
            peers = [peer for _, peer, *_ in entries if not peer & PEER_IS_PREFIX]
            classes = [peer & ~PEER_IS_PREFIX for _, peer, *_ in entries if peer & PEER_IS_PREFIX]
            self._book = Rulebook(
                Numbers(
                    members=found,
                    classes=self._classes,
                    highest_identity=max([*peers, *(one.identity for one in found.values())], default=0),
                    highest_set=max(
                        [number for number, *_ in entries]
                        + [max(one.ingress_set, one.egress_set) for one in found.values()],
                        default=0,
                    ),
                    highest_class=max([*classes, *self._classes.values()], default=0),
                )
            )
            self._enter(Changes(objects, {}, objects))
            for attachment in attachments:
                self._know(attachment)
            self._book.settle()
            # Everything is compared once with what is there.
            self._book.touched |= self._entries
            self._book.prefixes.touched |= self._classes.keys()
            self._book.moved |= self._attachments.keys()
            self._refuse_too_much()
            self._epoch_due = True
            self._write()

    # Pods come and go

    def join(self, attachment: Attachment, write: Callable[[PodPolicy], None] = lambda policy: None) -> PodPolicy:
        """Makes the attachment's identity and what rules about it need; ``write`` then writes its entries, before
        anything changes again. Idempotent. Raises ExhaustedError where the maps are full: nothing has changed then."""
        with self._lock:
            self._take_back()
            self._know(attachment)
            self._book.settle()
            try:
                self._refuse_too_much()
                self._write()
            except ExhaustedError:
                self._forget(attachment.id)
                self._book.settle()
                self._write()
                raise
            found = self._book.pod_policy(attachment.id)
            write(found)
            return found

    def of(self, attachment_id: int) -> PodPolicy:
        """What has been written of an attachment that has joined; zeros where it has not."""
        return self._written.get(attachment_id, PodPolicy(0, 0, 0))

    def leave(self, attachment_id: int) -> None:
        """The attachment's entries are gone. Idempotent."""
        with self._lock:
            self._take_back()
            self._forget(attachment_id)
            self._book.settle()
            self._write()

    def _know(self, attachment: Attachment) -> None:
        self._attachments[attachment.id] = attachment
        self._of_pod.setdefault(attachment.pod, set()).add(attachment.id)
        self._of_namespace.setdefault(attachment.pod.namespace, set()).add(attachment.id)
        self._book.set_member(attachment.id, self._member(attachment))
        for address in attachment.addresses:
            self._by_address[address_key(address)] = attachment.id

    def _forget(self, number: int) -> None:
        attachment = self._attachments.pop(number, None)
        if attachment is None:
            return
        # Names of pods that have gone leave nothing behind, and there are few namespaces.
        same = self._of_pod[attachment.pod]
        same.discard(number)
        if not same:
            del self._of_pod[attachment.pod]
        self._of_namespace[attachment.pod.namespace].discard(number)
        for address in attachment.addresses:
            if self._by_address.get(address_key(address)) == number:
                del self._by_address[address_key(address)]
        self._book.remove_member(number)

    def _member(self, attachment: Attachment) -> Member:
        namespace, pod = self._namespaces.get(attachment.pod.namespace), self._pods.get(attachment.pod)
        labels = namespace.labels if namespace else {}
        return Member(
            attachment.pod,
            attachment.addresses,
            pod.labels if pod else attachment.labels,
            {**labels, NAME_LABEL: attachment.pod.namespace},
            frozenset(pod.ports) if pod else frozenset(),
        )

    # Objects change

    def check(self, changes: Changes) -> None:
        """See ``rdmanet.objects.changes.Watcher``. What it worked out is kept for ``objects_changed``."""
        changes = _of_interest(changes)
        with self._lock:
            self._take_back()
            if not changes:
                return
            before = self._enter(changes)
            self._book.settle()
            self._prepared = (changes, before)
            try:
                self._refuse_too_much()
            except ExhaustedError:
                self._take_back()
                raise

    def objects_changed(self, changes: Changes) -> None:
        """See ``rdmanet.objects.changes.Watcher``."""
        changes = _of_interest(changes)
        if not changes:
            return
        with self._lock:
            if self._prepared is None or self._prepared[0] != changes:
                self._take_back()
                self._enter(changes)
                self._book.settle()
            self._prepared = None
            self._epoch_due = self._epoch_due or self._book.differs()
            self._write()
        self._changed()

    def _take_back(self) -> None:
        """What was looked at and not carried out, as another watcher has refused it."""
        if self._prepared is not None:
            (_, before), self._prepared = self._prepared, None
            self._enter(before)
            self._book.settle()

    def _enter(self, changes: Changes) -> Changes:
        """Into memory; returns what takes it back."""
        changed: dict[ObjectKey, Object] = {}
        removed: dict[ObjectKey, Object] = {}
        members: set[int] = set()
        for key, value, there in (
            *((key, value, True) for key, value in changes.changed.items()),
            *((key, value, False) for key, value in changes.removed.items()),
        ):
            before: Object | None
            if isinstance(value, NetworkPolicy):
                before = self._book.policy(key)
                if there:
                    self._book.set_policy(key, value)
                else:
                    self._book.remove_policy(key)
            elif isinstance(value, Pod):
                before = self._pods.pop(value.name, None)
                if there:
                    self._pods[value.name] = value
                members |= self._of_pod.get(value.name, set())
            elif isinstance(value, Namespace):
                before = self._namespaces.pop(value.name, None)
                if there:
                    self._namespaces[value.name] = value
                members |= self._of_namespace.get(value.name, set())
            else:
                continue
            if before is not None:
                changed[key] = before
            else:
                removed[key] = value
        for number in members:
            self._book.set_member(number, self._member(self._attachments[number]))
        return Changes(changed, removed)

    # Into the kernel

    def _refuse_too_much(self) -> None:
        """While a change is made the maps hold what is stale as well."""
        book = self._book
        prefixes = book.prefixes
        entries = len(self._entries) + sum(1 for e in book.touched if e in book.wanted and e not in self._entries)
        if entries > self._maps.max_entries:
            raise ExhaustedError(
                f"The policies need {entries} entries while they change ({len(book.wanted)} after), and the datapath"
                f" holds {self._maps.max_entries}: raise policy.max_entries, or name fewer peers and ports.",
                operation="policy",
                subject="policy",
            )
        classes = len(self._classes) + sum(
            1 for prefix in prefixes.touched if prefix in prefixes.numbers and prefix not in self._classes
        )
        if classes > self._maps.max_prefixes:
            raise ExhaustedError(
                f"The policies name {classes} networks (cidr and except) while they change, and the datapath holds"
                f" {self._maps.max_prefixes}: raise policy.max_prefixes, or name fewer.",
                operation="policy",
                subject="prefixes",
            )

    def _write(self) -> None:
        """What differs, and then the epoch where flows must be judged again. What could not be written stays to be
        written."""
        book, maps = self._book, self._maps
        wanted, numbers = book.wanted, book.prefixes.numbers
        new = [entry for entry in book.touched if entry in wanted and entry not in self._entries]
        stale = [entry for entry in book.touched if entry not in wanted and entry in self._entries]
        maps.allow(new)
        self._entries.update(new)
        named = book.prefixes.touched
        classes = {prefix: numbers[prefix] for prefix in named if prefix in numbers}
        classes = {prefix: number for prefix, number in classes.items() if self._classes.get(prefix) != number}
        maps.set_prefixes({_key(prefix): number for prefix, number in classes.items()})
        self._classes.update(classes)
        for number in sorted(book.moved):
            self._move(number)
        unnamed = [prefix for prefix in named if prefix not in numbers and prefix in self._classes]
        for prefix in unnamed:
            del self._classes[prefix]
        maps.delete_prefixes([_key(prefix) for prefix in unnamed])
        maps.forbid(stale)
        self._entries.difference_update(stale)
        book.touched.clear()
        book.moved.clear()
        named.clear()
        if self._epoch_due:
            self._datapath.change_node(lambda node: replace(node, epoch=(node.epoch + 1) % _EPOCHS))
            self._epoch_due = False

    def _move(self, number: int) -> None:
        attachment = self._attachments.get(number)
        if attachment is None:
            self._written.pop(number, None)
            return
        policy = self._book.pod_policy(number)
        self._datapath.set_policy(number, [address_key(address) for address in attachment.addresses], policy)
        self._written[number] = policy

    # What others ask

    def refusal(self, connector: PodName, connecting: bytes, listener: PodName, listening: bytes) -> str | None:
        """Why a lease between these ends, by address key, is not allowed, as if it were a UDP flow to port 4791; None
        where it is."""
        if connector == listener:
            return None  # "A Pod cannot block access to itself" (Concepts, Network Policies)
        ends: list[tuple[PodPolicy | None, IPAddress]] = []
        for key in (connecting, listening):
            number = self._by_address.get(key)
            ends.append((None if number is None else self._written.get(number), address_of(key)))
        source, destination = ends
        protocol, port = verdict.ROCE_PROTOCOL, verdict.ROCE_PORT
        direction = verdict.refused(source, destination, protocol, port, self._entries, self._classes)
        if direction is None:
            return None
        pod, key = (connector, connecting) if direction is Direction.EGRESS else (listener, listening)
        number = self._by_address.get(key)
        names = [] if number is None else self._book.selecting(number, direction)
        return (
            f"policy does not let {connector} connect to {listener} (UDP {port}): no {direction.value} rule of"
            f" {pod} allows it, which {' and '.join(names) or 'a policy that is gone by now'} selects"
        )

    def status(self) -> dict[int, dict[str, object]]:
        """Of each attachment, by id: its identity's number, labels, and the policies that select it."""
        with self._lock:
            self._take_back()
            return {
                number: {
                    "identity": self._book.pod_policy(number).identity,
                    "labels": dict(self._book.members[number].labels),
                    "policies": {direction.value: self._book.selecting(number, direction) for direction in Direction},
                }
                for number in self._attachments
            }

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Entries and classes of prefixes: how many there are, and how many there can be."""
        return {
            "entries": (len(self._entries), self._maps.max_entries),
            "prefixes": (len(self._classes), self._maps.max_prefixes),
        }


def _of_interest(changes: Changes) -> Changes:
    """Without services and their slices."""
    return Changes(
        {key: value for key, value in changes.changed.items() if key.kind in _KINDS},
        {key: value for key, value in changes.removed.items() if key.kind in _KINDS},
    )


def _key(prefix: Prefix) -> PrefixKey:
    """How the map has it: IPv4 is mapped (RFC 4291 2.5.5.2)."""
    if prefix.version == 4:
        return 96 + prefix.length, address_key(ipaddress.IPv4Address(prefix.network))
    return prefix.length, ipaddress.IPv6Address(prefix.network).packed


def _prefix(bits: int, key: bytes) -> Prefix:
    if bits >= 96 and key[:12] == bytes(10) + b"\xff\xff":
        return Prefix(4, int.from_bytes(key[12:], "big"), bits - 96)
    return Prefix(6, int.from_bytes(key, "big"), bits)
