"""Other versions of the agent: databases as older ones left them, datapaths as others have them, older trees.

``python -m testbed.upgrades FILE VERSION`` writes a database anew under an older schema, on the host that it is on.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdmanet.datapath import artifact as artifacts
from rdmanet.datapath.artifact import Artifact
from testbed.host import ARTIFACT, Host
from testbed.paths import BUILD, REPOSITORY

_FIRST_COLUMNS = """
    id INTEGER PRIMARY KEY AUTOINCREMENT, container_id TEXT NOT NULL, ifname TEXT NOT NULL, network TEXT NOT NULL,
    netns TEXT NOT NULL, netns_dev INTEGER NOT NULL, netns_ino INTEGER NOT NULL, pod_namespace TEXT NOT NULL,
    pod_name TEXT NOT NULL, state TEXT NOT NULL, mac TEXT NOT NULL, mtu_bytes INTEGER NOT NULL,
    wants_rdma INTEGER NOT NULL, guard TEXT NOT NULL, device TEXT, result TEXT NOT NULL DEFAULT '{}',
"""
_SECOND_COLUMNS = """
    max_leases INTEGER NOT NULL DEFAULT 256, traffic_class INTEGER NOT NULL DEFAULT 0,
    service_level INTEGER NOT NULL DEFAULT 0, pod_uid TEXT, cgroup TEXT,
"""
_THIRD_COLUMNS = "labels TEXT NOT NULL DEFAULT '{}',"
_FOURTH_COLUMNS = "slot TEXT,"
_OTHERS = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE addresses (
    address BLOB PRIMARY KEY,
    attachment_id INTEGER NOT NULL REFERENCES attachments (id) ON DELETE CASCADE
) STRICT;
CREATE INDEX addresses_by_attachment ON addresses (attachment_id);
CREATE TABLE host_effects (name TEXT PRIMARY KEY, detail TEXT NOT NULL) STRICT;
"""
#: What each older version's first start executed. They never change: whoever adds a version adds the one before here.
SCHEMAS: Mapping[int, str] = {
    1: f"CREATE TABLE attachments ({_FIRST_COLUMNS} UNIQUE (container_id, ifname)) STRICT; {_OTHERS}",
    2: f"CREATE TABLE attachments ({_FIRST_COLUMNS} {_SECOND_COLUMNS} UNIQUE (container_id, ifname)) STRICT; {_OTHERS}",
    3: f"CREATE TABLE attachments ({_FIRST_COLUMNS} {_SECOND_COLUMNS} {_THIRD_COLUMNS}"
    f" UNIQUE (container_id, ifname)) STRICT; {_OTHERS}",
    4: f"CREATE TABLE attachments ({_FIRST_COLUMNS} {_SECOND_COLUMNS} {_THIRD_COLUMNS} {_FOURTH_COLUMNS}"
    f" UNIQUE (container_id, ifname)) STRICT; {_OTHERS}"
    " CREATE UNIQUE INDEX attachments_by_slot ON attachments (slot);",
}


def create(path: Path, version: int) -> None:
    """An empty database as that version made it."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(f"{SCHEMAS[version]} PRAGMA user_version={version};")


def downgrade(path: Path, version: int) -> None:
    """The same rows under an older schema, with the columns that it has."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    newer = path.with_name(path.name + ".newer")
    path.rename(newer)
    create(path, version)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("ATTACH ? AS newer", (str(newer),))
        for table in ("meta", "attachments", "addresses", "host_effects"):
            columns = ", ".join(name for _, name, *_ in database.execute(f"PRAGMA main.table_info({table})"))
            database.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM newer.{table}")
    newer.unlink()


def downgrade_on(host: Host, path: str, version: int) -> None:
    """On a host whose agent is away."""
    host.exec([sys.executable, "-m", "testbed.upgrades", path, str(version)], cwd=str(REPOSITORY))


# Datapaths

#: Sizes of maps as another version, or another administrator, has them.
OTHER_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tracking": {"max_flows": 65536, "max_flows_per_pod": 20000},
    "policy": {"max_entries": 65536},
    "services": {"max_services": 4096, "max_backends": 8192},
}


def other_artifact(directory: Path) -> str:
    """The same programs under another hash, in a directory of their own: a start puts them in the others' place."""
    known = Artifact.load(ARTIFACT)
    artifacts.save(replace(known, hash=known.hash[::-1]), directory / artifacts.NEWEST)
    return str(directory)


# Trees


@dataclass(frozen=True, slots=True)
class Tree:
    """An older version of the sources. ``schema`` is its database's."""

    commit: str
    directory: Path
    schema: int

    @property
    def program(self) -> tuple[str, ...]:
        """How Python starts its agent: without this checkout's sources in front."""
        return ("-P", "-m", "rdmanet", "agent")

    @property
    def environment(self) -> dict[str, str]:
        """Where Python finds it."""
        return {"PYTHONPATH": str(self.directory)}


def older_tree() -> Tree | None:
    """The last release (tag), or the last commit before this one that has another agent; None where the history does
    not say, as in a copy without one."""
    commit = _git("describe", "--tags", "--abbrev=0", "HEAD^") or next(
        iter(_git("log", "--format=%H", "--max-count=1", "HEAD^", "--", "rdmanet").split()), ""
    )
    if not commit:
        return None
    directory = BUILD / "upgrade" / commit[:12]
    if not (directory / "rdmanet").is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "archive", commit, "rdmanet"], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    found = re.search(r"^SCHEMA_VERSION = (\d+)$", (directory / "rdmanet/store.py").read_text("utf-8"), re.MULTILINE)
    return Tree(commit[:12], directory, int(found[1]) if found else 0)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    downgrade(Path(sys.argv[1]), int(sys.argv[2]))
