"""What does a packet from pod to pod on one node cost, beside loopback, a veth pair, routing, masquerading, a bridge?

Real pods of a real agent, real pods of the reference plugins, and one load program for all (benchmarks/netload.c).
Measured where a nanosecond is an instruction of the whole machine, with all contenders in it: what our agent does when
idle meets all alike, and falls into single blocks of the load program.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.peers import paths
from benchmarks.peers.paths import Attacher, Way
from benchmarks.question import OURS, Goal, Place, Question, Run
from rdmanet.errors import RdmanetError

FAMILIES = ("ipv4", "ipv6")
FEW = f"{OURS} with 2 pods"
ADDS_AT_ONCE = 4
#: New interfaces solicit routers and report their groups for some seconds (RFC 4861 6.3.7, RFC 3810 9.11). Time is
#: virtual: idle seconds pass at once.
SETTLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Work:
    """What netload is asked to do: transactions, or KiB of a stream; as (full, quick, smoke)."""

    name: str
    warmup: tuple[int, int, int]
    count: tuple[int, int, int]
    unit: str = "ns"


WORKS = (
    Work("tcp-rr", (200, 100, 5), (1800, 360, 18)),
    Work("tcp-crr", (50, 30, 2), (450, 135, 9)),
    Work("udp-rr", (200, 100, 5), (1800, 360, 18)),
    Work("tcp-stream", (8192, 4096, 64), (9 << 12, 9 << 10, 9 << 6), "ns/KiB"),
)
#: What may not get dearer as pods become more.
GROWING = WORKS[:3]


def measure(run: Run) -> None:
    """All ways side by side; then our host grows."""
    paths.make_netload()
    with contextlib.ExitStack() as stack:
        attacher = stack.enter_context(paths.rdmanet())
        ours = attacher.way()
        ways = {OURS: ours}
        run.tell(f"{OURS} is ready")
        for name, open_way in paths.PEERS.items():
            try:
                ways[name] = stack.enter_context(open_way())
                run.tell(f"{name} is ready")
            except RdmanetError as error:
                for work in WORKS:
                    for family in FAMILIES:
                        run.failed(f"{work.name}/{family}", name, str(error))
        for _ in run.rounds(full=5, quick=2):
            for work in WORKS:
                for family in FAMILIES:
                    for name, way in run.turns(ways):
                        sample(run, f"{work.name}/{family}", name, way, work, family)
        grow(run, attacher, ours)


def grow(run: Run, attacher: Attacher, ours: Way) -> None:
    """The same two pods before and after others have come: what is counted is the same machine's work."""
    pods = run.pick(full=1000, quick=50, smoke=4)
    for contender in (FEW, OURS):
        if contender == OURS:
            fill(run, attacher, pods)
            if run.place is Place.ICOUNT:
                time.sleep(SETTLE_S)
        for _ in run.rounds(full=5, quick=2):
            for work in GROWING:
                for family in FAMILIES:
                    sample(run, f"{work.name}/{family}/growth-{pods}", contender, ours, work, family)


def fill(run: Run, attacher: Attacher, pods: int) -> None:
    """Real ADDs until there are so many pods; RdmanetError when one fails."""
    with ThreadPoolExecutor(ADDS_AT_ONCE) as pool:
        for number, _ in enumerate(pool.map(attacher.add, [f"more-{number}" for number in range(pods - 2)]), 3):
            run.tell(f"pod {number} of {pods}")


def sample(run: Run, case: str, contender: str, way: Way, work: Work, family: str) -> None:
    """One run of the load program; what fails is kept as that."""
    try:
        value = way.load(work.name, family, run.pick(*work.warmup), run.pick(*work.count))
    except RdmanetError as error:
        run.failed(case, contender, str(error))
        return
    run.sample(case, contender, value, work.unit)


QUESTION = Question(
    name="datapath",
    text=(__doc__ or "").partition("\n")[0],
    places=(Place.ICOUNT,),
    measure=measure,
    goals=(
        Goal("*/growth-*", "*", 1.01),
        Goal("tcp-rr/*", "loopback", 1.06),
        Goal("udp-rr/*", "loopback", 1.06),
        Goal("*", "ptp*", 1.0),
        Goal("*", "bridge", 1.0),
    ),
    timeout_s=2400.0,
)
