"""The store: what is written is read again, what is unique stays so, and no crash leaves half a row."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rdmanet import store as module
from rdmanet.errors import ConflictError, DamagedError, StateError
from rdmanet.model import (
    UNLIMITED,
    Attachment,
    AttachmentState,
    Backend,
    Bandwidth,
    Device,
    GuardMode,
    Limit,
    NetnsId,
    PodCgroup,
    PodName,
    RdmaMode,
    address_key,
)
from rdmanet.store import SCHEMA_VERSION, Store, owned
from testbed.paths import REPOSITORY
from testbed.upgrades import SCHEMAS, create

DEVICE = Device(
    name="rxe_rn1", backend=Backend.RXE, mode=RdmaMode.SHARED, index=7, uverbs="uverbs3", major=231, minor=195
)


def taken(store: Store) -> set[bytes]:
    """Every address key in the database."""
    with sqlite3.connect(store.path) as database:
        return {key for (key,) in database.execute("SELECT address FROM addresses")}


def wanted(number: int = 1, **changes: object) -> Attachment:
    """An attachment as ADD asks for it: without an id."""
    attachment = Attachment(
        id=0,
        container_id=f"c{number}",
        ifname="eth0",
        network="net",
        netns=f"/run/netns/c{number}",
        netns_id=NetnsId(dev=4, ino=4026531840 + number),
        pod=PodName("default", f"pod-{number}"),
        state=AttachmentState.ADDING,
        mac="",
        mtu_bytes=1500,
        ipv4=ipaddress.IPv4Address("10.213.0.1") + number,
        ipv6=ipaddress.IPv6Address("fd00::1") + number,
        wants_rdma=False,
    )
    return dataclasses.replace(attachment, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def test_files_are_roots_alone(store: Store, path: Path) -> None:
    store.reserve(wanted())
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "attachment",
    [
        wanted(),
        wanted(ipv6=None),
        wanted(ipv4=None),
        wanted(wants_rdma=True, guard=GuardMode.ENFORCE, mac="0a:58:0a:00:00:05", mtu_bytes=9000),
        wanted(pod=PodName("ünder", "a'b\"; --"), netns="/run/netns/ä b", netns_id=NetnsId(2**40, 2**40)),
    ],
)
def test_round_trip_through_another_process_life(store: Store, path: Path, attachment: Attachment) -> None:
    made = store.reserve(attachment)
    assert made.id == 1
    assert made.mac == (attachment.mac or "02:72:00:00:00:01")
    assert made == dataclasses.replace(attachment, id=1, mac=made.mac)
    store.set_device(made.id, DEVICE)
    store.set_ready(made.id, {"cniVersion": "1.1.0", "ips": [{"address": "10.213.0.2/32"}]})
    ready = dataclasses.replace(
        made,
        state=AttachmentState.READY,
        device=DEVICE,
        result={"cniVersion": "1.1.0", "ips": [{"address": "10.213.0.2/32"}]},
    )
    assert store.find(made.container_id, made.ifname) == ready
    store.close()
    again = Store(path)
    without_result = dataclasses.replace(ready, result={})
    assert again.attachments() == [without_result]
    assert isinstance(again.attachments()[0].state, AttachmentState)
    assert again.attachment_ids() == {made.id}
    again.set_device(made.id, None)
    again.set_state(made.id, AttachmentState.RELEASING)
    assert again.attachments() == [dataclasses.replace(without_result, device=None, state=AttachmentState.RELEASING)]
    again.close()


def test_ids_are_never_used_twice(store: Store, path: Path) -> None:
    """Names of kernel objects are made of them: a late packet or a forgotten link must not meet a new pod."""
    first = store.reserve(wanted(1))
    store.forget(first.id)
    second = store.reserve(wanted(2))
    assert second.id == first.id + 1
    store.forget(second.id)
    store.close()
    again = Store(path)
    assert again.reserve(wanted(3)).id == second.id + 1
    again.close()


def test_forgetting_frees_the_addresses(store: Store) -> None:
    made = store.reserve(wanted())
    assert taken(store) == {address_key("10.213.0.2"), address_key("fd00::2")}
    assert address_key("10.213.0.2") in store.taken()
    assert address_key("10.213.0.3") not in store.taken()
    store.forget(made.id)
    assert taken(store) == set()
    assert store.find("c1", "eth0") is None
    store.forget(made.id)  # idempotent
    store.reserve(wanted())


@pytest.mark.parametrize(
    "second",
    [
        wanted(2, container_id="c1"),
        wanted(2, ipv4=wanted(1).ipv4),
        wanted(2, ipv6=wanted(1).ipv6),
    ],
    ids=["container and interface", "ipv4", "ipv6"],
)
def test_unique(store: Store, second: Attachment) -> None:
    first = store.reserve(wanted(1))
    with pytest.raises(ConflictError) as caught:
        store.reserve(second)
    assert caught.value.sentence == (
        f"Container {second.container_id} has an interface eth0 already, or its address is taken."
    )
    assert store.attachments() == [first], "the refused one left a row"
    assert taken(store) == {address_key(a) for a in first.addresses}, "the refused one left an address"
    store.reserve(wanted(3, container_id="c1", ifname="eth1"))


def test_threads_do_not_get_the_same_address(store: Store) -> None:
    def reserve(number: int) -> bool:
        try:
            store.reserve(wanted(number, ipv4=wanted(1).ipv4))
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(reserve, range(1, 33))) == 1
    assert len(store.attachments()) == 1


_KILLED = """
import os, signal, sys
from pathlib import Path
from rdmanet import store as module
from tests.unit.test_store import wanted
store = module.Store(Path(sys.argv[1]))
store.reserve(wanted(1))
def die(number):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "inside":
    module.pod_mac = die  # called between the two INSERTs of one transaction
store.reserve(wanted(2))
die(0)
"""


@pytest.mark.parametrize(("moment", "left"), [("inside", 1), ("after", 2)])
def test_a_kill_leaves_whole_rows(path: Path, moment: str, left: int) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path), moment], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    store = Store(path)
    assert [attachment.container_id for attachment in store.attachments()] == ["c1", "c2"][:left]
    assert taken(store) == {address_key(a) for n in range(1, left + 1) for a in wanted(n).addresses}
    store.reserve(wanted(9))
    store.close()


def test_a_failure_inside_a_transaction_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "pod_mac", fail)
    with pytest.raises(KeyboardInterrupt):
        store.reserve(wanted())
    monkeypatch.undo()
    assert store.attachments() == []
    store.reserve(wanted())


def test_effects(store: Store) -> None:
    store.record_effect("bpffs", "/sys/fs/bpf")
    store.record_effect("host-link")
    store.record_effect("bpffs", "/mnt")
    assert store.effects() == {"bpffs": "/mnt", "host-link": ""}
    store.forget_effect("bpffs")
    store.forget_effect("bpffs")
    assert store.effects() == {"host-link": ""}


def test_the_same_boot_changes_nothing_and_another_ends_everything(store: Store) -> None:
    store.begin("boot-1")
    made = store.reserve(wanted())
    store.set_ready(made.id, {})
    store.record_effect("bpffs", "/sys/fs/bpf")
    store.begin("boot-1")
    assert [a.state for a in store.attachments()] == [AttachmentState.READY]
    assert store.effects() == {"bpffs": "/sys/fs/bpf"}
    store.begin("boot-2")
    assert [a.state for a in store.attachments()] == [AttachmentState.RELEASING]
    assert store.effects() == {}
    assert taken(store), "addresses are free only once the attachment is undone"


#: One of its rows, by the columns that every version has.
ROW = """
INSERT INTO attachments (id, container_id, ifname, network, netns, netns_dev, netns_ino, pod_namespace, pod_name,
    state, mac, mtu_bytes, wants_rdma, guard) VALUES (7, 'c7', 'eth0', 'net', '/run/netns/c7', 4, 5, 'default', 'pod-7',
    'ready', '02:72:00:00:00:07', 1500, 1, 'enforce');
INSERT INTO addresses VALUES (x'00000000000000000000ffff0ad50007', 7);
INSERT INTO host_effects VALUES ('bpffs', '/sys/fs/bpf');
"""


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Name, type, whether NULL is refused, default and key of each table's columns."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {
            table: sorted(tuple(row[1:]) for row in database.execute(f"PRAGMA table_info({table})")) for table in tables
        }


def test_every_older_schema_is_known() -> None:
    assert sorted(SCHEMAS) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("version", SCHEMAS)
def test_an_older_versions_file_is_read_and_gets_defaults(path: Path, version: int) -> None:
    path.parent.mkdir()
    create(path, version)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(ROW)
    for _ in range(2):
        store = Store(path)
        (found,) = store.attachments()
        assert (found.id, found.guard, found.wants_rdma) == (7, GuardMode.ENFORCE, True)
        assert found.addresses == (ipaddress.IPv4Address("10.213.0.7"),)
        assert (found.max_leases, found.traffic_class, found.service_level) == (256, 0, 0)
        assert (found.pod_uid, found.cgroup, found.labels, found.slot) == (None, None, {}, None)
        assert found.bandwidth == UNLIMITED
        assert store.effects() == {"bpffs": "/sys/fs/bpf"}
        store.close()
    store = Store(path)
    store.set_cgroup(7, PodCgroup("/kubepods/pod7", 42))
    assert store.reserve(wanted(8)).id == 8
    store.close()
    fresh = path.with_name("fresh.db")
    Store(fresh).close()
    assert columns(path) == columns(fresh)


@pytest.mark.parametrize("version", SCHEMAS)
def test_a_migration_that_fails_leaves_the_file_as_it_was(
    path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    create(path, version)
    monkeypatch.setattr(Store, "MIGRATIONS", {**Store.MIGRATIONS, version + 1: "ALTER TABLE nowhere RENAME TO x;"})
    with pytest.raises(StateError):
        Store(path)
    monkeypatch.undo()
    Store(path).close()


def test_limits_and_the_cgroup_are_kept(store: Store) -> None:
    made = store.reserve(wanted(max_leases=3, traffic_class=104, service_level=5, pod_uid="6f2d-1"))
    cgroup = PodCgroup("/kubepods/pod6f2d-1", 1 << 40, {"hca_handle": "max", "hca_object": "7"})
    store.set_cgroup(made.id, cgroup)
    found = store.find("c1", "eth0")
    assert found is not None
    assert (found.max_leases, found.traffic_class, found.service_level) == (3, 104, 5)
    assert (found.pod_uid, found.cgroup) == ("6f2d-1", cgroup)
    assert store.attachments() == [found]
    store.set_cgroup(made.id, None)
    assert store.attachments()[0].cgroup is None


@pytest.mark.parametrize(
    "bandwidth",
    [UNLIMITED, Bandwidth(egress=Limit(10**6, 2**17)), Bandwidth(Limit(10**15, 2**40), Limit(1000, 2**17))],
)
def test_bandwidth_is_kept(store: Store, bandwidth: Bandwidth) -> None:
    store.reserve(wanted(bandwidth=bandwidth))
    assert store.attachments()[0].bandwidth == bandwidth


def test_labels_are_kept(store: Store) -> None:
    store.reserve(wanted(labels={"app": "web", "example.com/tier": ""}))
    assert store.attachments()[0].labels == {"app": "web", "example.com/tier": ""}


def test_no_cgroup_outlives_a_reboot(store: Store) -> None:
    store.begin("boot-1")
    store.set_cgroup(store.reserve(wanted()).id, PodCgroup("/a", 1))
    store.begin("boot-2")
    assert store.attachments()[0].cgroup is None


def test_a_newer_schema_is_refused_and_left_as_it_is(store: Store, path: Path) -> None:
    store.close()
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(StateError) as caught:
        Store(path)
    assert caught.value.sentence == (
        f"The agent's database {path} was written by a newer rdmanet (schema {SCHEMA_VERSION + 1}, this one knows"
        f" {SCHEMA_VERSION}); install that version again."
    )
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)


@pytest.mark.parametrize("content", [b"garbage " * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_garbage_file_is_refused_with_what_to_do(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        Store(path)
    assert caught.value.sentence.startswith(f"The agent's database {path} is damaged: ")
    assert "run `rdmanet repair --database`" in caught.value.sentence
    assert path.read_bytes() == content


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="is not usable"):
        Store(tmp_path / "file" / "state.db")


def test_a_database_that_became_unreadable_is_a_state_error(store: Store) -> None:
    store.reserve(wanted())
    store.close()
    with pytest.raises(StateError, match="cannot be read"):
        store.attachments()
    with pytest.raises(StateError, match="cannot be written"):
        store.forget(1)


def test_a_full_disk_in_the_middle_of_a_statement_is_no_damage(store: Store) -> None:
    """SQLite has taken the transaction back by then, as for errors of input and output."""
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StateError, match="The disk is full: free space") as caught:
        all(store.reserve(wanted(number)).id == number for number in range(1, 1000))
    assert (type(caught.value), caught.value.errno) == (StateError, errno.ENOSPC)
    made = len(store.attachments())
    assert [one.id for one in store.attachments()] == list(range(1, made + 1))
    store.forget(1)
    store.reserve(wanted(made + 1))


def test_one_owner_per_state_directory(tmp_path: Path) -> None:
    with owned(tmp_path / "state"):
        with (
            pytest.raises(ConflictError, match=r"An agent is running already with .*; stop it first"),
            owned(tmp_path / "state"),
        ):
            pytest.fail("two owners")
        with owned(tmp_path / "other"):
            pass
    with owned(tmp_path / "state"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used"), owned(tmp_path / "file"):
        pytest.fail("a file is no directory")
