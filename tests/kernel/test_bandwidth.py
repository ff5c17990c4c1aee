"""Limits of pods' kernel traffic, live: UDP and TCP, both ways, both families; kept by restarts, checked and shown."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rdmanet.model import UNLIMITED, Bandwidth, Limit, address_key
from testbed.outside import FAR_IPV4, FAR_IPV6
from testbed.peer import Peer
from testbed.world import Attached, World, config, refused, succeeded

DIRECTIONS = ("egress", "ingress")
VERSIONS = (4, 6)
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
#: So slow that no datagram's room comes back during a test.
SLOW_BITS_PER_S, LEAST_BURST_BITS = 1000, 1 << 20
DATAGRAM_BYTES, DATAGRAMS = 1000, 300
HEADERS_BYTES = {4: 14 + 20 + 8, 6: 14 + 40 + 8}
FAST_BITS_PER_S, FAST_BURST_BITS = 80_000_000, 20_000_000  # the burst is that which it gets when none is asked for
STREAM_BYTES = 8_000_000
WAIT_S = 30.0


@pytest.fixture(scope="module")
def host() -> Iterator[World]:
    with World.start("bandwidth") as world:
        yield world


@pytest.fixture
def world(host: World) -> Iterator[World]:
    """Without the pods of earlier tests."""
    yield host
    succeeded(host.host.cni("GC", None, config({"cni.dev/valid-attachments": []})))


def slow(*directions: str) -> dict[str, Any]:
    """Keys of the network configuration that limit these directions."""
    found: dict[str, Any] = {}
    for direction in directions:
        found |= {f"{direction}Rate": SLOW_BITS_PER_S, f"{direction}Burst": LEAST_BURST_BITS}
    return found


def running(world: World, **conf: Any) -> Attached:
    attached = world.add(**conf)
    attached.pod.start()
    return attached


def name(attached: Attached) -> str:
    return f"default/{attached.pod.name}"


def row(world: World, attached: Attached) -> dict[str, Any]:
    (found,) = [one for one in world.status()["attachments"] if one["pod"] == name(attached)]
    return dict(found)


class Poured:
    """Datagrams from one place to another, and how many of them came."""

    def __init__(self, world: World, source: Peer, sink: Peer, address: str, limited: Attached, reason: str):
        version = 6 if ":" in address else 4
        self.fits = LEAST_BURST_BITS // 8 // (DATAGRAM_BYTES + HEADERS_BYTES[version])
        self.size = DATAGRAM_BYTES + HEADERS_BYTES[version]
        port = sink.ask("sink", address=address)["port"]
        before, self.begun_s = world.drops(name(limited)).get(reason, 0), time.monotonic()
        source.ask("pour", address=address, port=port, size=DATAGRAM_BYTES, count=DATAGRAMS)
        self.dropped = world.drops(name(limited)).get(reason, 0) - before
        self.came = sink.ask("sunk", port=port, datagrams=DATAGRAMS - self.dropped, within_s=WAIT_S)["datagrams"]
        assert self.came + self.dropped == DATAGRAMS

    def most(self) -> int:
        """How many may have come by now: as many as fit into the burst, and what time has brought."""
        return self.fits + 1 + int((time.monotonic() - self.begun_s) * SLOW_BITS_PER_S / 8 / self.size)

    def check(self) -> None:
        """No fewer than fit, either."""
        assert self.fits <= self.came <= self.most()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_datagrams_above_the_burst_are_dropped(world: World, direction: str, version: int) -> None:
    one = running(world, **(slow("egress") if direction == "egress" else {}))
    two = running(world, **(slow("ingress") if direction == "ingress" else {}))
    limited = one if direction == "egress" else two
    peers = {one.pod.name: world.prober("one", one.pod.running), two.pod.name: world.prober("two", two.pod.running)}
    reason = f"bandwidth_{direction}"
    address = two.address(version)
    first = Poured(world, peers[one.pod.name], peers[two.pod.name], address, limited, reason)
    first.check()
    # The bucket is not filled by a start or a repair.
    world.host.kill_agent()
    world.start_agent()
    world.host.api("POST", "/v1/repair")
    again = Poured(world, peers[one.pod.name], peers[two.pod.name], address, limited, reason)
    assert first.came + again.came <= first.most()
    assert f'rdmanet_drops_total{{direction="{"from_pod" if direction == "egress" else "to_pod"}"' in world.host.api(
        "GET", "/metrics"
    )
    # The other direction is not limited.
    other = world.drops(name(limited))
    port = peers[one.pod.name].ask("sink", address=one.address(version))["port"]
    few = DATAGRAMS // 2
    there = {"address": one.address(version), "port": port}
    peers[two.pod.name].ask("pour", **there, size=DATAGRAM_BYTES, count=few)
    assert peers[one.pod.name].ask("sunk", port=port, datagrams=few, within_s=WAIT_S)["datagrams"] == few
    assert world.drops(name(limited)) == other
    # Whoever gets its slot is not limited.
    world.delete(limited)
    three = running(world)
    with world.datapath() as datapath:
        numbers = [entry.attachment_id for entry in datapath.attachments().values()]
        assert [datapath.bandwidth(number) for number in numbers] == [UNLIMITED] * 2
    assert row(world, three)["bandwidth"] == {"ingress": None, "egress": None}


@pytest.mark.parametrize("version", VERSIONS)
def test_from_the_host_and_to_the_outside(world: World, version: int) -> None:
    both = running(world, **slow(*DIRECTIONS))
    assert world.host.outside is not None
    pod, outside = world.prober("pod", both.pod.running), world.prober("outside", world.host.outside)
    host = world.prober("host", world.host)
    Poured(world, pod, outside, FAR[version], both, "bandwidth_egress").check()
    Poured(world, host, pod, both.address(version), both, "bandwidth_ingress").check()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_connection_keeps_to_the_rate(world: World, direction: str, version: int) -> None:
    """It loses packets and no bytes: all come, and no sooner than the rate allows."""
    limits = {f"{direction}Rate": FAST_BITS_PER_S}
    one = running(world, **(limits if direction == "egress" else {}))
    two = running(world, **(limits if direction == "ingress" else {}))
    sink, source = world.traffic("two", two.pod.running), world.traffic("one", one.pod.running)
    port = sink.ask("serve", address=two.address(version))["port"]
    done = source.ask("send", address=two.address(version), port=port, bytes=STREAM_BYTES, verify=True)
    assert done["equal"]
    least_s = (STREAM_BYTES - FAST_BURST_BITS / 8) * 8 / FAST_BITS_PER_S
    assert done["elapsed_s"] >= least_s
    assert world.drops(name(one if direction == "egress" else two))[f"bandwidth_{direction}"] > 0
    mbit_per_s = STREAM_BYTES * 8 / done["elapsed_s"] / 1e6
    print(f"{direction} IPv{version}: {mbit_per_s:.1f} Mbit/s where {FAST_BITS_PER_S / 1e6:g} are allowed")


def test_as_runtimes_ask_for_it(world: World) -> None:
    """Go's names, no burst in mind, and a lower limit of the network itself in one direction."""
    wanted = {"IngressRate": 10**9, "IngressBurst": 2**32 - 1, "EgressRate": 10**8, "EgressBurst": 2**32 - 1}
    attached = world.add(
        capabilities={"bandwidth": True}, runtimeConfig={"bandwidth": wanted}, egressRate=10**7, egressBurst=2**21
    )
    expected = Bandwidth(ingress=Limit(10**9, 31_250_000), egress=Limit(10**7, 2**18))
    assert row(world, attached)["bandwidth"] == {
        "ingress": {"bits_per_s": 10**9, "burst_bytes": 31_250_000},
        "egress": {"bits_per_s": 10**7, "burst_bytes": 2**18},
    }
    with world.datapath() as datapath:
        (entry,) = datapath.attachments().values()
        assert entry.limited
        assert datapath.bandwidth(entry.attachment_id) == expected
        for version in VERSIONS:
            endpoint = datapath.endpoint(address_key(attached.address(version)))
            assert endpoint is not None
            assert endpoint.limited
    succeeded(world.check(attached))
    assert re.search(r"pod-\d+ +eth0 +1 Gbit/s +10 Mbit/s", world.command("status").stdout)
    world.delete(attached)
    refused(
        world.host.cni("ADD", world.pod(), config({"ingressRate": 10**6, "ingressBurst": 80_000})),
        7,
        '"ingressBurst" is 80000 bits; write 1048576 (128 KiB) or more',
    )


def test_check_says_what_is_missing() -> None:
    with World.start("bandwidth-unrepaired", {"agent": {"repair": False}}) as world:
        attached = world.add(**slow(*DIRECTIONS))
        succeeded(world.check(attached))
        with world.datapath() as datapath:
            (entry,) = datapath.attachments().values()
            kept = datapath.bandwidth(entry.attachment_id)
            datapath.set_bandwidth(entry.attachment_id, UNLIMITED)
            refused(world.check(attached), 3, "its bandwidth's limits in the datapath are missing or wrong")
            datapath.set_bandwidth(entry.attachment_id, kept)
        succeeded(world.check(attached))
        world.delete(attached)


def test_limits_that_were_lost_while_no_agent_ran(world: World) -> None:
    """As an older version's programs leave them, which have no such map: entries say that there are some."""
    attached = world.add(**slow(*DIRECTIONS))
    world.host.kill_agent()
    with world.datapath() as datapath:
        (entry,) = datapath.attachments().values()
        kept = datapath.bandwidth(entry.attachment_id)
        assert kept.egress == Limit(SLOW_BITS_PER_S, LEAST_BURST_BITS // 8)
        datapath.set_bandwidth(entry.attachment_id, UNLIMITED)
        world.start_agent()
        assert datapath.bandwidth(entry.attachment_id) == kept
    succeeded(world.check(attached))


def test_they_hold_through_a_swap_of_the_programs(world: World) -> None:
    one, two = running(world, **slow("egress")), running(world)
    source, sink = world.prober("one", one.pod.running), world.prober("two", two.pod.running)
    first = Poured(world, source, sink, two.address(6), one, "bandwidth_egress")
    world.command("datapath", "swap")
    again = Poured(world, source, sink, two.address(6), one, "bandwidth_egress")
    assert first.came + again.came <= first.most()
