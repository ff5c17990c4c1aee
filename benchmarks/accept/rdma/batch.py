"""Row `batch`: what each of 64 queue pairs by one connect costs, beside rdma_cm between the same two pods.

In turn with rdmacm-utils' cmtime, as the bench's question `lease` has it; that one counts instructions, this one takes
the time on all processors, and the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.peers import rdma_cm
from benchmarks.peers.namespaces import End, Pair, agent_host, ours
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import Figure, need

BATCH = 64
ROUNDS = 15
#: Ratio to rdma_cm that the issue asks for.
GOAL = 1.0


@contextlib.contextmanager
def library(end: End, place: str) -> Iterator[Peer]:
    """benchmarks.peers.library in a pod."""
    argv = [sys.executable, "-m", "benchmarks.peers.library"]
    with Peer.start(f"{place}-{end.pod.name}", end.pod.popen, argv, cwd=str(REPOSITORY)) as peer:
        peer.ask("hello")
        yield peer


def in_turn(pair: Pair, connections: int, ours_us: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds per queue pair of ours and of rdma_cm, a round after another, each of them first in every other."""
    leased: list[float] = []
    connected: list[float] = []
    for number in range(rounds):
        for ours_first in (number % 2 == 0, number % 2 == 1):
            if ours_first:
                leased.append(ours_us())
            else:
                connected.append(rdma_cm.ready_us(pair, connections))
    return leased, connected


def ratio(leased: list[float], connected: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(ours / theirs for ours, theirs in zip(leased, connected, strict=True))


def lease_batch(pair: Pair, client: Peer, server: Peer, service: str, *, small: bool) -> float:
    """Microseconds per queue pair of a batch, which is given back."""
    target = f"{pair.server.pod.name}:{service}"
    try:
        return float(client.ask("lease", target=target, count=BATCH, fresh=False, small=small)["each_us"])
    finally:
        client.ask("drop")
        server.ask("drop")


def measure(rounds: int = ROUNDS) -> Figure:
    """64 queue pairs by one connect, with the queues that cmtime asks for and with the library's own."""
    found = {}
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(ours(stack.enter_context(agent_host("batch")), "batch"))
        server, client = (stack.enter_context(library(end, "batch")) for end in (pair.server, pair.client))
        for service, small in (("small", True), ("usual", False)):
            server.ask("hold", service=service, small=small)
            cost_us = partial(lease_batch, pair, client, server, service, small=small)
            cost_us()  # pyverbs is imported, the device opened
            found[service] = in_turn(pair, BATCH, cost_us, rounds)
    ratios = {service: ratio(*samples) for service, samples in found.items()}
    leased, connected = ({s: statistics.median(samples[way]) for s, samples in found.items()} for way in (0, 1))
    need(
        max(ratios.values()) < GOAL,
        f"a queue pair of a batch of {BATCH} costs {ratios['small']:.2f} of an rdma_cm connection with its queues, "
        f"{ratios['usual']:.2f} with the library's",
    )
    detail = (
        f"of rdma_cm, per queue pair of {BATCH}: {leased['small']:.0f} µs against {connected['small']:.0f} with "
        f"cmtime's queues; {ratios['usual']:.2f} with the library's own, {leased['usual']:.0f} µs"
    )
    more = {service: {"leased_us": samples[0], "rdma_cm_us": samples[1]} for service, samples in found.items()}
    return Figure(ratios["small"], "times", detail, more)
