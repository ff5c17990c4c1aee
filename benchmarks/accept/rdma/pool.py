"""Row `pool`: what a full pool takes to hand out a queue pair, beside an rdma_cm connect between the same two pods; and
how it comes back after its peer's process was killed."""

from __future__ import annotations

import statistics
import time

from benchmarks.accept.rdma.batch import in_turn, library, ratio
from benchmarks.peers.namespaces import agent_host, ours
from testbed.rows import Figure, need

ROUNDS = 15
SIZE = 16
#: How long the peer may take to be back, imports in an emulated machine included.
TIMEOUT_S = 140.0
#: Ratio to rdma_cm that the issue asks for.
GOAL = 0.1


def measure(rounds: int = ROUNDS) -> Figure:
    """What a full pool takes to hand a queue pair out; and how it comes back after the peer's process was killed."""
    with agent_host("pool") as host, ours(host, "pool") as pair, library(pair.client, "pool") as client:
        target = f"{pair.server.pod.name}:pooled"
        with library(pair.server, "pool") as server:
            server.ask("serve", service="pooled")
            client.ask("pool", target=target, size=SIZE)

            def warm_us() -> float:
                return float(statistics.median(client.ask("warm", count=SIZE)["each_us"]))

            warm, connected = in_turn(pair, 1, warm_us, rounds)
            client.ask("ask", within_s=TIMEOUT_S)
        # Its process is gone, and another one comes.
        with library(pair.server, "pool-again") as server:
            server.ask("serve", service="pooled")
            began = time.monotonic()
            client.ask("ask", within_s=TIMEOUT_S)
            back_s = time.monotonic() - began
            found = client.ask("statistics")
    need(found["lost"] >= SIZE, f"the pool lost {found['lost']} queue pairs of a process that has ended")
    figure = ratio(warm, connected)
    warm_p50, connected_p50 = statistics.median(warm), statistics.median(connected)
    need(figure <= GOAL, f"handing out takes {figure:.3f} of an rdma_cm connect: {warm_p50:.0f} µs")
    detail = (
        f"of rdma_cm: {warm_p50:.0f} µs against {connected_p50:.0f}, p50 of {rounds} rounds; {back_s:.1f} s from the "
        f"peer's return to an answer, {found['lost']} queue pairs replaced, {found['failures']} attempts in between"
    )
    more = {"warm_us": warm, "rdma_cm_us": connected, "back_s": back_s, "statistics": found}
    return Figure(figure, "times", detail, more)
