"""What watchers of objects are told: what changed, from one set of objects to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rdmanet.objects.values import Object, ObjectKey


@dataclass(frozen=True, slots=True)
class Changes:
    """From one snapshot to the next.

    ``changed`` has objects that are new or other than before, with their new values; ``removed`` those that are gone,
    with their last values; ``objects`` is the snapshot that this leads to: everything there is then (not a copy: read
    it while the call lasts). The first changes after a start hold every kept object in ``changed``, and come also where
    there are none.
    """

    changed: Mapping[ObjectKey, Object] = field(default_factory=dict)
    removed: Mapping[ObjectKey, Object] = field(default_factory=dict)
    objects: Mapping[ObjectKey, Object] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


class Watcher(Protocol):
    """Makes the kernel say what objects say. Both are called in a thread of the agent's executor, one change after the
    other; ``objects_changed`` in the order of the commits."""

    def check(self, changes: Changes) -> None:
        """Before anything is committed: raises InputError, ConflictError or ExhaustedError where these changes cannot
        be carried out (two services with one address, a full map). Has no effects: other watchers may still refuse."""

    def objects_changed(self, changes: Changes) -> None:
        """After the commit. Raises KernelError where the kernel refuses: the rows stay, and the same changes come again
        with the next ones, or at the next start."""
