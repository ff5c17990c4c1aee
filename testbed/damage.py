"""Ways in which a SQLite file is damaged or lost; no process may have it open.

``python -m testbed.damage FILE HOW`` is to be carried out on the host: SQLite resolves links, so /proc/PID/root would
lead it to the machine's own files.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.paths import REPOSITORY

if TYPE_CHECKING:
    from testbed.host import Host

Damage = Callable[[Path], None]


def fold(path: Path) -> None:
    """Everything into the file itself: what a killed process has left in the log would mend it. Not where the file is
    damaged already."""
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _sql(script: str) -> Damage:
    def change(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(script)

    return change


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _stub(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def _overwrite(path: Path) -> None:
    """All pages but the first: what a disk with bad blocks gives back."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(range(256)) * ((size - 4096) // 256))


def _foreign(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\nexit 0\n" * 500)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink()


#: By name: what is done to the file of the attachments.
DAMAGES: Mapping[str, Damage] = {
    "truncated": _truncate,
    "cut to 100 bytes": _stub,
    "pages overwritten": _overwrite,
    "not a database": _foreign,
    "a table is missing": _sql("DROP TABLE addresses;"),
    "a column is missing": _sql("ALTER TABLE attachments DROP COLUMN mac;"),
    "another program's tables": _sql("CREATE TABLE bookmarks (url TEXT); PRAGMA user_version=0;"),
    "a row that nobody can read": _sql("UPDATE attachments SET state = 'confused' WHERE id = 1;"),
    "rows lost": _sql("PRAGMA foreign_keys=ON; DELETE FROM attachments WHERE id > 1;"),
    "empty": _empty,
    "gone": _remove,
}


def damage(host: Host, path: str, how: str) -> None:
    """One of ``DAMAGES`` to a host's file; the log goes with it."""
    host.exec([sys.executable, "-m", "testbed.damage", path, how], cwd=str(REPOSITORY))


def main() -> None:
    path, how = Path(sys.argv[1]), sys.argv[2]
    fold(path)
    DAMAGES[how](path)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
