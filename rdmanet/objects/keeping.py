"""The objects that this node was given: rows first, then the watchers.

Synchronous, and thread-safe; one change after the other.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rdmanet.documents import Document, Documents
from rdmanet.errors import RdmanetError, RequestError, StateError
from rdmanet.objects.changes import Changes, Watcher
from rdmanet.objects.reading import Read, read, unlisted
from rdmanet.objects.values import Kind, Object, ObjectKey

log = logging.getLogger(__name__)


class Outcome(enum.StrEnum):
    """What became of one object, in kubectl's words."""

    CREATED = "created"
    CONFIGURED = "configured"
    UNCHANGED = "unchanged"
    DELETED = "deleted"
    NOT_FOUND = "not found"


class Result(NamedTuple):
    """Of one object."""

    key: ObjectKey
    outcome: Outcome


class Objects:
    """All objects. ``watchers`` are told in their order; ``load`` and ``tell_all`` come before everything else."""

    def __init__(self, documents: Documents, watchers: Sequence[Watcher] = ()):
        self._documents = documents
        self._watchers = watchers
        self._changing = threading.Lock()
        self._objects: Mapping[ObjectKey, Object] = {}
        self._digests: dict[ObjectKey, bytes] = {}
        # What a watcher failed at, with the values that were before: told again with the next change.
        self._owed: dict[ObjectKey, Object | None] = {}

    @property
    def snapshot(self) -> Mapping[ObjectKey, Object]:
        """Everything there is now; never changed afterwards."""
        return self._objects

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        counted = Counter(key.kind for key in self._objects)
        return {str(kind): counted[kind] for kind in Kind}

    def load(self) -> None:
        """Reads every row. Raises StateError for a row that cannot be read."""
        with self._changing:
            found: dict[ObjectKey, Object] = {}
            for row in self._documents.find():
                try:
                    one = read(json.loads(row.text))
                except (RequestError, ValueError) as error:
                    raise StateError(
                        f"A kept object cannot be read: {error} Delete its row from {self._documents.path}, or install"
                        " the version that kept it.",
                        operation="load",
                        subject=f"{row.kind} {row.namespace}/{row.name}",
                    ) from error
                found[one.key] = one.value
                self._digests[one.key] = _digest(row.text)
            self._objects = found

    def tell_all(self) -> None:
        """Tells the watchers of everything that ``load`` has read. Raises as they do."""
        with self._changing:
            self._tell(Changes(self._objects, {}, self._objects))

    def apply(self, documents: Iterable[object]) -> list[Result]:
        """Creates and changes objects, all or none; one result for each document, in their order.

        Raises RequestError for a document that is not understood, or an object that is there twice; ConflictError,
        ExhaustedError and RequestError of the watchers. After KernelError the objects are kept, and the watchers are
        told again with the next change.
        """
        given: dict[ObjectKey, Read] = {}
        for document in unlisted(documents):
            one = read(document)
            if one.key in given:
                raise RequestError(f"{one.key} is there twice.")
            given[one.key] = one
        with self._changing:
            before = self._objects
            digests = {key: _digest(one.text) for key, one in given.items()}
            written = [one for key, one in given.items() if self._digests.get(key) != digests[key]]
            results = [Result(key, self._outcome(key, digests[key])) for key in given]
            changed = {one.key: one.value for one in written if before.get(one.key) != one.value}
            now_s = int(time.time())
            rows = [Document(*one.key, one.text, now_s) for one in written]
            self._change(changed, {}, rows)
            self._digests |= digests
            self._tell_owed()
        return results

    def _outcome(self, key: ObjectKey, digest: bytes) -> Outcome:
        known = self._digests.get(key)
        if known is None:
            return Outcome.CREATED
        return Outcome.UNCHANGED if known == digest else Outcome.CONFIGURED

    def delete(self, keys: Iterable[ObjectKey]) -> list[Result]:
        """Deletes what is there of ``keys``; one result for each. Raises as ``apply`` does.

        A Namespace is deleted alone, not what is in it.
        """
        asked = list(dict.fromkeys(keys))
        with self._changing:
            removed = {key: self._objects[key] for key in asked if key in self._objects}
            self._change({}, removed, [])
            for key in removed:
                del self._digests[key]
            self._tell_owed()
        return [Result(key, Outcome.DELETED if key in removed else Outcome.NOT_FOUND) for key in asked]

    def documents(
        self, kind: Kind | None = None, namespace: str | None = None, name: str | None = None
    ) -> Iterator[dict[str, object]]:
        """Kept documents with their creationTimestamp, ordered by kind, namespace and name."""
        for row in self._documents.find(kind, namespace, name):
            document: dict[str, object] = json.loads(row.text)
            metadata = document["metadata"]
            assert isinstance(metadata, dict)
            metadata["creationTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.created_s))
            yield document

    def _change(
        self, changed: Mapping[ObjectKey, Object], removed: Mapping[ObjectKey, Object], rows: Sequence[Document]
    ) -> None:
        """Asks the watchers, commits, and makes the next snapshot the current one."""
        before = self._objects
        after = {**before, **changed}
        for key in removed:
            del after[key]
        changes = Changes(changed, removed, after)
        if changes:
            for watcher in self._watchers:
                watcher.check(changes)
        if rows or removed:
            self._documents.write(rows, removed)
        self._objects = after
        for key in (*changed, *removed):
            self._owed.setdefault(key, before.get(key))

    def _tell_owed(self) -> None:
        after = self._objects
        if not self._owed:
            return
        self._tell(
            Changes(
                {key: after[key] for key in self._owed if key in after},
                {key: value for key, value in self._owed.items() if key not in after and value is not None},
                after,
            )
        )

    def _tell(self, changes: Changes) -> None:
        failures: list[RdmanetError] = []
        for watcher in self._watchers:
            try:
                watcher.objects_changed(changes)
            except RdmanetError as error:
                log.error("Objects are kept, and not all of them are in force: %s", error)
                failures.append(error)
        if failures:
            raise failures[0]
        self._owed.clear()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
