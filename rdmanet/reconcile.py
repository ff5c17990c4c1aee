"""What should be against what is, and what is done about the difference: pure, but for a record of what has broken.

``broken_pod`` and ``broken_node`` name what is gone, causes before what goes with them; ``plan`` says which steps of
ADD make it again. The same thing that breaks too often is left alone (``Record``).
"""

from __future__ import annotations

import enum
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rdmanet.datapath.layout import AttachmentEntry, EndpointEntry, NodeEntry, UplinkEntry
from rdmanet.ipam import IPNetwork
from rdmanet.model import UNLIMITED, Attachment, Backend, Bandwidth, IPAddress
from rdmanet.node import HOST_LINK
from rdmanet.rdma.backend import Condition
from rdmanet.steps import Way

#: The same thing that breaks so often within so long is left alone.
MOST_BREAKS = 5
WINDOW_S = 600.0
#: What has been done lately, for people.
KEPT = 64
#: In the place of an attachment's id: the node itself.
NODE = 0


class Kind(enum.StrEnum):
    """What can break; a label of metrics, too."""

    NAMESPACE = "namespace"
    LINK = "link"
    INTERFACE = "interface"  # down
    ADDRESS = "address"
    NEIGHBOUR = "gateway_mac"  # the permanent neighbour
    ROUTE = "route"
    FILTER = "filter"
    DEVICE = "device"
    ENTRY = "entry"
    FORWARDING = "forwarding"
    UPLINK = "uplink"
    PIN = "pin"
    PROGRAM = "program"


class Outcome(enum.StrEnum):
    """What came of it; a label of metrics, too."""

    REPAIRED = "repaired"
    COLLECTED = "collected"  # the pod is gone
    FOLLOWED = "followed"  # the host has changed, nothing was broken
    FAILED = "failed"  # tried again
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class Broken:
    """Something that is not as it should be, as a sentence without its end. ``waits``: it cannot be repaired now, and
    is to be looked at again."""

    kind: Kind
    sentence: str
    repairable: bool = True
    waits: bool = False


# Pods


@dataclass(frozen=True, slots=True)
class PodWanted:
    """What an attachment should have; ``own`` and ``endpoint`` are its entries for the host's end that there is."""

    attachment: Attachment
    ways: Sequence[Way]
    program_id: int
    own: AttachmentEntry | None
    endpoint: EndpointEntry | None


@dataclass(frozen=True, slots=True)
class PodSeen:
    """What there is. ``program_ids`` are those of the filters at our place of the host's end. Where something is
    missing, what hangs on it was not looked at."""

    namespace: bool = False
    folder: bool = True  # where the namespace's path is
    pod_end: bool = False
    pod_end_up: bool = False
    addresses: frozenset[IPAddress] = frozenset()
    neighbours: frozenset[tuple[IPAddress, str]] = frozenset()
    routes: frozenset[tuple[IPNetwork, IPAddress]] = frozenset()
    host_end: bool = False
    host_end_up: bool = False
    program_ids: tuple[int, ...] = ()
    condition: Condition | None = None
    own: AttachmentEntry | None = None
    bandwidth: Bandwidth = UNLIMITED
    endpoints: Mapping[IPAddress, EndpointEntry | None] | None = None


def broken_pod(wanted: PodWanted, seen: PodSeen, gateway_mac: str) -> Iterator[Broken]:
    """What of a ready attachment is not as ADD left it."""
    attachment = wanted.attachment
    if not seen.namespace:
        # Without the folder nobody can say: it may be unmounted, with all pods alive.
        sentence = f"its network namespace {attachment.netns} is gone"
        yield Broken(Kind.NAMESPACE, sentence, repairable=seen.folder)
        return
    if not seen.pod_end:
        yield Broken(Kind.LINK, f"the interface {attachment.ifname} is missing from the pod")
        return
    if not seen.host_end:
        yield Broken(Kind.LINK, f"the host's end {attachment.host_ifname} is missing")
        return
    if not seen.pod_end_up:
        # Routes and neighbours go with it.
        yield Broken(Kind.INTERFACE, f"the interface {attachment.ifname} is down")
    else:
        yield from _broken_inside(wanted, seen, gateway_mac)
    if seen.program_ids != (wanted.program_id,):
        yield Broken(Kind.FILTER, f"the filter on {attachment.host_ifname} is missing")
    elif not seen.host_end_up:
        yield Broken(Kind.INTERFACE, f"the host's end {attachment.host_ifname} is down")
    condition = seen.condition
    if condition is not None and condition.problem is not None:
        # Others than rxe are the host's own.
        gone = condition.gone and condition.device.backend is Backend.RXE
        yield Broken(Kind.DEVICE, condition.problem, repairable=gone, waits=condition.leaving)
    if seen.own != wanted.own:
        yield Broken(Kind.ENTRY, "its entry in the datapath is missing or wrong")
    if seen.bandwidth != attachment.bandwidth:
        yield Broken(Kind.ENTRY, "its bandwidth's limits in the datapath are missing or wrong")
    for address, endpoint in (seen.endpoints or {}).items():
        if endpoint != wanted.endpoint:
            yield Broken(Kind.ENTRY, f"the endpoint {address} is missing from the datapath")


def _broken_inside(wanted: PodWanted, seen: PodSeen, gateway_mac: str) -> Iterator[Broken]:
    ifname = wanted.attachment.ifname
    for way in wanted.ways:
        if way.address not in seen.addresses:
            # With the last address of a family the kernel takes its routes and neighbours.
            yield Broken(Kind.ADDRESS, f"the address {way.address} is missing from {ifname}")
            continue
        if (way.gateway, gateway_mac) not in seen.neighbours:
            yield Broken(Kind.NEIGHBOUR, f"the neighbour {way.gateway} is missing from {ifname}")
        ways_out = {destination for destination, _ in seen.routes if destination.prefixlen == 0}
        for destination in way.routes:
            # Later plugins of the chain may lead the default route through the gateway of the result (sbr does).
            if destination not in ways_out and (destination, way.gateway) not in seen.routes:
                to = f"the route to {destination}" if destination.prefixlen else "the default route"
                yield Broken(Kind.ROUTE, f"{to} for IPv{destination.version} is missing")


#: Which steps of ADD make it again (``rdmanet.steps``).
_REMEDIES: Mapping[Kind, frozenset[str]] = {
    # With the link goes all that hangs on it; of a device that nothing is left of is seen when the link is back.
    Kind.LINK: frozenset({"link", "filter", "addresses", "endpoint"}),
    Kind.INTERFACE: frozenset({"filter", "addresses"}),
    Kind.ADDRESS: frozenset({"addresses"}),
    Kind.NEIGHBOUR: frozenset({"addresses"}),
    Kind.ROUTE: frozenset({"addresses"}),
    Kind.FILTER: frozenset({"filter"}),
    # What a container gets by its slot has the indexes of the device's GIDs.
    Kind.DEVICE: frozenset({"device", "slot"}),
    Kind.ENTRY: frozenset({"endpoint"}),
}


def plan(broken: Iterable[Broken]) -> frozenset[str]:
    """Names of the steps that are to be done again."""
    found: frozenset[str] = frozenset()
    for one in broken:
        found |= _REMEDIES.get(one.kind, frozenset())
    return found


# The node


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the node has, or should have. ``filters`` has program ids by the link's name, ``uplinks`` the datapath's
    entries by index; the names in ``pins`` and ``slots`` are those of a datapath where all is in its place."""

    links_up: Mapping[str, bool]
    addresses: frozenset[IPAddress]
    routes: frozenset[IPNetwork]
    forwarding: Mapping[str, bool]
    filters: Mapping[str, int | None]
    uplinks: Mapping[int, UplinkEntry]
    node: NodeEntry | None
    missing_pins: frozenset[str] = frozenset()
    empty_slots: frozenset[str] = frozenset()


def broken_node(wanted: NodeFacts, seen: NodeFacts) -> Iterator[Broken]:
    """What of the node is not as the start left it, or no longer as the host is."""
    if seen.missing_pins:
        yield Broken(Kind.PIN, _named("pin", sorted(seen.missing_pins)))
    for name in sorted(seen.empty_slots):
        yield Broken(Kind.PROGRAM, f"the {name} program does not run")
    if wanted.uplinks != seen.uplinks:
        yield Broken(Kind.UPLINK, "the host's uplinks or their addresses have changed")
    missing = [name for name in wanted.links_up if name not in seen.links_up]
    if missing:
        yield Broken(Kind.LINK, f"the link {missing[0]} is missing")
        return
    down = [name for name, up in seen.links_up.items() if not up]
    if down:
        # Addresses and routes go with it.
        yield Broken(Kind.INTERFACE, f"the link {down[0]} is down")
    else:
        yield from _broken_addresses(wanted, seen)
    for family, on in wanted.forwarding.items():
        if seen.forwarding.get(family) != on:
            yield Broken(Kind.FORWARDING, f"{HOST_LINK} does not forward {family}")
    for name, program in wanted.filters.items():
        if seen.filters.get(name) != program:
            yield Broken(Kind.FILTER, f"the filter on {name} is missing")
    if wanted.node != seen.node:
        yield Broken(Kind.ENTRY, "the node's entry in the datapath is missing or wrong")


def _broken_addresses(wanted: NodeFacts, seen: NodeFacts) -> Iterator[Broken]:
    gone = wanted.addresses - seen.addresses
    for address in sorted(gone, key=str):
        yield Broken(Kind.ADDRESS, f"the address {address} is missing from {HOST_LINK}")
    for route in sorted(wanted.routes - seen.routes, key=str):
        if not any(address in route for address in gone):
            yield Broken(Kind.ROUTE, f"the route to {route} through {HOST_LINK} is missing")


def _named(what: str, names: Sequence[str]) -> str:
    """So many names that a line holds them."""
    if len(names) == 1:
        return f"the {what} {names[0]} is missing"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the {what}s {', '.join(names[:3])}{more} are missing"


# What has broken so far


@dataclass(frozen=True, slots=True)
class Done:
    """Something that was done; ``at_s`` of the record's clock, ``number`` counts from the start on."""

    place: int
    kind: Kind
    sentence: str
    outcome: Outcome
    at_s: float
    took_s: float
    name: str = ""
    number: int = 0


class Record:
    """How often what broke, by place (an attachment's id, or ``NODE``) and kind. Thread-safe.

    What has broken ``MOST_BREAKS`` times within ``WINDOW_S`` is given up, until ``forget`` is called for its place.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._breaks: dict[tuple[int, Kind], deque[float]] = {}
        self._given_up: dict[tuple[int, Kind], Done] = {}
        self._open: dict[int, tuple[str, tuple[Broken, ...]]] = {}
        self._done: deque[Done] = deque(maxlen=KEPT)
        self._number = 0
        self._counts: Counter[tuple[Kind, Outcome]] = Counter()

    def broke(self, place: int, name: str, broken: Sequence[Broken]) -> list[Broken]:
        """What was found at a place, called ``name`` for people: counts, and returns what is to be repaired."""
        wanted: dict[Kind, list[Broken]] = {}
        with self._lock:
            self._show(place, name, broken)
            now = self._clock()
            for one in broken:
                if one.repairable and (place, one.kind) not in self._given_up:
                    wanted.setdefault(one.kind, []).append(one)
            for kind, ones in list(wanted.items()):
                if kind is Kind.UPLINK:
                    continue  # the host's own to change, as often as it likes
                times = self._breaks.setdefault((place, kind), deque(maxlen=MOST_BREAKS))
                times.append(now)
                if len(times) == MOST_BREAKS and now - times[0] <= WINDOW_S:
                    sentence = (
                        f"{ones[0].sentence}; it has broken {MOST_BREAKS} times within {WINDOW_S / 60:.0f} minutes"
                    )
                    done = Done(place, kind, sentence, Outcome.GIVEN_UP, now, 0.0, name)
                    self._given_up[place, kind] = self._note(done)
                    del wanted[kind]
        return [one for ones in wanted.values() for one in ones]

    def times(self, place: int, kind: Kind) -> int:
        """How often it has broken within the window."""
        with self._lock:
            now = self._clock()
            return sum(now - at <= WINDOW_S for at in self._breaks.get((place, kind), ()))

    def ended(self, place: int, name: str, broken: Sequence[Broken], outcome: Outcome, took_s: float) -> None:
        """What came of repairing what ``broke`` returned."""
        with self._lock:
            now = self._clock()
            for kind in dict.fromkeys(one.kind for one in broken):
                sentences = "; ".join(one.sentence for one in broken if one.kind is kind)
                self._note(Done(place, kind, sentences, outcome, now, took_s, name))

    def found(self, place: int, name: str, broken: Sequence[Broken]) -> None:
        """What there is at a place now: of that nothing is counted."""
        with self._lock:
            self._show(place, name, broken)

    def _show(self, place: int, name: str, broken: Sequence[Broken]) -> None:
        if broken:
            self._open[place] = name, tuple(broken)
        else:
            self._open.pop(place, None)

    def _note(self, done: Done) -> Done:
        self._number += 1
        noted = replace(done, number=self._number)
        self._done.append(noted)
        self._counts[done.kind, done.outcome] += 1
        return noted

    def forget(self, place: int) -> bool:
        """The attachment is gone, or somebody asks for what was given up; whether something was."""
        with self._lock:
            self._open.pop(place, None)
            for key in [key for key in self._breaks if key[0] == place]:
                del self._breaks[key]
            given_up = [key for key in self._given_up if key[0] == place]
            for key in given_up:
                del self._given_up[key]
            return bool(given_up)

    def given_up(self) -> set[tuple[int, Kind]]:
        """What is left alone."""
        with self._lock:
            return set(self._given_up)

    def left(self, places: Collection[int]) -> list[dict[str, object]]:
        """What of these places is broken or given up, as ``document`` shows it."""
        with self._lock:
            found = {place: one for place, one in self._open.items() if place in places}
            return [
                {"what": name, "kind": str(one.kind), "sentence": one.sentence}
                for _, (name, ones) in sorted(found.items())
                for one in ones
            ]

    def repairs(self) -> dict[tuple[str, str], int]:
        """By kind and outcome, for metrics."""
        with self._lock:
            return {(str(kind), str(outcome)): times for (kind, outcome), times in self._counts.items()}

    def document(self) -> dict[str, object]:
        """For ``GET /v1/status``: what is broken now, what is given up, and what was done lately, newest first."""
        with self._lock:
            now = self._clock()
            return {
                "broken": [
                    {"what": name, "kind": str(one.kind), "sentence": one.sentence}
                    for place, (name, ones) in sorted(self._open.items())
                    for one in ones
                    if (place, one.kind) not in self._given_up
                ],
                "given_up": [_shown(done, now) for _, done in sorted(self._given_up.items())],
                "done": [_shown(done, now) for done in reversed(self._done)],
            }


def _shown(done: Done, now: float) -> dict[str, object]:
    return {
        "number": done.number,
        "what": done.name,
        "kind": str(done.kind),
        "sentence": done.sentence,
        "outcome": str(done.outcome),
        "ago_s": now - done.at_s,
        "took_s": done.took_s,
    }
