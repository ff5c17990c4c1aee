"""Row `library`: every operation of rdmanet.verbs between two pods of an agent, each with its result checked.

Connected queue pairs and datagrams, both address families, completions by event and by polling, memory of NumPy, and
the synchronous façade. What is counted was compared byte by byte on both sides.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.peers.namespaces import End, Pair, agent_host, ours
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import Figure, need

FAMILIES = (4, 6)
#: How completions are found → Options.polling.
COMPLETIONS = {"events": False, "polling": True}
WAYS = ("asyncio", "numpy", "sync")
#: Of each of the five operations, in each case.
ROUNDS = 100
DATAGRAMS = 500
OPERATIONS = {"write", "read", "message", "fetch_add", "compare_swap"}
TIMEOUT_S = 600.0


@contextmanager
def program(end: End, place: str) -> Iterator[Peer]:
    """benchmarks.peers.operations in a pod."""
    argv = [sys.executable, "-m", "benchmarks.peers.operations"]
    with Peer.start(f"{place}-{end.pod.name}", end.pod.popen, argv, cwd=str(REPOSITORY)) as peer:
        peer.ask("hello")
        yield peer


def exercise(pair: Pair, rounds: int, datagrams: int) -> dict[str, Counter[str]]:
    """Carry all of it out; case → operation → how many were checked."""
    done: dict[str, Counter[str]] = {}
    with program(pair.server, "library") as server, program(pair.client, "library") as client:
        for name, polling in COMPLETIONS.items():
            server.ask("serve", service=name, polling=polling)
        server.ask("gossip", service="gossip")
        for seed, (family, completions, way) in enumerate(itertools.product(FAMILIES, COMPLETIONS, WAYS)):
            answer = client.ask(
                "exercise",
                target=f"{pair.server.pod.name}:{completions}",
                address=pair.client.addresses[family],
                seed=seed,
                rounds=rounds,
                polling=COMPLETIONS[completions],
                way=way,
                timeout_s=TIMEOUT_S,
            )
            done[f"rc/ipv{family}/{completions}/{way}"] = Counter(answer["operations"])
        for family in FAMILIES:
            answer = client.ask(
                "datagrams",
                target=f"{pair.server.pod.name}:gossip",
                address=pair.client.addresses[family],
                count=datagrams,
                timeout_s=TIMEOUT_S,
            )
            done[f"ud/ipv{family}"] = Counter({"datagram": answer["answered"]})
    return done


def measure() -> Figure:
    """How many operations were checked."""
    with agent_host("library") as host, ours(host, "library") as pair:
        done = exercise(pair, ROUNDS, DATAGRAMS)
    total: Counter[str] = sum(done.values(), Counter())
    for case, found in done.items():
        wanted = {"datagram": DATAGRAMS} if case.startswith("ud/") else dict.fromkeys(OPERATIONS, ROUNDS)
        need(found == wanted, f"{case}: {dict(found)} operations, not {wanted}")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(total.items()))
    detail = f"each compared on both sides: {counts}; RC and UD, IPv4 and IPv6, events and polling, NumPy, façade"
    return Figure(total.total(), "operations", detail, {case: dict(found) for case, found in done.items()})
