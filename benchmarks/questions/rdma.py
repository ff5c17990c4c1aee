"""What does an RDMA operation cost between two of our pods, against pods that their host routes between?

perftest inside our pods (`rdmanet`), in two namespaces that the host routes between as any CNI would (`routed`) and in
two namespaces with one veth pair between them (`one veth`, the limit): benchmarks/peers/namespaces.py makes them,
benchmarks/peers/perftest.py says how perftest is told to be event-driven, and why ``write-lat`` is ib_write_bw with one
request at a time. The MTU is 1500 everywhere (RoCE's path MTU is then 1024), 9000 (4096) in ``mtu-9000``; IPv4, but for
``ipv6``. With instructions counted a nanosecond is one. A value repeats within 0.5 % where perftest polls, 1 % where it
sleeps; streams of 64 bytes vary by a tenth with the number of packets that the kernel takes in one go, on every path.

``python`` is `rdmanet.verbs` from Python against perftest's C between the same two of our pods: ``send-lat`` is half of
a message there and back, ``write-lat`` one WRITE that is waited for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import perftest
from benchmarks.peers.namespaces import MTU_BYTES, End, Pair, agent_host, one_veth, ours, routed
from benchmarks.question import OURS, Goal, Place, Question, Run
from rdmanet.errors import RdmanetError
from testbed.paths import REPOSITORY
from testbed.peer import Peer

UNIT = "virtual µs"
LARGE_MTU_BYTES = 9000
SERVICE = "bench"
#: Bytes → name, and operations: per latency test and per stream of messages. So many that the first, which finds
#: nothing in the caches of the emulated machine's kernel, does not show.
SIZES = {64: ("64B", 300, 2000), 4096: ("4KiB", 100, 1000), 65536: ("64KiB", 100, 300), 1 << 20: ("1MiB", 12, 40)}
SMOKE_OPERATIONS = 10
#: One that sleeps and one that polls, a latency and a stream; not ib_send_lat, which stalls often on two processors.
SMOKE_TESTS = ("read-lat", "write-bw")


@dataclass(frozen=True, slots=True)
class Case:
    """One of perftest's tests with one size."""

    name: str
    test: str
    size_bytes: int
    version: int = 4
    mtu_bytes: int = MTU_BYTES

    def operations(self, run: Run) -> int:
        _, latency, stream = SIZES[self.size_bytes]
        asked = latency if self.test.endswith("-lat") else stream
        return run.pick(asked, asked, SMOKE_OPERATIONS)


FROM_PYTHON = (Case("write-lat/64KiB", "write-lat", 65536), Case("send-lat/64B", "send-lat", 64))


def cases(run: Run) -> list[Case]:
    """What is measured: with less effort fewer sizes and one MTU."""
    every = [(test, size) for test in perftest.TESTS for size in SIZES]
    # Streams of 64 bytes need several rounds: how many packets the kernel takes in one go changes from run to run.
    few = [(test, 64 if test.endswith("-lat") else 65536) for test in perftest.TESTS]
    least = [(test, 64) for test in SMOKE_TESTS]
    found = [Case(f"{test}/{SIZES[size][0]}", test, size) for test, size in run.pick(every, few, least)]
    six = Case("ipv6/read-lat/64B", "read-lat", 64, version=6)
    large = Case("mtu-9000/write-bw/64KiB", "write-bw", 65536, mtu_bytes=LARGE_MTU_BYTES)
    return found + run.pick([six, large], [six], [])


def measure(run: Run) -> None:
    """Every test over every path in turn, then the library against perftest."""
    wanted = cases(run)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(agent_host("rdma"))
        pairs: dict[int, dict[str, Pair]] = {}
        for number, mtu_bytes in enumerate(sorted({case.mtu_bytes for case in wanted})):
            pairs[mtu_bytes] = {
                OURS: stack.enter_context(ours(host, f"ours{number}", mtu_bytes)),
                "routed": stack.enter_context(routed(f"routed{number}", mtu_bytes)),
                "one veth": stack.enter_context(one_veth(f"veth{number}", mtu_bytes)),
            }
            run.tell(f"pods with an MTU of {mtu_bytes} are there")
        pair = pairs[MTU_BYTES][OURS]
        server, client = (stack.enter_context(_library(end)) for end in (pair.server, pair.client))
        server.ask("serve", service=SERVICE)
        for _ in run.rounds(full=4, quick=1):
            for case in wanted:
                for path, made in run.turns(pairs[case.mtu_bytes]):
                    _sample(run, case.name, path, _perftest(run, case, made))
            for case in run.pick(FROM_PYTHON, FROM_PYTHON, FROM_PYTHON[:1]):
                ways: Mapping[str, Callable[[], float]] = {
                    OURS: _with_library(run, client, case, pair),
                    "perftest": _perftest(run, case, pair),
                }
                for way, cost_us in run.turns(ways):
                    _sample(run, f"python/{case.name}", way, cost_us)


def _sample(run: Run, case: str, contender: str, cost_us: Callable[[], float]) -> None:
    try:
        run.sample(case, contender, cost_us(), UNIT)
    except RdmanetError as error:
        run.failed(case, contender, str(error))


def _perftest(run: Run, case: Case, pair: Pair) -> Callable[[], float]:
    return lambda: perftest.cost_us(pair, case.test, case.size_bytes, case.operations(run), case.version)


def _with_library(run: Run, client: Peer, case: Case, pair: Pair) -> Callable[[], float]:
    do = case.test.removesuffix("-lat")
    target = f"{pair.server.pod.name}:{SERVICE}"
    request: dict[str, Any] = {"target": target, "bytes": case.size_bytes, "rounds": case.operations(run)}
    return lambda: float(client.ask(do, **request)["each_us"])


def _library(end: End) -> Peer:
    argv = [sys.executable, "-m", "benchmarks.peers.library"]
    return Peer.start(f"bench-{end.pod.name}", end.pod.popen, argv, cwd=str(REPOSITORY))


QUESTION = Question(
    name="rdma",
    text=(__doc__ or "").partition("\n")[0],
    places=(Place.ICOUNT,),
    measure=measure,
    # In instructions, so no allowance for noise.
    goals=(
        Goal("*-lat/*", "routed", 1.0),
        Goal("*-bw/*", "routed", 1.0),
    ),
    timeout_s=5400,
)
