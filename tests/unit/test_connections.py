"""What `rdmanet flows` is made of: entries of the table as documents, read page by page, and as people see them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rdmanet.commands.flows import as_json, as_table
from rdmanet.connections import CLIENTS_MAX, PAGE_ENTRIES, Connections, describe, state
from rdmanet.datapath.flows import REPLIED, Flow
from rdmanet.errors import BpfError, ExhaustedError, RequestError, UnavailableError
from tests.unit.test_tracking import ICMP, ONE, OTHER_POD, POD, TCP, TWO, UDP, flow, masqueraded, served

NAMES = {POD: ("jobs/train-0", "eth0"), OTHER_POD: ("default/web", "eth0")}


class Table:
    """Entries in memory; says how many have been read."""

    max_entries = 1000

    def __init__(self, *entries: Flow, fails_after: int | None = None):
        self._entries = entries
        self._fails_after = fails_after
        self.reads = 0

    def all(self) -> Iterator[Flow]:
        for entry in self._entries:
            if self.reads == self._fails_after:
                raise BpfError("The kernel refused an eBPF operation.", operation="BPF_MAP_LOOKUP_BATCH")
            self.reads += 1
            yield entry


def run(table: Table, work: Callable[[Connections], Any]) -> Any:
    async def main() -> Any:
        with ThreadPoolExecutor(2) as executor:
            return await work(Connections(lambda: table, lambda: NAMES, executor))

    return asyncio.run(main())


def pages(table: Table, **words: str) -> list[bytes]:
    async def work(connections: Connections) -> list[bytes]:
        return [page async for page in connections.pages(words)]

    found: list[bytes] = run(table, work)
    return found


def documents(table: Table, **words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for page in pages(table, **words) for line in page.splitlines()]


@pytest.mark.parametrize(
    ("protocol", "flags", "closing", "word"),
    [
        (TCP, 0, 0, "opening"),
        (TCP, REPLIED, 0, "established"),
        (TCP, REPLIED, 1, "closing"),
        (TCP, REPLIED, 2, "closing"),
        (TCP, REPLIED, 3, "closed"),
        (UDP, 0, 0, "opening"),
        (UDP, REPLIED, 0, "replied"),
        (ICMP, REPLIED, 0, "replied"),
    ],
)
def test_states(protocol: int, flags: int, closing: int, word: str) -> None:
    assert state(flow(ONE, TWO, protocol, flags=flags, closing=closing)) == word


@pytest.mark.parametrize(("begun", "aimed"), [(ONE, TWO), (TWO, ONE)])
def test_the_source_is_the_end_that_began(begun: tuple[str, int], aimed: tuple[str, int]) -> None:
    entry = flow(begun, aimed, origin=OTHER_POD, target=POD)
    found = describe(entry, NAMES, entry.last_seen_ns + 40_000_000_000)
    assert (found["source"], found["source_port"], found["pod"]) == (*begun, "default/web")
    assert (found["destination"], found["destination_port"], found["peer"]) == (*aimed, "jobs/train-0")
    assert (found["idle_s"], found["expires_s"], found["nat"]) == (40, 7400, None)
    assert "translated" not in found


def test_nat() -> None:
    now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    out = describe(masqueraded()[0], NAMES, now_ns)
    assert (out["nat"], out["translated"], out["translated_port"]) == ("masquerade", "192.0.2.1", 61000)
    assert (out["pod"], out["peer"]) == ("jobs/train-0", None)
    come_in = describe(served()[0], NAMES, now_ns)
    assert (come_in["nat"], come_in["translated"], come_in["translated_port"]) == ("service", "192.0.2.1", 30080)
    assert (come_in["pod"], come_in["peer"], come_in["destination"]) == (None, "jobs/train-0", "10.0.0.5")


def test_both_halves_are_one_flow_and_two_entries() -> None:
    *found, numbers = documents(Table(*masqueraded(), *served(), flow(ONE, TWO, target=OTHER_POD)))
    assert len(found) == 3
    assert numbers == {"flows": 3, "entries": 5, "max_entries": 1000}


@pytest.mark.parametrize(
    ("wanted", "protocols"),
    [("train-0", ["tcp", "udp"]), ("jobs/train-0", ["tcp", "udp"]), ("web", ["tcp", "icmp"]), ("jobs/web", [])],
)
def test_by_pod(wanted: str, protocols: list[str]) -> None:
    table = Table(
        flow(ONE, TWO, TCP, origin=POD, target=OTHER_POD),
        flow(ONE, TWO, UDP, origin=0, target=POD),
        flow(ONE, TWO, ICMP, origin=OTHER_POD, target=0),
    )
    *found, numbers = documents(table, pod=wanted)
    assert [one["protocol"] for one in found] == protocols
    assert (numbers["flows"], numbers["entries"]) == (len(protocols), 3)


def test_a_pod_that_has_gone_has_a_number() -> None:
    (found, _) = documents(Table(flow(ONE, TWO, origin=99, target=POD)))
    assert (found["pod"], found["peer"]) == ("attachment 99", "jobs/train-0")


def test_the_table_is_read_as_far_as_the_list_is() -> None:
    table = Table(*[flow(("10.0.0.5", port), TWO, UDP) for port in range(10 * PAGE_ENTRIES)])

    async def work(connections: Connections) -> None:
        read = connections.pages({})
        for number in range(1, 4):
            assert len((await anext(read)).splitlines()) == PAGE_ENTRIES
            assert table.reads == number * PAGE_ENTRIES
        await read.aclose()

    run(table, work)
    assert len(documents(table)) == 10 * PAGE_ENTRIES + 1


def test_other_words_and_too_many_lists_are_refused() -> None:
    with pytest.raises(RequestError, match="cannot be filtered by reason"):
        pages(Table(), reason="multicast")

    async def work(connections: Connections) -> None:
        opened = [connections.pages({}) for _ in range(CLIENTS_MAX)]
        for one in opened:
            await anext(one)
        with pytest.raises(ExhaustedError, match="8 lists of flows are being read already"):
            await anext(connections.pages({}))
        for one in opened:
            await one.aclose()
        await anext(connections.pages({}))

    run(Table(flow(ONE, TWO)), work)


def test_what_the_kernel_refuses_is_raised() -> None:
    with pytest.raises(BpfError):
        pages(Table(flow(ONE, TWO), flow(TWO, ONE), fails_after=1))


# For people


def lines(*found: Mapping[str, Any]) -> Iterator[bytes]:
    return iter([json.dumps(one).encode() + b"\n" for one in found])


def all_of(*entries: Flow) -> list[dict[str, Any]]:
    now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    found = [describe(entry, NAMES, max(now_ns, entry.last_seen_ns)) for entry in entries]
    return [*found, {"flows": len(found), "entries": 5, "max_entries": 1000}]


def test_a_table() -> None:
    six = flow(("fd00::5", 4000), ("fd00::6", 80), UDP, target=OTHER_POD, flags=0)
    found = "".join(as_table(lines(*all_of(masqueraded(idle_s=7)[0], served()[0], six)))).splitlines()
    assert [" ".join(line.split()) for line in found] == [
        "PROTOCOL FROM TO NAT STATE IDLE",
        "tcp 10.0.0.5:4000 (jobs/train-0) 198.51.100.9:80 as 192.0.2.1:61000 established 7s",
        "tcp 198.51.100.9:5000 10.0.0.5:8080 (jobs/train-0) called 192.0.2.1:30080 established 0s",
        "udp [fd00::5]:4000 (jobs/train-0) [fd00::6]:80 (default/web) - opening 0s",
        "3 flows; 5 of 1000 entries of the table are taken",
    ]
    assert found[0].index("STATE") == found[1].index("established") == found[3].index("opening")


@pytest.mark.parametrize("entries", [(), (flow(ONE, TWO),), masqueraded() + served()])
def test_json(entries: tuple[Flow, ...]) -> None:
    *flows, numbers = all_of(*entries)
    found = json.loads("".join(as_json(lines(*flows, numbers))))
    assert found == {"flows": flows, "entries": 5, "max_entries": 1000}


@pytest.mark.parametrize("form", [as_json, as_table])
def test_half_a_list_is_no_list(form: Callable[[Iterator[bytes]], Iterator[str]]) -> None:
    with pytest.raises(UnavailableError, match="not whole"):
        list(form(lines(*all_of(flow(ONE, TWO))[:-1])))
    with pytest.raises(UnavailableError, match="map is gone"):
        list(form(lines(*all_of(flow(ONE, TWO))[:-1], {"error": "The map is gone."})))
