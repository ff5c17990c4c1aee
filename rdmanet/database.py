"""One SQLite file with a schema of its own: opened, brought up to its version, written in transactions.

Synchronous and thread-safe: one connection behind one lock; a commit takes some 50 µs (WAL, synchronous=NORMAL).
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Protocol, Self

from rdmanet.errors import DamagedError, StateError

#: How long a transaction waits for another process that has the database locked.
BUSY_S = 5.0
#: A disk with less is full.
_FULL_BYTES = 1 << 16
#: What SQLite says of a file that is not, or no longer, a database with these tables.
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Room(Protocol):
    """Disk space that is kept (``rdmanet.reserve``)."""

    def give_up(self) -> bool: ...
    def make(self) -> bool: ...


class Database:
    """Opens the file, or makes it. ``close`` when done.

    Raises DamagedError, and StateError: it cannot be written, or is of a newer rdmanet. Subclasses have the tables.
    """

    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int]
    MIGRATIONS: ClassVar[Mapping[int, str]] = {}  # from the version before to each
    ADVICE: ClassVar[str]  # what to do about a damaged one

    def __init__(self, path: Path, room: Room | None = None):
        """``room`` is given up for what takes something back, where the disk is full."""
        self._lock = threading.RLock()
        self._room = room
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with ExitStack() as opening:
                self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=BUSY_S)
                opening.callback(self._db.close)
                self._db.row_factory = sqlite3.Row
                self._refuse_newer()
                self._refuse_damaged()
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA foreign_keys=ON")
                path.chmod(0o600)
                self._migrate()
                self._refuse_other_tables()
                opening.pop_all()
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.Error) and _code(error) in _DAMAGE:
                raise self._damaged(str(error)) from error
            what = " Its disk is full: free space." if self._is_full(error) else ""
            raise StateError(
                f"The agent's database {path} is not usable: {error}.{what}", operation="open", subject=str(path)
            ) from error

    def _damaged(self, why: str) -> DamagedError:
        return DamagedError(
            f"The agent's database {self.path} is damaged: {why}. To go on, {self.ADVICE}.",
            operation="open",
            subject=str(self.path),
        )

    def _refuse_damaged(self) -> None:
        """Looks at every page (PRAGMA quick_check): 10 ms for 10,000 attachments."""
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise self._damaged(" ".join(found.split()))

    def _refuse_other_tables(self) -> None:
        with closing(sqlite3.connect(":memory:")) as wanted:
            wanted.executescript(self.SCHEMA)
            missing = _columns(wanted) - _columns(self._db)
        if missing:
            table, column, *_ = min(missing)
            raise self._damaged(f"it has no column {column} as it should be in a table {table}")

    def _refuse_newer(self) -> None:
        version = self._version()
        if version > self.VERSION:
            raise StateError(
                f"The agent's database {self.path} was written by a newer rdmanet (schema {version}, this one knows"
                f" {self.VERSION}); install that version again.",
                operation="open",
                subject=str(self.path),
            )

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _migrate(self) -> None:
        version = self._version()
        if version == 0:
            if _columns(self._db):
                raise self._damaged("it has tables, and no version of ours")
            self._db.executescript(f"BEGIN;{self.SCHEMA}PRAGMA user_version={self.VERSION};COMMIT;")
            return
        for following in range(version + 1, self.VERSION + 1):
            self._db.executescript(f"BEGIN;{self.MIGRATIONS[following]}PRAGMA user_version={following};COMMIT;")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database; the write-ahead log is folded in."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    if self._db.in_transaction:  # SQLite takes some back itself (lang_transaction.html, section 3)
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.IntegrityError):
                    raise
                if _code(error) in _DAMAGE:
                    raise self._damaged(str(error)) from error
                raise self._not_written(error) from error

    def _not_written(self, error: sqlite3.Error) -> StateError:
        full = self._is_full(error)
        what = "Check permissions and the disk"
        if full:
            what = "The disk is full: free space"
        elif _code(error) == sqlite3.SQLITE_BUSY:
            what = f"Another process has held it for more than {BUSY_S:g} s (`fuser {self.path}`): end that"
        return StateError(
            f"The agent's database {self.path} cannot be written: {error}. {what}, and ask again.",
            operation="commit",
            subject=str(self.path),
            errno=errno.ENOSPC if full else None,
        )

    def _is_full(self, error: Exception) -> bool:
        code = _code(error) if isinstance(error, sqlite3.Error) else 0
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):  # where the log or its index cannot be made
            found = os.statvfs(self.path.parent)
            return found.f_bavail * found.f_frsize < _FULL_BYTES
        return code == sqlite3.SQLITE_FULL

    def _take_back(self, change: Callable[[sqlite3.Connection], object]) -> None:
        """A transaction that frees something: also where the disk is full, as far as there is a reserve."""
        steps: list[Callable[[], object]] = [self._fold]
        if self._room is not None:
            steps += [self._room.give_up, self._fold]
        for number in range(len(steps) + 1):
            try:
                with self._transaction() as db:
                    change(db)
                break
            except StateError as error:
                if error.errno != errno.ENOSPC or number == len(steps):
                    raise
                steps[number]()
        if number and self._room is not None:
            self._fold()
            self._room.make()

    def _fold(self) -> None:
        """Into the database with the log, whose space is free then."""
        with self._lock, suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _rows(self, query: str, parameters: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._db.execute(query, parameters).fetchall()
            except sqlite3.DatabaseError as error:
                if _code(error) in _DAMAGE:
                    raise self._damaged(str(error)) from error
                raise StateError(
                    f"The agent's database {self.path} cannot be read: {error}.",
                    operation="read",
                    subject=str(self.path),
                ) from error


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where the error is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _columns(database: sqlite3.Connection) -> set[tuple[str, str, str, int, int]]:
    """Table, name, type, whether NULL is refused, place in the primary key, of every column."""
    tables = [name for (name,) in map(tuple, database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'"))]
    return {
        (table, name, kind, refuses_null, place)
        for table in tables
        for _, name, kind, refuses_null, _, place in map(tuple, database.execute(f'PRAGMA table_info("{table}")'))
    }
