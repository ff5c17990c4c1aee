"""A pod that floods the agent: others' messages, ADDs and DELs go on, and what is refused is counted.

No RDMA is needed: leases are asked for and refused. How long others wait is measured by `make accept` (isolation).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from rdmanet.lease import PROTOCOL_VERSION
from testbed import adversary
from testbed.peer import Peer
from testbed.world import World

#: A pod's share is a message in each round of the agent's loop; an answer takes a few rounds, and reading and writing
#: in between. Out of turn a flood gets a thousand messages in at a time.
MOST_PER_ANSWER = 100
ROUND_TRIPS = 30


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("flood", outside=False) as world:
        yield world


@pytest.fixture(scope="module")
def peers(world: World) -> dict[str, Peer]:
    """A program in each of two pods."""
    found = {}
    for name in ("victim", "adversary"):
        pod = world.add(world.pod(name)).pod.start()
        argv = [sys.executable, "-I", "-S", "-E", adversary.__file__, str(PROTOCOL_VERSION)]
        found[name] = Peer.start(f"flood-{name}", pod.popen, argv)
        world.peers.append(found[name])
    return found


def metric(world: World, name: str, label: str) -> float:
    """A counter's value, 0 before the first."""
    for line in world.host.api("GET", "/metrics").splitlines():
        if line.startswith(f"{name}{{{label}}}"):
            return float(line.split()[-1])
    return 0.0


def converse(peer: Peer, times: int) -> None:
    """Opens a line, speaks so often and is answered each time."""
    peer.ask("dial", line="line")
    answer = peer.ask("say", line="line", message={"type": "hello", "id": 1, "version": PROTOCOL_VERSION})["answer"]
    assert answer["type"] == "reply"
    for number in range(2, times + 2):
        message = {"type": "unlisten", "id": number, "service": "none"}
        assert peer.ask("say", line="line", message=message)["answer"]["type"] == "reply"
    peer.ask("hang_up", line="line")


@pytest.mark.parametrize("kind", sorted(adversary.FLOODS.keys() - {"nothing"}))
def test_others_are_served_during_a_flood(world: World, peers: dict[str, Peer], kind: str) -> None:
    peers["adversary"].ask("flood_begin", kind=kind, processes=2)
    try:
        converse(peers["victim"], ROUND_TRIPS)
        world.delete(world.add())
    finally:
        assert peers["adversary"].ask("flood_end")["done"] > 0
    # And so is the pod itself, when it has come to its senses.
    converse(peers["adversary"], 1)
    assert "Traceback" not in (world.host.agent.log if world.host.agent else "")


def test_a_flood_of_requests_gets_its_share_and_no_more(world: World, peers: dict[str, Peer]) -> None:
    def refused() -> float:
        return metric(world, "rdmanet_leases_refused_total", 'reason="no_device"')

    peers["adversary"].ask("flood_begin", kind="requests", processes=4)
    try:
        before = refused()
        converse(peers["victim"], ROUND_TRIPS)
        during = refused() - before
    finally:
        peers["adversary"].ask("flood_end")
    assert 0 < during < MOST_PER_ANSWER * ROUND_TRIPS


@pytest.mark.parametrize(("kind", "cause"), [("half_open", "too_many"), ("pings", "protocol"), ("unread", "unread")])
def test_what_is_dropped_is_counted(world: World, peers: dict[str, Peer], kind: str, cause: str) -> None:
    def dropped() -> float:
        return metric(world, "rdmanet_lease_connections_dropped_total", f'cause="{cause}"')

    before = dropped()
    peers["adversary"].ask("flood_begin", kind=kind, processes=2)
    try:
        for _ in range(200):
            if dropped() > before:
                break
            converse(peers["victim"], 5)
    finally:
        peers["adversary"].ask("flood_end")
    assert dropped() > before
