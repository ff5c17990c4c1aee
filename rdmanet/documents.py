"""Kept Kubernetes objects, as the documents that people gave: a database beside the attachments', so that fifty
thousand services being written hold up no ADD."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rdmanet.database import Database

FILE = "objects.db"


class Document(NamedTuple):
    """One row: what names the object, its document as JSON, when it was created (seconds since 1970)."""

    kind: str
    namespace: str
    name: str
    text: str
    created_s: int


class Documents(Database):
    """One database file."""

    SCHEMA = """
CREATE TABLE objects (
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    document TEXT NOT NULL,
    created_s INTEGER NOT NULL,
    PRIMARY KEY (kind, namespace, name)
) STRICT, WITHOUT ROWID;
"""
    VERSION = 1
    ADVICE = "run `rdmanet repair --database`, which moves it aside, and apply the objects again"

    @classmethod
    def beside(cls, state_dir: Path) -> Documents:
        """The one of a state directory."""
        return cls(state_dir / FILE)

    def write(self, written: Iterable[Document], removed: Iterable[tuple[str, str, str]]) -> None:
        """Commits rows and removals (kind, namespace, name) together; what is there keeps its ``created_s``."""
        with self._transaction() as db:
            db.executemany("DELETE FROM objects WHERE kind = ? AND namespace = ? AND name = ?", removed)
            db.executemany(
                "INSERT INTO objects (kind, namespace, name, document, created_s) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (kind, namespace, name) DO UPDATE SET document = excluded.document",
                written,
            )

    def find(self, kind: str | None = None, namespace: str | None = None, name: str | None = None) -> list[Document]:
        """Rows by what is given, ordered by kind, namespace and name."""
        given = {"kind": kind, "namespace": namespace, "name": name}
        asked = {column: value for column, value in given.items() if value is not None}
        condition = " AND ".join(f"{column} = ?" for column in asked) or "TRUE"
        query = f"SELECT * FROM objects WHERE {condition} ORDER BY kind, namespace, name"
        return [Document(*row) for row in self._rows(query, tuple(asked.values()))]
