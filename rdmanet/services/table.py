"""Which services there are, and what a change of objects means for them; pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rdmanet.datapath.services import Bounds, parse_service_key
from rdmanet.errors import ConflictError, ExhaustedError
from rdmanet.model import address_key, address_of
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import EndpointSlice, ObjectKey, Service
from rdmanet.services.plan import ZERO, Group, GroupName, depends_on_host, groups

Name = tuple[str, str]  # namespace, name

_PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}
_NOTHING: Mapping[ObjectKey, EndpointSlice] = {}


class Live(NamedTuple):
    """A group as the maps hold it."""

    group: Group
    id: int
    generation: int
    first: int | None = None  # where its Maglev table begins


class Step(NamedTuple):
    """One group of a change: as it is, and as it shall be; None where it is not."""

    service: Name
    old: Live | None
    new: Group | None


@dataclass(slots=True)
class Draft:
    """What a change leads to, before anything is done; of what it touches alone."""

    services: dict[Name, Service | None] = field(default_factory=dict)
    slices: dict[Name, dict[ObjectKey, EndpointSlice]] = field(default_factory=dict)
    slice_names: dict[ObjectKey, Name | None] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    owners: dict[bytes, Name] = field(default_factory=dict)  # struct service_key → who has it then
    removed_keys: set[bytes] = field(default_factory=set)
    sums: list[int] = field(default_factory=list)  # as Table's, when it has been carried out


class Table:
    """Services, slices and groups, by service; changed by ``accept`` alone."""

    def __init__(self, bounds: Bounds, maglev_size: int):
        self._bounds = bounds
        self._maglev_size = maglev_size
        self._services: dict[Name, Service] = {}
        self._slices: dict[Name, dict[ObjectKey, EndpointSlice]] = {}
        self._slice_names: dict[ObjectKey, Name] = {}
        self._owners: dict[bytes, Name] = {}
        self._near: dict[bytes, set[Name]] = {}  # address key → services for which it matters whether it is here
        self._lives: dict[Name, dict[GroupName, Live]] = {}
        self._sums = [0, 0, 0, 0]  # addresses, backends, members, Maglev tables

    def names(self) -> list[Name]:
        """Of all services that there are."""
        return list(self._services)

    def near(self, addresses: Iterable[bytes]) -> set[Name]:
        """Services for which it matters whether these addresses are on this host."""
        return {name for address in addresses for name in self._near.get(address, ())}

    def lives(self, name: Name) -> Collection[Live]:
        """A service's groups."""
        return self._lives.get(name, {}).values()

    def totals(self) -> dict[str, int]:
        """Services that have addresses; their addresses and ports; backends of each of these."""
        return {"services": len(self._lives), "addresses": len(self._owners), "backends": self._sums[1]}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """How many there are of what is bounded, and how many there can be."""
        return {
            name: (used, most)
            for name, used, most in zip(
                ("services", "backends", "members", "outside_services"), self._sums, self._most(), strict=True
            )
        }

    def _most(self) -> tuple[int, int, int, int]:
        """Bounds of the sums."""
        bounds = self._bounds
        return bounds.services, bounds.backends, bounds.members, bounds.places // self._maglev_size // 2

    def draft(self, changes: Changes, here: Collection[bytes], also: Iterable[Name] = ()) -> Draft:
        """What the change leads to, and ``also`` services that shall be looked at again.

        Raises ConflictError where two services want one address and port, ExhaustedError where they do not fit.
        """
        draft = Draft(services={name: self._services.get(name) for name in also})
        self._read(changes, draft)
        for name in draft.slices:
            draft.services.setdefault(name, self._services.get(name))
        draft.sums = list(self._sums)
        new: dict[Name, list[Group]] = {}
        for name, service in draft.services.items():
            pieces = draft.slices.get(name)
            if pieces is None:
                pieces = self._slices.get(name, {})
            new[name] = groups(service, pieces.values(), here) if service is not None else []
        for name, made in new.items():
            olds = dict(self._lives.get(name, {}))
            for group in made:
                old = olds.pop(group.name, None)
                for key in group.keys:
                    self._claim(key, name, draft)
                if old is None or old.group != group:
                    draft.steps.append(Step(name, old, group))
                    _add(draft.sums, group, old)
            for old in olds.values():
                draft.steps.append(Step(name, old, None))
                _add(draft.sums, None, old)
        for step in draft.steps:
            if step.old is not None:
                draft.removed_keys.update(key for key in step.old.group.keys if key not in draft.owners)
        self._check_bounds(draft)
        return draft

    def accept(self, draft: Draft, lives: Sequence[Live | None]) -> None:
        """The draft has been carried out: what is live now, for each of its steps."""
        for name, service in draft.services.items():
            self._mark_near(name, present=False)
            _put(self._services, name, service)
        for name, pieces in draft.slices.items():
            _put(self._slices, name, pieces or None)
        for slice_key, owner in draft.slice_names.items():
            _put(self._slice_names, slice_key, owner)
        for name in draft.services:
            self._mark_near(name, present=True)
        for step, live in zip(draft.steps, lives, strict=True):
            of_service = self._lives.setdefault(step.service, {})
            if step.old is not None:
                of_service.pop(step.old.group.name, None)
            if live is not None:
                of_service[live.group.name] = live
            if not of_service:
                del self._lives[step.service]
        self._sums = draft.sums
        for key in draft.removed_keys:
            self._owners.pop(key, None)
        self._owners.update(draft.owners)

    def forget_lives(self) -> None:
        """What the maps hold is not known any more; the objects are."""
        self._lives, self._owners, self._sums = {}, {}, [0, 0, 0, 0]

    def _read(self, changes: Changes, draft: Draft) -> None:
        for key, value in changes.removed.items():
            if isinstance(value, Service):
                draft.services[value.namespace, value.name] = None
            elif isinstance(value, EndpointSlice):
                self._move(key, None, None, draft)
        for key, value in changes.changed.items():
            if isinstance(value, Service):
                draft.services[value.namespace, value.name] = value
            elif isinstance(value, EndpointSlice):
                self._move(key, value, (value.namespace, value.service), draft)

    def _move(self, key: ObjectKey, value: EndpointSlice | None, to: Name | None, draft: Draft) -> None:
        """A slice may have become another service's."""
        before = self._slice_names.get(key)
        for name in (before, to):
            if name is not None and name not in draft.slices:
                draft.slices[name] = dict(self._slices.get(name, _NOTHING))
        if before is not None:
            draft.slices[before].pop(key, None)
        if to is not None and value is not None:
            draft.slices[to][key] = value
        draft.slice_names[key] = to

    def _claim(self, key: bytes, name: Name, draft: Draft) -> None:
        owner = draft.owners.get(key)
        if owner is None:
            other = self._owners.get(key)
            if other is not None and other not in draft.services:
                owner = other
        if owner is not None:
            raise ConflictError(
                f"{_describe(key)} cannot be that of Service {'/'.join(name)}: "
                f"Service {'/'.join(owner)} has it{' already' if owner != name else ' too: it is named twice'}.",
                subject="/".join(name),
            )
        draft.owners[key] = name

    def _check_bounds(self, draft: Draft) -> None:
        words = (
            ("addresses and ports of services", "max_services"),
            ("backends of services", "max_backends"),
            ("backends of services with affinity or UDP ports", "max_backends"),
            ("node ports and external addresses", "max_outside_services"),
        )
        for total, bound, (what, key) in zip(draft.sums, self._most(), words, strict=True):
            if total > bound:
                raise ExhaustedError(
                    f"{total} {what} would be too many: services.{key} in the agent's configuration allows {bound}."
                )
        for step in draft.steps:
            if step.new is not None and step.new.outside and len(step.new.backends) > self._maglev_size:
                raise ExhaustedError(
                    f"Service {'/'.join(step.service)} has {len(step.new.backends)} backends on this host, but "
                    f"services.maglev_size is {self._maglev_size}.",
                    subject="/".join(step.service),
                )

    def _mark_near(self, name: Name, *, present: bool) -> None:
        service = self._services.get(name)
        if service is None or not depends_on_host(service):
            return
        for piece in self._slices.get(name, _NOTHING).values():
            for endpoint in piece.endpoints:
                key = address_key(endpoint.address)
                if present:
                    self._near.setdefault(key, set()).add(name)
                elif key in self._near:
                    self._near[key].discard(name)
                    if not self._near[key]:
                        del self._near[key]


def _add(sums: list[int], new: Group | None, old: Live | None) -> None:
    """Addresses, backends, members and Maglev tables: those of the new group in place of the old one's."""
    for group, sign in ((new, 1), (old.group if old else None, -1)):
        if group is not None:
            sums[0] += sign * len(group.keys)
            sums[1] += sign * len(group.backends)
            if group.has_members:
                sums[2] += sign * (len(group.backends) + len(group.draining))
            if group.outside:
                sums[3] += sign


def _put(into: dict, key: object, value: object | None) -> None:  # type: ignore[type-arg]
    if value is None:
        into.pop(key, None)
    else:
        into[key] = value


def _describe(key: bytes) -> str:
    """What a struct service_key stands for, in the words of a Service."""
    address, port, protocol, _ = parse_service_key(key)
    name = _PROTOCOLS.get(protocol, str(protocol))
    if address in ZERO.values():
        return f"Node port {port}/{name}"
    shown = address_of(address)
    return f"Address {f'[{shown}]' if shown.version == 6 else shown}:{port}/{name}"
