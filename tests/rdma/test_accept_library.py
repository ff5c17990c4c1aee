"""The acceptance proof's row about the library, at its smallest, between two pods of an agent."""

from __future__ import annotations

from benchmarks.accept.rdma.library import OPERATIONS, exercise
from benchmarks.peers.namespaces import agent_host, ours
from rdmanet.model import RdmaMode


def test_every_operation_is_checked(rdma_mode: RdmaMode) -> None:
    with agent_host("library") as host, ours(host, "library") as pair:
        done = exercise(pair, rounds=1, datagrams=3)
    connected = {case: found for case, found in done.items() if case.startswith("rc/")}
    assert len(connected) == 12
    assert all(found == dict.fromkeys(OPERATIONS, 1) for found in connected.values())
    assert {case: dict(found) for case, found in done.items() if case not in connected} == {
        "ud/ipv4": {"datagram": 3},
        "ud/ipv6": {"datagram": 3},
    }
