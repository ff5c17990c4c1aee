"""One SQLite file with a schema of its own: opened, brought up to its version, written in transactions.

Synchronous and thread-safe: one connection behind one lock; a commit takes some 50 µs (WAL, synchronous=NORMAL).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, Self

from rdmanet.errors import StateError


class Database:
    """Opens the file, or makes it. ``close`` when done.

    Raises StateError: it is damaged, cannot be written, or is of a newer rdmanet. Subclasses have the tables.
    """

    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int]
    MIGRATIONS: ClassVar[Mapping[int, str]] = {}  # from the version before to each
    ADVICE: ClassVar[str]  # what to do about a damaged one

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with ExitStack() as opening:
                self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5.0)
                opening.callback(self._db.close)
                self._db.row_factory = sqlite3.Row
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA foreign_keys=ON")
                path.chmod(0o600)
                self._migrate()
                opening.pop_all()
        except (sqlite3.Error, OSError) as error:
            raise StateError(
                f"The agent's database {path} is not usable: {error}. If it is damaged, {self.ADVICE}.",
                operation="open",
                subject=str(path),
            ) from error

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > self.VERSION:
            raise StateError(
                f"The agent's database {self.path} was written by a newer rdmanet (schema {version}, this one knows"
                f" {self.VERSION}); install that version again.",
                operation="open",
                subject=str(self.path),
            )
        if version == 0:
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
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.IntegrityError):
                    raise
                raise StateError(
                    f"The agent's database {self.path} cannot be written: {error}. Check free space and permissions.",
                    operation="commit",
                    subject=str(self.path),
                ) from error

    def _rows(self, query: str, parameters: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._db.execute(query, parameters).fetchall()
            except sqlite3.DatabaseError as error:
                raise StateError(
                    f"The agent's database {self.path} cannot be read: {error}.",
                    operation="read",
                    subject=str(self.path),
                ) from error
