"""Revoked guard entries: they stay, and drop, for as long as the kernel shows the old queue pair.

A packet in flight, or a process that goes on sending, must not pass as unleased traffic. Once the queue pair is gone,
or belongs to another process, the entry is deleted, so that a QPN that is used again inherits neither the grant nor the
revocation.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from rdmanet.broker.values import DeleteGuard, Effect, FindHolders, Key, Limits
from rdmanet.model import Device


@dataclass(slots=True)
class _End:
    device: Device | None  # None: adopted from a pod that has no device any more
    pid: int | None  # of the queue pair's holder; None: not known yet
    check_s: float
    interval_s: float
    query: int | None = None  # asked and not answered


class RevokedEnds:
    """Which revoked ends wait for their queue pair to go, and when to ask the kernel about each."""

    def __init__(self, limits: Limits, queries: Iterator[int]):
        self._limits = limits
        self._queries = queries
        self._ends: dict[Key, _End] = {}
        self._asked: dict[int, Key] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, key: Key, device: Device | None, pid: int | None, now_s: float) -> None:
        interval_s = self._limits.first_check_s
        self._ends[key] = _End(device, pid, now_s + interval_s, interval_s)

    def forget(self, keys: Collection[Key]) -> None:
        """New leases overwrite these entries."""
        for key in self._ends.keys() & keys:
            del self._ends[key]

    def addresses_gone(self, addresses: Collection[bytes]) -> list[Effect]:
        """Delete the entries of addresses that are about to belong to nobody."""
        keys = [key for key in self._ends if key[0] in addresses]
        for key in keys:
            del self._ends[key]
        return [DeleteGuard(tuple(keys))] if keys else []

    def due(self, now_s: float) -> list[Effect]:
        """What to ask the kernel now."""
        asked: dict[Device, list[tuple[int, int]]] = {}
        waiting = [(key, end) for key, end in self._ends.items() if end.query is None]
        devices = {end.device for _, end in waiting if end.check_s <= now_s}
        # One look at a device answers for all its queue pairs: what would be asked soon is asked with the rest.
        soon_s = now_s + self._limits.first_check_s
        for key, end in waiting:
            if end.device not in devices or end.check_s > soon_s:
                continue
            if end.device is None:
                self._later(end, now_s)  # nothing can be asked; the entry goes with the pod
                continue
            end.query = next(self._queries)
            self._asked[end.query] = key
            asked.setdefault(end.device, []).append((end.query, key[1]))
        return [FindHolders(device, tuple(queries)) for device, queries in asked.items()]

    def holder_found(self, query: int, pid: int | None, now_s: float) -> Key | None:
        """None: there is no such queue pair; 0: there is one, of nobody knows whom. Returns what to delete."""
        key, end = self._answered(query)
        if key is None or end is None:
            return None
        if pid is None or (pid and end.pid and pid != end.pid):
            del self._ends[key]
            return key
        end.pid = pid or end.pid
        self._later(end, now_s)
        return None

    def holder_unknown(self, query: int, now_s: float) -> None:
        _, end = self._answered(query)
        if end is not None:
            self._later(end, now_s)

    def next_check_s(self) -> float | None:
        return min((e.check_s for e in self._ends.values() if e.query is None), default=None)

    def _answered(self, query: int) -> tuple[Key | None, _End | None]:
        key = self._asked.pop(query, None)
        end = None if key is None else self._ends.get(key)
        # The end may have been leased and revoked again since it was asked about.
        return (key, end) if end is not None and end.query == query else (None, None)

    def _later(self, end: _End, now_s: float) -> None:
        end.query = None
        end.interval_s = min(2 * end.interval_s, self._limits.longest_check_s)
        end.check_s = now_s + end.interval_s


def queries() -> Iterator[int]:
    """Numbers for FindHolders, shared by everybody who asks."""
    return itertools.count(1)
