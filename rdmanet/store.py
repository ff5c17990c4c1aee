"""The agent's state: attachments, addresses and what was done to the host, in SQLite.

Everything is committed before the effect that it announces; after a crash or a reboot every row can be finished or
undone from what
the kernel shows. Synchronous and thread-safe: one connection behind one lock; a commit takes some 50 µs (WAL,
synchronous=NORMAL).
"""

from __future__ import annotations

import dataclasses
import fcntl
import ipaddress
import json
import os
import sqlite3
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rdmanet.database import Database
from rdmanet.errors import ConflictError, StateError
from rdmanet.model import (
    Attachment,
    AttachmentState,
    Backend,
    Bandwidth,
    Device,
    GuardMode,
    IPAddress,
    Limit,
    NetnsId,
    PodCgroup,
    PodName,
    RdmaMode,
    address_key,
    address_of,
    pod_mac,
)

FILE = "state.db"
SCHEMA_VERSION = 5

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE attachments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    container_id TEXT NOT NULL,
    ifname TEXT NOT NULL,
    network TEXT NOT NULL,
    netns TEXT NOT NULL,
    netns_dev INTEGER NOT NULL,
    netns_ino INTEGER NOT NULL,
    pod_namespace TEXT NOT NULL,
    pod_name TEXT NOT NULL,
    state TEXT NOT NULL,
    mac TEXT NOT NULL,
    mtu_bytes INTEGER NOT NULL,
    wants_rdma INTEGER NOT NULL,
    guard TEXT NOT NULL,
    device TEXT,
    result TEXT NOT NULL DEFAULT '{}',
    max_leases INTEGER NOT NULL DEFAULT 256,
    traffic_class INTEGER NOT NULL DEFAULT 0,
    service_level INTEGER NOT NULL DEFAULT 0,
    pod_uid TEXT,
    cgroup TEXT,
    labels TEXT NOT NULL DEFAULT '{}',
    slot TEXT,
    bandwidth TEXT NOT NULL DEFAULT '{}',
    UNIQUE (container_id, ifname)
) STRICT;
CREATE TABLE addresses (
    address BLOB PRIMARY KEY,
    attachment_id INTEGER NOT NULL REFERENCES attachments (id) ON DELETE CASCADE
) STRICT;
CREATE INDEX addresses_by_attachment ON addresses (attachment_id);
CREATE UNIQUE INDEX attachments_by_slot ON attachments (slot);
CREATE TABLE host_effects (name TEXT PRIMARY KEY, detail TEXT NOT NULL) STRICT;
"""

#: From the version before to each.
_MIGRATIONS = {
    2: """
ALTER TABLE attachments ADD COLUMN max_leases INTEGER NOT NULL DEFAULT 256;
ALTER TABLE attachments ADD COLUMN traffic_class INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attachments ADD COLUMN service_level INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attachments ADD COLUMN pod_uid TEXT;
ALTER TABLE attachments ADD COLUMN cgroup TEXT;
""",
    3: """
ALTER TABLE attachments ADD COLUMN labels TEXT NOT NULL DEFAULT '{}';
""",
    4: """
ALTER TABLE attachments ADD COLUMN slot TEXT;
CREATE UNIQUE INDEX attachments_by_slot ON attachments (slot);
""",
    5: """
ALTER TABLE attachments ADD COLUMN bandwidth TEXT NOT NULL DEFAULT '{}';
""",
}

_COLUMNS = (
    "id, container_id, ifname, network, netns, netns_dev, netns_ino, pod_namespace, pod_name, state, mac, mtu_bytes,"
    " wants_rdma, guard, device, max_leases, traffic_class, service_level, pod_uid, cgroup, labels, slot, bandwidth"
)


class Store(Database):
    """One database file. ``close`` when done."""

    SCHEMA = _SCHEMA
    VERSION = SCHEMA_VERSION
    MIGRATIONS = _MIGRATIONS
    ADVICE = "run `rdmanet repair --database`, which writes it anew from the kernel's state"

    #: Called after each change of the effects on the host, in the thread that made it.
    effects_changed: Callable[[], None] = staticmethod(lambda: None)

    # Attachments

    def reserve(self, attachment: Attachment) -> Attachment:
        """Commits a new row in state ``adding`` with its addresses; returns it with its id and its MAC.

        ``attachment.id`` is ignored; a MAC of "" is replaced by one made from the id. Raises
        ConflictError where the attachment or an address exists, or its slot is another's.
        """
        wanted = dataclasses.replace(attachment, state=AttachmentState.ADDING)
        try:
            with self._transaction() as db:
                if attachment.slot is not None:
                    _refuse_taken(db, attachment.slot)
                number = _insert(db, wanted, None)
                mac = attachment.mac or pod_mac(number)
                db.execute("UPDATE attachments SET mac = ? WHERE id = ?", (mac, number))
        except sqlite3.IntegrityError as error:
            raise ConflictError(
                f"Container {attachment.container_id} has an interface {attachment.ifname} already, or its address"
                f" is taken.",
                operation="reserve",
                subject=f"{attachment.container_id}/{attachment.ifname}",
            ) from error
        return dataclasses.replace(wanted, id=number, mac=mac)

    def restore(self, attachments: Iterable[Attachment], effects: Mapping[str, str], last_id: int) -> None:
        """Commits what was found in the kernel, all of it or nothing: attachments with their ids and states, effects.
        Ids up to ``last_id`` are used up."""
        with self._transaction() as db:
            for attachment in attachments:
                _insert(db, attachment, attachment.id)
            for effect in effects.items():
                db.execute("INSERT OR REPLACE INTO host_effects (name, detail) VALUES (?, ?)", effect)
            used = db.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'attachments'").fetchone()[0] or 0
            db.execute("DELETE FROM sqlite_sequence WHERE name = 'attachments'")
            db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('attachments', ?)", (max(used, last_id),))

    def set_state(self, attachment_id: int, state: AttachmentState) -> None:
        """Commits a new state."""
        self._take_back(lambda db: db.execute("UPDATE attachments SET state = ? WHERE id = ?", (state, attachment_id)))

    def set_device(self, attachment_id: int, device: Device | None) -> None:
        """Commits what device the attachment has."""
        text = json.dumps(asdict(device)) if device else None
        with self._transaction() as db:
            db.execute("UPDATE attachments SET device = ? WHERE id = ?", (text, attachment_id))

    def set_cgroup(self, attachment_id: int, cgroup: PodCgroup | None) -> None:
        """Commits in which cgroup the attachment's limits are about to hold; None: in none any more."""
        text = json.dumps(asdict(cgroup)) if cgroup else None
        self._take_back(lambda db: db.execute("UPDATE attachments SET cgroup = ? WHERE id = ?", (text, attachment_id)))

    def free_slot(self, attachment_id: int) -> None:
        """Commits that the attachment has its slot no more."""
        self._take_back(lambda db: db.execute("UPDATE attachments SET slot = NULL WHERE id = ?", (attachment_id,)))

    def holder(self, slot: str) -> Attachment | None:
        """Who has the slot."""
        return next((one for one in self.attachments() if one.slot == slot), None)

    def set_ready(self, attachment_id: int, result: dict[str, object]) -> None:
        """Commits state ``ready`` together with the result that ADD returned."""
        with self._transaction() as db:
            db.execute(
                "UPDATE attachments SET state = ?, result = ? WHERE id = ?",
                (AttachmentState.READY, json.dumps(result), attachment_id),
            )

    def forget(self, *attachment_ids: int) -> None:
        """Removes rows and frees their addresses, in one commit."""
        numbers = [(number,) for number in attachment_ids]
        self._take_back(lambda db: db.executemany("DELETE FROM attachments WHERE id = ?", numbers))

    def find(self, container_id: str, ifname: str) -> Attachment | None:
        """The attachment of that key, or None."""
        with self._lock:
            rows = self._rows("SELECT * FROM attachments WHERE container_id = ? AND ifname = ?", (container_id, ifname))
            if not rows:
                return None
            query = "SELECT address FROM addresses WHERE attachment_id = ?"
            found = self._read(rows[0], [row["address"] for row in self._rows(query, (rows[0]["id"],))])
            return dataclasses.replace(found, result=json.loads(rows[0]["result"]))

    def get(self, attachment_id: int) -> Attachment | None:
        """The attachment of that id without its result, or None."""
        with self._lock:
            rows = self._rows(f"SELECT {_COLUMNS} FROM attachments WHERE id = ?", (attachment_id,))
            query = "SELECT address FROM addresses WHERE attachment_id = ?"
            keys = [row["address"] for row in self._rows(query, (attachment_id,))]
            return _attachment(rows[0], keys) if rows else None

    def attachments(self) -> list[Attachment]:
        """Every attachment, oldest first, without the results: there may be thousands."""
        with self._lock:  # rows and their addresses as of one moment
            keys: dict[int, list[bytes]] = {}
            for row in self._rows("SELECT attachment_id, address FROM addresses"):
                keys.setdefault(row["attachment_id"], []).append(row["address"])
            rows = self._rows(f"SELECT {_COLUMNS} FROM attachments ORDER BY id")
            return [self._read(row, keys.get(row["id"], [])) for row in rows]

    def attachment_ids(self) -> set[int]:
        """Of every attachment."""
        return {row["id"] for row in self._rows("SELECT id FROM attachments")}

    def _read(self, row: sqlite3.Row, keys: Iterable[bytes]) -> Attachment:
        try:
            return _attachment(row, keys)
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"the row of attachment {row['id']} cannot be read") from error

    def taken(self) -> Container[bytes]:
        """The address keys in use, asked for one by one: there may be thousands."""
        return _Taken(self._rows)

    # What was done to the host, and which boot this is

    def begin(self, boot_id: str) -> None:
        """Says in which boot of the host the agent starts.

        After a reboot nothing that an earlier agent made is there: in one commit every attachment becomes
        ``releasing``, and effects are forgotten, so that none is ever taken back from somebody who made the same
        since (a bpffs that systemd mounted, say).
        """

        def change(db: sqlite3.Connection) -> None:
            known = db.execute("SELECT value FROM meta WHERE key = 'boot_id'").fetchone()
            if known is not None and known["value"] != boot_id:
                db.execute("UPDATE attachments SET state = ?, cgroup = NULL", (AttachmentState.RELEASING,))
                db.execute("DELETE FROM host_effects")
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('boot_id', ?)", (boot_id,))

        self._take_back(change)

    def record_effect(self, name: str, detail: str = "") -> None:
        """Commits that an effect on the host is about to be made."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO host_effects (name, detail) VALUES (?, ?)", (name, detail))
        self.effects_changed()

    def forget_effect(self, name: str) -> None:
        """Commits that the effect has been taken back."""
        self._take_back(lambda db: db.execute("DELETE FROM host_effects WHERE name = ?", (name,)))
        self.effects_changed()

    def effects(self) -> dict[str, str]:
        """Effects on the host that were recorded and not taken back."""
        return {row["name"]: row["detail"] for row in self._rows("SELECT name, detail FROM host_effects")}


def _insert(db: sqlite3.Connection, attachment: Attachment, number: int | None) -> int:
    """A row with its addresses, under this id or the next; returns the id."""
    device = json.dumps(asdict(attachment.device)) if attachment.device else None
    values = {
        "id": number,
        "container_id": attachment.container_id,
        "ifname": attachment.ifname,
        "network": attachment.network,
        "netns": attachment.netns,
        "netns_dev": attachment.netns_id.dev,
        "netns_ino": attachment.netns_id.ino,
        "pod_namespace": attachment.pod.namespace,
        "pod_name": attachment.pod.name,
        "state": attachment.state,
        "mac": attachment.mac,
        "mtu_bytes": attachment.mtu_bytes,
        "wants_rdma": int(attachment.wants_rdma),
        "guard": attachment.guard,
        "device": device,
        "max_leases": attachment.max_leases,
        "traffic_class": attachment.traffic_class,
        "service_level": attachment.service_level,
        "pod_uid": attachment.pod_uid,
        "labels": json.dumps(dict(attachment.labels)),
        "slot": attachment.slot,
        "bandwidth": json.dumps({name: limit for name, limit in asdict(attachment.bandwidth).items() if limit}),
    }
    names, places = ", ".join(values), ", ".join("?" * len(values))
    cursor = db.execute(f"INSERT INTO attachments ({names}) VALUES ({places})", tuple(values.values()))
    made = int(cursor.lastrowid or 0)
    db.executemany(
        "INSERT INTO addresses (address, attachment_id) VALUES (?, ?)",
        [(address_key(address), made) for address in attachment.addresses],
    )
    return made


class _Taken(Container[bytes]):
    def __init__(self, rows: Callable[[str, tuple[object, ...]], list[sqlite3.Row]]):
        self._rows = rows

    def __contains__(self, key: object) -> bool:
        return bool(self._rows("SELECT 1 FROM addresses WHERE address = ?", (key,)))


def _attachment(row: sqlite3.Row, keys: Iterable[bytes]) -> Attachment:
    addresses: list[IPAddress] = [address_of(key) for key in keys]
    device = json.loads(row["device"]) if row["device"] else None
    if device is not None:
        device = Device(**{**device, "mode": RdmaMode(device["mode"]), "backend": Backend(device["backend"])})
    return Attachment(
        id=row["id"],
        container_id=row["container_id"],
        ifname=row["ifname"],
        network=row["network"],
        netns=row["netns"],
        netns_id=NetnsId(dev=row["netns_dev"], ino=row["netns_ino"]),
        pod=PodName(namespace=row["pod_namespace"], name=row["pod_name"]),
        state=AttachmentState(row["state"]),
        mac=row["mac"],
        mtu_bytes=row["mtu_bytes"],
        ipv4=next((a for a in addresses if isinstance(a, ipaddress.IPv4Address)), None),
        ipv6=next((a for a in addresses if isinstance(a, ipaddress.IPv6Address)), None),
        wants_rdma=bool(row["wants_rdma"]),
        guard=GuardMode(row["guard"]),
        device=device,
        max_leases=row["max_leases"],
        traffic_class=row["traffic_class"],
        service_level=row["service_level"],
        pod_uid=row["pod_uid"],
        cgroup=PodCgroup(**json.loads(row["cgroup"])) if row["cgroup"] else None,
        labels=json.loads(row["labels"]),
        slot=row["slot"],
        bandwidth=Bandwidth(**{name: Limit(*limit) for name, limit in json.loads(row["bandwidth"]).items()}),
    )


def _refuse_taken(db: sqlite3.Connection, slot: str) -> None:
    query = "SELECT container_id, pod_namespace, pod_name FROM attachments WHERE slot = ?"
    holder = db.execute(query, (slot,)).fetchone()
    if holder is not None:
        raise ConflictError(
            f"The slot {slot} is {holder['pod_namespace']}/{holder['pod_name']}'s still (container"
            f" {holder['container_id']}); it is free when that container's DEL or a GC has come.",
            operation="reserve",
            subject=slot,
        )


@contextmanager
def owned(state_dir: Path) -> Iterator[None]:
    """One agent per state directory; the kernel lets go of the lock however the agent ends."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(state_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"The state directory {state_dir} cannot be used: {error}.", operation="open", subject=str(state_dir)
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(
                f"An agent is running already with {state_dir}; stop it first.", operation="flock", errno=error.errno
            ) from error
        yield
    finally:
        os.close(descriptor)
