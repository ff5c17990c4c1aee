"""What does a leased queue pair cost from asking to ready to send, against one that rdma_cm connects?

Between the same two of our pods, an agent's defaults, IPv4. ``cold``: a session is opened for it, with its connection
to the broker and its device; ``one more``: in a session that is open; ``batch-64``: 64 by one connect, per queue pair,
with the library's own options, and in ``batch-64/small`` with the smallest queues, which is what cmtime asks for;
``warm``: from a pool that is full. The library is imported when the clock starts, as cmtime's libraries are. All that
happens meanwhile counts, in both pods and in the agent: there is one processor.

rdma_cm is rdmacm-utils' cmtime with one connection (cold, one more) or 64, per connection: the rows create id, bind
addr, resolve addr, resolve route, create qp and connect, not disconnect and destroy. It opens its device before its
first row.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.peers import rdma_cm
from benchmarks.peers.namespaces import End, Pair, agent_host, ours
from benchmarks.question import OURS, Goal, Place, Question, Run
from rdmanet.errors import RdmanetError
from testbed.paths import REPOSITORY
from testbed.peer import Peer

UNIT = "virtual µs"
RDMA_CM = "rdma_cm"
BATCH = 64


@dataclass(frozen=True, slots=True)
class Case:
    """How queue pairs are leased."""

    name: str
    count: int | None = None  # by one connect; None: one queue pair, by itself
    fresh: bool = False  # in a session opened for it
    small: bool = False  # with the smallest queues
    warm: bool = False  # from a pool

    @property
    def service(self) -> str:
        """Where the listener's queues are as small."""
        return "small" if self.small else "usual"


CASES = (
    Case("cold", fresh=True),
    Case("one more"),
    Case(f"batch-{BATCH}", count=BATCH),
    Case(f"batch-{BATCH}/small", count=BATCH, small=True),
    Case("warm", warm=True),
)
#: Where the pool's queue pairs are connected to: not given back in between.
POOLED = "pooled"
POOL_SIZE = 4


def measure(run: Run) -> None:
    """Every way of leasing in turn with rdma_cm."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(agent_host("lease"))
        pair = stack.enter_context(ours(host, "lease"))
        server, client = (stack.enter_context(_library(end)) for end in (pair.server, pair.client))
        for case in (CASES[0], CASES[-2]):
            server.ask("hold", service=case.service, small=case.small)
        # The library imports pyverbs with its first queue pair.
        _lease(pair, client, server, CASES[0])
        server.ask("serve", service=POOLED)
        client.ask("pool", target=f"{pair.server.pod.name}:{POOLED}", size=POOL_SIZE)
        run.tell("the pods and their programs are there")
        for _ in run.rounds(full=25, quick=5):
            for case in CASES:
                ways: Mapping[str, Callable[[], float]] = {
                    OURS: partial(_lease, pair, client, server, case),
                    RDMA_CM: partial(rdma_cm.ready_us, pair, case.count or 1),
                }
                for way, cost_us in run.turns(ways):
                    try:
                        run.sample(case.name, way, cost_us(), UNIT)
                    except RdmanetError as error:
                        run.failed(case.name, way, str(error))


def _lease(pair: Pair, client: Peer, server: Peer, case: Case) -> float:
    """One measured lease, or batch of them; given back afterwards."""
    if case.warm:
        return float(statistics.median(client.ask("warm", count=POOL_SIZE)["each_us"]))
    target = f"{pair.server.pod.name}:{case.service}"
    request: dict[str, Any] = {"count": case.count, "fresh": case.fresh, "small": case.small}
    try:
        return float(client.ask("lease", target=target, **request)["each_us"])
    finally:
        client.ask("drop")
        server.ask("drop")


def _library(end: End) -> Peer:
    argv = [sys.executable, "-m", "benchmarks.peers.library"]
    return Peer.start(f"bench-{end.pod.name}", end.pod.popen, argv, cwd=str(REPOSITORY))


QUESTION = Question(
    name="lease",
    text=(__doc__ or "").partition("\n")[0],
    places=(Place.ICOUNT,),
    measure=measure,
    goals=(Goal(f"batch-{BATCH}*", RDMA_CM, 1.0), Goal("warm", RDMA_CM, 0.1)),
    timeout_s=1200,
)
