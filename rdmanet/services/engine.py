"""Services in the datapath: brings the maps to what the objects say, without a moment in which a service has nobody."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rdmanet.datapath.services import Contents, MemberState, ServiceEntry, ServiceMaps, Slots
from rdmanet.model import IPAddress, address_key
from rdmanet.objects.changes import Changes
from rdmanet.services import maglev
from rdmanet.services.plan import Group
from rdmanet.services.table import Draft, Live, Step, Table

#: Destroys datagram sockets: by cookie, those of the ends (address key and port) that the socket is connected to.
Disconnect = Callable[[Mapping[int, set[bytes]]], None]

_UDP = 17
_LAST_ID = 0xFFFFFFFF


class Services:
    """A watcher of objects (``rdmanet.objects.changes``). Called from threads, one at a time inside.

    The first change after the start is taken as everything there is: the maps are brought to it, whatever they hold.
    The same is done when the kernel has refused in the middle of a change. ``here`` are this host's pods' addresses.
    """

    def __init__(self, maps: ServiceMaps, maglev_size: int, here: Iterable[IPAddress], disconnect: Disconnect):
        self._maps = maps
        self._maglev_size = maglev_size
        self._disconnect = disconnect
        self._lock = threading.Lock()
        self._here = {address_key(address) for address in here}
        self._table = Table(maps.bounds(), maglev_size)
        self._drafted: tuple[Changes, Draft] | None = None
        self._known = False  # whether the table says what the maps hold
        self._last_id = 0
        self._free: deque[int] = deque()  # where Maglev tables could begin; there is always one to spare

    def check(self, changes: Changes) -> None:
        """Raises ConflictError where two services want one address and port, ExhaustedError where they do not fit."""
        with self._lock:
            self._drafted = (changes, self._draft(changes))

    def objects_changed(self, changes: Changes) -> None:
        """Carries the change out. Raises as ``check`` before anything is done, KernelError where the kernel refuses."""
        with self._lock:
            drafted, self._drafted = self._drafted, None
            draft = drafted[1] if drafted is not None and drafted[0] is changes else self._draft(changes)
            gone = self._carry_out(draft)
        self._leave(gone)

    def local(self, addresses: Iterable[IPAddress], *, present: bool) -> None:
        """Pods' addresses that are on this host now, or no more. Errors as ``objects_changed``."""
        keys = {address_key(address) for address in addresses}
        with self._lock:
            self._drafted = None
            self._here = self._here | keys if present else self._here - keys
            names = self._table.near(keys)
            gone = self._carry_out(self._table.draft(Changes(), self._here, names)) if names and self._known else set()
        self._leave(gone)

    def status(self) -> dict[str, int]:
        """How many services there are, their addresses and ports, and backends of each of these."""
        with self._lock:
            return self._table.totals()

    def sizes(self) -> dict[str, tuple[int, int]]:
        """How many there are of what is bounded (``services`` are addresses with their ports, ``members`` backends of
        services with affinity or UDP ports), and how many there can be."""
        with self._lock:
            return self._table.sizes()

    def backends(self, namespace: str, name: str) -> dict[str, Any]:
        """Of one service: how many backends get new flows and are on this host or elsewhere, and how many only keep
        the flows that they have."""
        with self._lock:
            groups = [live.group for live in self._table.lives((namespace, name))]
            used = {end for group in groups for end in group.backends}
            here = {end for end in used if end[:16] in self._here}
            draining = {end for group in groups for end in group.draining} - used
        return {"here": len(here), "elsewhere": len(used - here), "draining": len(draining)}

    # The change, with the lock held

    def _draft(self, changes: Changes) -> Draft:
        if not self._known:
            self._table.forget_lives()
        return self._table.draft(changes, self._here, () if self._known else self._table.names())

    def _carry_out(self, draft: Draft) -> set[tuple[int, bytes]]:
        """Writes; returns the backends, as (id, end), to which no datagram socket may be connected any more."""
        found = None if self._known else self._maps.read()
        if found is not None:
            self._recognise(draft, found)
        self._known = False
        lives: list[Live | None] = [None] * len(draft.steps)
        try:
            lives, gone = self._write(draft)
            if found is not None:
                gone |= self._sweep(found, draft, lives)
            self._known = True
        finally:
            self._table.accept(draft, lives)
        return gone

    def _recognise(self, draft: Draft, contents: Contents) -> None:
        """What earlier agents wrote for the same addresses goes on under its ids."""
        self._last_id = max(
            [
                self._maps.highest_remembered_id(),
                *(entry.id for entry in contents.services.values()),
                *(number for number, _ in contents.backends),
                *(number for number, _ in contents.members),
            ]
        )
        members: dict[int, dict[bytes, int]] = {}
        for (number, end), state in contents.members.items():
            members.setdefault(number, {})[end] = state
        claimed: set[int] = set()
        used: set[int] = set()
        for place, step in enumerate(draft.steps):
            entries = [contents.services[key] for key in step.new.keys if key in contents.services] if step.new else []
            entry = next((entry for entry in entries if entry.id not in claimed), None)
            if entry is None or step.new is None:
                continue
            claimed.add(entry.id)
            old = self._as_found(step.new, entry, contents, members.get(entry.id, {}))
            if old.first is not None:
                used.add(old.first)
            draft.steps[place] = step._replace(old=old)
        # Tables that somebody may still look into are taken last.
        tables = range(0, self._maps.bounds().places - self._maglev_size + 1, self._maglev_size)
        found = {entry.maglev_first for entry in contents.services.values()}
        self._free = deque(sorted(set(tables) - used, key=lambda first: (first in found, first)))

    def _as_found(self, new: Group, entry: ServiceEntry, contents: Contents, members: Mapping[bytes, int]) -> Live:
        slots = contents.backends.get((entry.id, entry.generation), {})
        backends = tuple(slots.get(slot, b"") for slot in range(entry.backends))
        ready = {end for end, state in members.items() if state == MemberState.READY}
        if b"" in backends or (entry.has_members and ready != set(backends)):
            # Half of a change: its id goes on, and everything else is written anew.
            return Live(Group(new.name, (), (), (), 0, entry.has_members), entry.id, entry.generation)
        draining = tuple(sorted(end for end, state in members.items() if state == MemberState.TERMINATING))
        keys = tuple(key for key in new.keys if contents.services.get(key) == entry)
        first = None
        if new.outside and backends and entry.maglev_first % self._maglev_size == 0:
            places = self._maps.places(entry.maglev_first, self._maglev_size)
            first = entry.maglev_first if places == maglev.table(backends, self._maglev_size) else None
        return Live(Group(new.name, keys, backends, draining, entry.affinity_s, entry.has_members), *entry[:2], first)

    def _write(self, draft: Draft) -> tuple[list[Live | None], set[tuple[int, bytes]]]:
        """In such an order that who looks meanwhile finds the old backends or the new ones."""
        lives = [self._next(step) for step in draft.steps]
        slots: list[Slots] = []
        stale_slots: list[tuple[int, int, int]] = []
        stale_tables: list[int] = []
        ready: list[tuple[int, bytes, MemberState]] = []
        draining: list[tuple[int, bytes, MemberState]] = []
        gone: set[tuple[int, bytes]] = set()
        for step, live in zip(draft.steps, lives, strict=True):
            old = step.old
            if live is not None and (old is None or live.generation != old.generation):
                slots.append(Slots(live.id, live.generation, live.group.backends))
            if old is not None and (live is None or live.generation != old.generation):
                stale_slots += [(old.id, old.generation, slot) for slot in range(len(old.group.backends))]
            if old is not None and old.first is not None and (live is None or live.first != old.first):
                stale_tables.append(old.first)
            before, after = _members(old), _members(live)
            if before != after:
                for end, state in after.items():
                    if before.get(end) is not state and live is not None:
                        (ready if state is MemberState.READY else draining).append((live.id, end, state))
                gone.update((old.id, end) for end in before if old is not None and end not in after)
        maps = self._maps
        maps.set_backends(slots)
        maps.set_members(ready)
        for step, live in zip(draft.steps, lives, strict=True):
            if live is not None and live.first is not None and (step.old is None or step.old.first != live.first):
                maps.set_places(live.first, maglev.table(live.group.backends, self._maglev_size))
        maps.set_services([entry for live in lives if live is not None for entry in _entries(live)])
        maps.set_members(draining)
        maps.delete_services(draft.removed_keys)
        maps.delete_backends(stale_slots)
        maps.delete_members(gone)
        self._free.extend(stale_tables)
        return lives, gone

    def _next(self, step: Step) -> Live | None:
        """What the step leads to: an id and a generation of its own for each set of backends."""
        new, old = step.new, step.old
        if new is None:
            return None
        if old is None:
            self._last_id = self._last_id % _LAST_ID + 1
            number, generation, first = self._last_id, 1, None
        elif old.group.backends == new.backends:
            number, generation, first = old.id, old.generation, old.first
        else:
            number, generation, first = old.id, (old.generation + 1) & _LAST_ID, None
        if new.outside and new.backends and first is None:
            first = self._free.popleft()
        return Live(new, number, generation, first)

    def _sweep(self, found: Contents, draft: Draft, lives: Iterable[Live | None]) -> set[tuple[int, bytes]]:
        """Removes what no service has; returns members that were removed."""
        maps, now = self._maps, [live for live in lives if live is not None]
        generations = {(live.id, live.generation) for live in now}
        members = {(live.id, end) for live in now for end in _members(live)}
        maps.delete_services(found.services.keys() - draft.owners.keys())
        maps.delete_backends(
            [(*pair, slot) for pair, slots in found.backends.items() if pair not in generations for slot in slots]
        )
        gone = found.members.keys() - members
        maps.delete_members(gone)
        return gone

    def _leave(self, gone: set[tuple[int, bytes]]) -> None:
        """Sockets that are connected to a backend would send to nobody for ever: RFC 768 has no reset."""
        if gone:
            sockets = self._maps.sockets(gone, _UDP)
            if sockets:
                self._disconnect(sockets)


def _entries(live: Live) -> Iterator[tuple[bytes, ServiceEntry]]:
    group = live.group
    entry = ServiceEntry(
        live.id, live.generation, len(group.backends), group.affinity_s, live.first or 0, group.has_members
    )
    return ((key, entry) for key in group.keys)


def _members(live: Live | None) -> Mapping[bytes, MemberState]:
    if live is None or not live.group.has_members:
        return {}
    ready, draining = live.group.backends, live.group.draining
    return dict.fromkeys(ready, MemberState.READY) | dict.fromkeys(draining, MemberState.TERMINATING)
