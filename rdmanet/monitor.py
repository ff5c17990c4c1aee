"""Drops and new flows for who watches: events of the datapath with pods' names, as lines of JSON.

The programs write events only while somebody watches (``node.monitor``). At most ``EVENTS_PER_S`` are read, so that a
pod whose packets are all dropped costs the agent no more than that: the rest is lost in the ring, counted and said.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rdmanet import background
from rdmanet.datapath.layout import DIRECTIONS
from rdmanet.datapath.maps import Datapath
from rdmanet.datapath.ring import KINDS, Event, Ring
from rdmanet.errors import RdmanetError, RequestError
from rdmanet.model import address_of

log = logging.getLogger(__name__)

BATCH_EVENTS, PAUSE_S = 128, 0.0125
EVENTS_PER_S = int(BATCH_EVENTS / PAUSE_S)
#: Of one client; what comes while it has so many unsent lines is lost to it.
QUEUE_LINES = 8192
CLIENTS_MAX = 16
#: How often losses are said and vanished clients are looked for.
TICK_S = 0.5
VERDICTS = tuple(KINDS.values())
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
HOOKS = {0: "pod", 1: "host", 2: "uplink", 3: "outside", 4: "nodeport", 8: "socket"}  # bpf/hook.h
_TCP_FLAGS = "FSRPAUEC"

Names = Callable[[], Mapping[int, tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Filter:
    """What a client wants; None: everything."""

    pod: str | None = None  # namespace/name, or a name of any namespace; sender or receiver
    reason: str | None = None
    verdict: str | None = None

    @classmethod
    def of(cls, words: Mapping[str, str], reasons: Sequence[str]) -> Filter:
        """From a query. Raises RequestError for what cannot be."""
        for key in words:
            if key not in ("pod", "reason", "verdict"):
                raise RequestError(f"Events cannot be filtered by {key}, but by pod, reason and verdict.")
        made = cls(words.get("pod"), words.get("reason"), words.get("verdict"))
        if made.verdict is not None and made.verdict not in VERDICTS:
            raise RequestError(f"A verdict is {' or '.join(VERDICTS)}, not {made.verdict}.")
        if made.reason is not None and made.reason not in reasons:
            raise RequestError(f"There is no drop reason {made.reason}; there are {', '.join(reasons)}.")
        return made

    def wants(self, document: Mapping[str, Any]) -> bool:
        """Whether an event is for this client."""
        if self.verdict is not None and document["verdict"] != self.verdict:
            return False
        if self.reason is not None and document.get("reason") != self.reason:
            return False
        if self.pod is None:
            return True
        return any(name is not None and is_called(name, self.pod) for name in (document["pod"], document["peer"]))


def is_called(name: str, wanted: str) -> bool:
    """Whether a pod's whole name (namespace/name) is what somebody has asked for: that, or the name alone."""
    return wanted in (name, name.partition("/")[2])


@dataclass(eq=False, slots=True)
class Watcher:
    """One client's lines."""

    filter: Filter
    lines: deque[bytes] = field(default_factory=deque)
    lost: int = 0
    ended: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, line: bytes) -> None:
        """Adds a line, or counts it as lost where there is no room."""
        if len(self.lines) >= QUEUE_LINES:
            self.lost += 1
        else:
            self.lines.append(line)
        self.ready.set()

    async def take(self, timeout_s: float) -> bytes:
        """What there is, or nothing after so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.ready.wait()
        self.ready.clear()
        taken = b"".join(self.lines)
        self.lines.clear()
        if self.lost:
            taken += _line({"lost": self.lost})
            self.lost = 0
        return taken


class Monitor:
    """Reads the ring while there is a watcher. Of one event loop; ``names`` (attachment → pod and interface) blocks."""

    def __init__(self, datapath: Datapath, names: Names, executor: Executor):
        self._datapath = datapath
        self._read_names = names
        self._executor = executor
        self._names: dict[int, tuple[str, str]] = {}
        self._watchers: set[Watcher] = set()
        self._changing = asyncio.Lock()
        self._ring: Ring | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._tick: asyncio.Task[None] | None = None
        self._lost = 0
        self._wall_ns = 0
        self._waiting: list[Event] = []
        self._naming: asyncio.Task[None] | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Names of all drop reasons."""
        return self._datapath.drop_reasons

    async def join(self, wanted: Filter) -> Watcher:
        """A new watcher; with the first one the programs begin to show events. Raises RequestError for one too many."""
        async with self._changing:
            if len(self._watchers) >= CLIENTS_MAX:
                raise RequestError(f"{CLIENTS_MAX} clients watch events already, and there can be no more.")
            if self._ring is None:
                await self._begin()
            watcher = Watcher(wanted)
            self._watchers.add(watcher)
            return watcher

    async def leave(self, watcher: Watcher) -> None:
        """The watcher has gone; with the last one the programs show nothing any more. Idempotent."""
        async with self._changing:
            self._watchers.discard(watcher)
            if not self._watchers and self._ring is not None:
                await self._end()

    def stop(self) -> None:
        """Ends all watchers: the agent stops."""
        for watcher in self._watchers:
            watcher.ended = True
            watcher.ready.set()

    async def _begin(self) -> None:
        ring = await self._blocking(self._datapath.events.open)
        try:
            await self._blocking(ring.skip)
            self._names = dict(await self._blocking(self._read_names))
            self._lost = self._datapath.events.lost()
            await self._blocking(self._show, True)
        except BaseException:
            ring.close()
            raise
        self._listen(ring)
        self._tick = background.begin(self._watch(), "watch on the ring of events")

    async def _end(self) -> None:
        await self._blocking(self._show, False)
        for task in (self._tick, self._naming):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        self._tick = self._naming = None
        self._waiting.clear()
        self._unlisten()

    def _show(self, on: bool) -> None:
        self._datapath.change_node(lambda node: replace(node, monitor=on))

    def _listen(self, ring: Ring) -> None:
        self._ring = ring
        self._wall_ns = time.time_ns() - time.monotonic_ns()
        self._turn()

    def _unlisten(self) -> None:
        assert self._ring is not None
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        asyncio.get_running_loop().remove_reader(self._ring.fileno())
        self._ring.close()
        self._ring = None

    def _turn(self) -> None:
        """One batch; then a pause, or what wakes when the next event comes."""
        loop = asyncio.get_running_loop()
        assert self._ring is not None
        self._pause = None
        loop.remove_reader(self._ring.fileno())
        found = self._ring.read(BATCH_EVENTS)
        self._take(found)
        if found:
            self._pause = loop.call_later(PAUSE_S, self._turn)
        else:
            loop.add_reader(self._ring.fileno(), self._turn)

    def _take(self, events: Sequence[Event]) -> None:
        if self._naming is not None:  # in order
            self._waiting += events
            return
        for place, event in enumerate(events):
            if any(number and number not in self._names for number in (event.attachment, event.peer)):
                self._waiting += events[place:]
                self._naming = background.begin(self._learn(), "names of the monitor")
                return
            self._send(event)

    async def _learn(self) -> None:
        """Somebody new: pods that have gone keep their names as long as somebody watches."""
        try:
            self._names.update(await self._blocking(self._read_names))
        except RdmanetError as error:
            log.error("Pods' names cannot be read, and events go without: %s", error)
        waiting, self._waiting = self._waiting, []
        self._naming = None
        for event in waiting:
            for number in (event.attachment, event.peer):
                if number:
                    self._names.setdefault(number, (f"attachment {number}", ""))
            self._send(event)

    def _send(self, event: Event) -> None:
        document = self.describe(event)
        line = b""
        for watcher in self._watchers:
            if watcher.filter.wants(document):
                line = line or _line(document)
                watcher.put(line)

    def describe(self, event: Event) -> dict[str, Any]:
        """The event as clients get it."""
        pod, interface = self._names.get(event.attachment, (None, None))
        document: dict[str, Any] = {
            "time_s": round((event.time_ns + self._wall_ns) / 1e9, 6),
            "verdict": KINDS.get(event.kind, f"event_{event.kind}"),
            "pod": pod,
            "interface": interface,
            "peer": self._names.get(event.peer, (None, None))[0],
            "direction": DIRECTIONS[event.direction],
            "hook": HOOKS.get(event.hook, f"hook_{event.hook}"),
            "bytes": event.frame_bytes,
        }
        if document["verdict"] == "dropped":
            known = 0 < event.reason <= len(self.reasons)
            document["reason"] = self.reasons[event.reason - 1] if known else f"reason_{event.reason}"
        if event.ethertype:
            document["protocol"] = PROTOCOLS.get(event.protocol, str(event.protocol))
            document["source"] = _address(event.source)
            document["source_port"] = event.source_port
            document["destination"] = _address(event.destination)
            document["destination_port"] = event.destination_port
            if event.protocol == 6:
                document["tcp_flags"] = "".join(
                    letter for bit, letter in enumerate(_TCP_FLAGS) if event.tcp_flags & 1 << bit
                )
        if any(event.translated):
            document["translated"] = _address(event.translated)
            document["translated_port"] = event.translated_port
        return document

    async def _watch(self) -> None:
        """Says what was lost, and follows the programs to a new ring."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                lost = self._datapath.events.lost()
                if lost > self._lost:
                    line = _line({"lost": lost - self._lost})
                    for watcher in self._watchers:
                        watcher.put(line)
                self._lost = lost
                ring = self._ring
                if ring is not None and not self._datapath.events.is_current(ring):
                    while found := ring.read(BATCH_EVENTS):
                        self._take(found)
                    following = self._datapath.events.open()
                    self._unlisten()
                    self._listen(following)
            except RdmanetError as error:
                log.error("Events cannot be followed: %s", error)

    async def _blocking(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)


def _address(key: bytes) -> str | None:
    return str(address_of(key)) if any(key) else None


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"
