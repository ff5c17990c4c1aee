"""Tracked connections for who asks: the table of flows with pods' names and NAT, as lines of JSON.

The table may have a million entries: it is read, described and sent a page at a time, so that a list costs the agent
one page's memory and the loop nothing but sending. What comes or goes meanwhile may be missed or come twice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from itertools import islice
from typing import Any, Protocol

from rdmanet.datapath.flows import CLOSING_BOTH, REPLIED, SERVICE, TRANSLATED, Flow
from rdmanet.errors import ExhaustedError, RequestError
from rdmanet.model import address_of
from rdmanet.monitor import PROTOCOLS, Names, is_called
from rdmanet.tracking import timeout_s

#: Entries of the table in one turn of a thread: some milliseconds.
PAGE_ENTRIES = 512
#: Lists that are being read at a time.
CLIENTS_MAX = 8
_TCP = 6
_NS_PER_S = 1e9


class Flows(Protocol):
    """``rdmanet.datapath.flows.FlowMaps``."""

    @property
    def max_entries(self) -> int: ...
    def all(self) -> Iterator[Flow]: ...


def state(flow: Flow) -> str:
    """For people; which time-out holds follows from it."""
    if flow.protocol == _TCP and flow.closing:
        return "closed" if flow.closing == CLOSING_BOTH else "closing"
    if not flow.flags & REPLIED:
        return "opening"
    return "established" if flow.protocol == _TCP else "replied"


def describe(flow: Flow, names: Mapping[int, tuple[str, str]], now_ns: int) -> dict[str, Any]:
    """The pod's half of a flow. ``source`` is the end that began, ``pod`` whose it is (None: the host's, or outside),
    ``peer`` whose the other end is."""
    begun_by, aimed_at = flow.begun_by, flow.aimed_at
    idle_s = max(0, now_ns - flow.last_seen_ns) / _NS_PER_S
    document: dict[str, Any] = {
        "protocol": PROTOCOLS.get(flow.protocol, str(flow.protocol)),
        "source": _address(begun_by[0]),
        "source_port": int.from_bytes(begun_by[1], "big"),
        "pod": _name(flow.origin, names),
        "destination": _address(aimed_at[0]),
        "destination_port": int.from_bytes(aimed_at[1], "big"),
        "peer": _name(flow.target, names),
        "state": state(flow),
        "age_s": round(max(0, now_ns - flow.created_ns) / _NS_PER_S, 3),
        "idle_s": round(idle_s, 3),
        "expires_s": round(max(0.0, timeout_s(flow) - idle_s), 3),
        "nat": None,
    }
    if flow.flags & TRANSLATED:
        # Of a masqueraded flow what outside sees in the source's place, of a service's what the source has called.
        document["nat"] = "service" if flow.flags & SERVICE else "masquerade"
        document["translated"] = _address(flow.translated)
        document["translated_port"] = int.from_bytes(flow.translated_port, "big")
    return document


class Connections:
    """Lists of tracked connections. Of one event loop; ``names`` (attachment → pod and interface) blocks."""

    def __init__(self, flows: Callable[[], Flows], names: Names, executor: Executor):
        self._flows = flows
        self._names = names
        self._executor = executor
        self._clients = 0

    async def pages(self, words: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
        """Lines, many at a time. The last line says how many flows were listed, and how much of the table is taken.

        ``words`` is the query: pod, as ``rdmanet.monitor.Filter`` has it. Raises RequestError for anything else,
        ExhaustedError for one list too many, BpfError.
        """
        for key in words:
            if key != "pod":
                raise RequestError(f"Flows cannot be filtered by {key}, but by pod.")
        if self._clients >= CLIENTS_MAX:
            raise ExhaustedError(f"{CLIENTS_MAX} lists of flows are being read already, and there can be no more.")
        self._clients += 1
        try:
            pages = self._read(words.get("pod"))
            loop = asyncio.get_running_loop()
            while (page := await loop.run_in_executor(self._executor, next, pages, None)) is not None:
                if page:
                    yield page
        finally:
            self._clients -= 1

    def _read(self, pod: str | None) -> Iterator[bytes]:
        """In threads, one page after another; what is not wanted leaves it empty."""
        names = self._names()
        flows = self._flows()
        wanted = None if pod is None else {number for number, (name, _) in names.items() if is_called(name, pod)}
        entries = listed = 0
        everything = flows.all()
        while page := list(islice(everything, PAGE_ENTRIES)):
            entries += len(page)
            # Outside's halves are told of by the others.
            found = [flow for flow in page if not flow.is_alias]
            if wanted is not None:
                found = [flow for flow in found if flow.origin in wanted or flow.target in wanted]
            listed += len(found)
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            yield b"".join(_line(describe(flow, names, now_ns)) for flow in found)
        yield _line({"flows": listed, "entries": entries, "max_entries": flows.max_entries})


def _name(attachment: int, names: Mapping[int, tuple[str, str]]) -> str | None:
    if not attachment:
        return None
    return names[attachment][0] if attachment in names else f"attachment {attachment}"


def _address(key: bytes) -> str:
    return str(address_of(key))


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"
