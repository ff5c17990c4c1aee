"""`rdmanet flows`: what is open between pods, host and outside is listed as both ends see it; large tables, stalled
readers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rdmanet.connections import PAGE_ENTRIES, Connections
from rdmanet.datapath import bpf, tables
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.flows import NO_SLOT, key_of
from rdmanet.datapath.maps import Datapath
from rdmanet.model import address_key
from testbed.host import ARTIFACT, SOCKET
from testbed.outside import FAR_IPV4, FAR_IPV6, GATEWAY_IPV4, GATEWAY_IPV6
from testbed.services import CLUSTER_IP, NODE, NODE_PORT, PORT, TARGET_PORT, Scene, service, slices
from testbed.watching import until, watching
from testbed.world import PINS

FAR = {4: FAR_IPV4, 6: FAR_IPV6}
#: Where servers that listen on every address answer from.
GATEWAY = {4: GATEWAY_IPV4, 6: GATEWAY_IPV6}
HOST = {4: "10.213.0.1", 6: "fd72:646d:616e::1"}
ECHO = {4: "icmp", 6: "icmpv6"}
MAX_FLOWS = 262144
MANY = 200_000
PAGES = 80

Flow = dict[str, Any]
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    with Scene.start("flows", ("one", "two"), {"tracking": {"max_flows": MAX_FLOWS}}) as scene:
        for place in ("outside", "host"):
            scene.ask(place, "serve", name=place, port=TARGET_PORT)
        yield scene


def listed(scene: Scene, *words: str) -> list[Flow]:
    """`rdmanet flows -o json`."""
    found: list[Flow] = json.loads(scene.command("flows", "-o", "json", *words))["flows"]
    return found


def opened(scene: Scene, place: str, kind: str, address: str, port: int = TARGET_PORT) -> tuple[str, str, int]:
    """A call that stays open, which has been answered: its id, and the client as the server saw it."""
    name = str(next(numbers))
    scene.ask(place, "open", id=name, kind=kind, address=address, port=port)
    said = scene.ask(place, "say", id=name)
    assert not said["refused"], said
    return name, *said["seen"]


def of(flows: list[Flow], **wanted: Any) -> Flow:
    """The one with these values."""
    found = [flow for flow in flows if all(flow[key] == value for key, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} flows with {wanted} in {flows}"
    return found[0]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_between_pods_and_with_the_host(scene: Scene, kind: str, version: int) -> None:
    one, two = (scene.addresses[name][version] for name in ("one", "two"))
    calls = {
        ("one", "two"): opened(scene, "one", kind, two),
        ("one", "host"): opened(scene, "one", kind, HOST[version]),
        ("host", "two"): opened(scene, "host", kind, two),
    }
    addresses = {"one": one, "two": two, "host": HOST[version]}
    flows = listed(scene)
    for (begins, ends), (_, seen, port) in calls.items():
        flow = of(flows, protocol=kind, source_port=port, destination=addresses[ends])
        assert flow["source"] == seen
        assert seen == addresses[begins]
        assert flow["destination_port"] == TARGET_PORT
        assert flow["pod"] == (None if begins == "host" else f"default/{begins}")
        assert flow["peer"] == (None if ends == "host" else f"default/{ends}")
        assert (flow["nat"], flow["state"]) == (None, "established" if kind == "tcp" else "replied")
        assert 0 <= flow["idle_s"] <= flow["age_s"]
        assert flow["expires_s"] > 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_masqueraded_flows_have_the_end_that_outside_sees(scene: Scene, kind: str, version: int) -> None:
    _, address, port = opened(scene, "one", kind, GATEWAY[version])
    flow = of(listed(scene), protocol=kind, destination=GATEWAY[version], translated_port=port)
    assert (flow["source"], flow["pod"]) == (scene.addresses["one"][version], "default/one")
    assert (flow["peer"], flow["nat"], flow["translated"]) == (None, "masquerade", address)
    assert address == NODE[version]


@pytest.mark.parametrize("version", [4, 6])
def test_echo(scene: Scene, version: int) -> None:
    scene.pods["two"].exec(["ping", "-c", "1", "-W", "10", FAR[version]])
    flow = of(listed(scene), protocol=ECHO[version])
    assert (flow["source"], flow["pod"]) == (scene.addresses["two"][version], "default/two")
    assert (flow["nat"], flow["translated"], flow["state"]) == ("masquerade", NODE[version], "replied")
    # The identifier, at the end that asks.
    assert flow["source_port"] > 0
    assert flow["destination_port"] == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_services(scene: Scene, kind: str, version: int) -> None:
    """A NodePort's has what the client has called; a ClusterIP is none of the table's: the socket knows the backend."""
    scene.put(service(node_port=NODE_PORT), *slices(scene.of("two")))
    two = scene.addresses["two"][version]
    _, client, port = opened(scene, "outside", kind, NODE[version], NODE_PORT)
    flow = of(listed(scene), protocol=kind, source=client, source_port=port)
    assert (flow["destination"], flow["destination_port"], flow["peer"]) == (two, TARGET_PORT, "default/two")
    assert (flow["pod"], flow["nat"]) == (None, "service")
    assert (flow["translated"], flow["translated_port"]) == (NODE[version], NODE_PORT)
    _, client, port = opened(scene, "one", kind, CLUSTER_IP[version], PORT)
    flow = of(listed(scene), protocol=kind, source=client, source_port=port)
    assert (flow["destination"], flow["destination_port"], flow["nat"]) == (two, TARGET_PORT, None)


def test_a_connection_that_ends_is_closed(scene: Scene) -> None:
    name, _, port = opened(scene, "one", "tcp", scene.addresses["two"][4])
    scene.ask("one", "close", id=name)
    until(
        lambda: of(listed(scene, "--pod", "one"), source_port=port, protocol="tcp")["state"] == "closed",
        "the connection is not closed",
    )


def test_by_pod_and_for_people(scene: Scene) -> None:
    _, _, port = opened(scene, "host", "tcp", scene.addresses["two"][6])
    opened(scene, "one", "tcp", HOST[4])
    for name in ("two", "default/two"):
        flows = listed(scene, "--pod", name)
        assert of(flows, source_port=port)
        assert all("default/two" in (flow["pod"], flow["peer"]) for flow in flows)
    assert listed(scene, "--pod", "nobody") == []
    lines = scene.command("flows", "--pod", "two").splitlines()
    assert lines[0].split() == ["PROTOCOL", "FROM", "TO", "NAT", "STATE", "IDLE"]
    assert any(f":{port} " in line and f"[{scene.addresses['two'][6]}]:8080 (default/two)" in line for line in lines)
    assert f"of {MAX_FLOWS} entries of the table are taken" in lines[-1]


@contextlib.contextmanager
def datapath(scene: Scene) -> Iterator[Datapath]:
    """The host's pinned maps, from this process."""
    with Datapath.open(Artifact.load(ARTIFACT), scene.host.path(PINS), {"flows": MAX_FLOWS}) as opened:
        yield opened


def fill(scene: Scene, count: int) -> None:
    """Enters flows of pod one as the programs do, all in one call."""
    now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    attachments = scene.host.api("GET", "/v1/status")["attachments"]
    number = next(one["id"] for one in attachments if one["pod"] == "default/one")
    own, far = address_key(scene.addresses["one"][4]), address_key(FAR_IPV4)
    value = tables.FLOW.pack(now_ns, now_ns, bytes(16), number, 0, NO_SLOT, 0, bytes(2), 0, 0)
    keys = b"".join(
        key_of((own, struct.pack("!H", 1 + at % 50000)), (far, struct.pack("!H", 1 + at // 50000)), 17)
        for at in range(count)
    )
    descriptor = bpf.get(scene.host.path(PINS) / "flows")
    assert descriptor is not None
    try:
        bpf.update_batch(descriptor, keys, value * count, count)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def asking(scene: Scene, path: str) -> Iterator[socket.socket]:
    """A client that has sent its request and not read anything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(scene.host.path(SOCKET)))
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert sock.recv(1, socket.MSG_PEEK)
        yield sock


def test_a_large_table_keeps_nobody_waiting(scene: Scene) -> None:
    fill(scene, MANY)
    with asking(scene, "/v1/flows") as sock:
        # It stands in the middle, and does not read: others are answered.
        assert scene.host.api("GET", "/v1/status")["attachments"]
        others = len(listed(scene, "--pod", "two"))
        sock.settimeout(60)
        answered = lines = 0
        rest = b""
        while data := sock.recv(1 << 20):
            lines += data.count(b"\n")
            rest = (rest + data)[-1000:]
            if lines // 10000 > answered:
                scene.host.api("GET", "/v1/status")
                answered += 1
    summary = json.loads(rest.splitlines()[-1])
    assert summary["flows"] >= MANY + others
    assert lines > summary["flows"]
    assert answered >= MANY // 10000


def test_a_list_takes_a_pages_memory(scene: Scene) -> None:
    """Here, where nothing else takes any."""

    async def read(opened: Datapath) -> int:
        size = 0
        with ThreadPoolExecutor(1) as executor:
            pages = Connections(lambda: opened.flows, dict, executor).pages({})
            for _ in range(PAGES):
                size += len(await anext(pages))
            await pages.aclose()
        return size

    with datapath(scene) as opened:
        tracemalloc.start()
        try:
            size = asyncio.run(read(opened))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert size > 200 * PAGES * PAGE_ENTRIES
    assert peak < size / 3


def test_clients_that_do_not_read_do_not_hold_up_the_agents_end(scene: Scene) -> None:
    """Last: the agent ends. A handler that waits for its client would be given a minute."""
    assert scene.host.agent is not None
    with (
        asking(scene, "/v1/flows") as flows,
        watching(scene.host) as watch,
        asking(scene, "/v1/monitor") as events,
    ):
        # More than fits between agent and client.
        scene.ask("one", "many", kind="udp", address=scene.addresses["two"][4], port=TARGET_PORT, count=3000)
        watch.wait(lambda found: len(found) >= 3000, "flows are not shown")
        scene.host.agent.process.signal(signal.SIGTERM)
        assert watch.ended_within(20)
        for sock in (flows, events):
            sock.settimeout(20)
            with contextlib.suppress(ConnectionError):
                while sock.recv(1 << 20):
                    pass
        assert scene.host.stop_agent() == 0
