"""What do two thousand ADDs and DELs at twenty a time cost, and is nothing left of them?

In each round every contender gets fresh namespaces, twenty of which are at work at any time: ADD, then DEL with the
result of ADD. Making namespaces and deleting them is the runtime's work, and not in the figures. Cases:

``add/20``, ``del/20``   one call, from the start of the process to its end
``pair/20``              the whole round divided by its pods, until nothing is left to remove: the rate as a cost

Ours must leave its host as it was before the first ADD (`testbed.dump`), without a row; else that is a failure.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.plugins import Runtime, runtimes
from benchmarks.question import OURS, Place, Question, Run, Statistic
from testbed.host import diff

CONTENDERS = (OURS, "ptp", "ptp+ipMasq")


def measure(run: Run) -> None:
    """2,000 pods of each contender (200 in a quick run), a hundred (fifty) in a round."""
    at_once = run.pick(20, 20, 2)
    size = run.pick(100, 50, 4)
    with runtimes(CONTENDERS) as contenders:
        before = _dump(contenders[OURS])
        for _ in run.rounds(20, 4):
            for contender in contenders.values():
                contender.ensure(size)
            for name, contender in run.turns(contenders):
                _churn(run, name, contender, at_once)
            for contender in contenders.values():
                contender.drop(contender.pods)
        _nothing_left(run, contenders[OURS], before, f"pair/{at_once}")


def _churn(run: Run, name: str, contender: Runtime, at_once: int) -> None:
    calls = contender.call(["ADD", "DEL"], contender.pods, at_once)
    if calls.errors:
        failed = sum(1 for outcomes in calls.outcomes if any(outcome.error for outcome in outcomes))
        run.failed(f"pair/{at_once}", name, f"{failed} of {len(calls.outcomes)} pods: {'; '.join(calls.errors)}")
        return
    for position, case in enumerate((f"add/{at_once}", f"del/{at_once}")):
        for elapsed_s in calls.elapsed_s(position):
            run.sample(case, name, elapsed_s * 1000, "ms")
    run.sample(f"pair/{at_once}", name, calls.settled_s * 1000 / len(calls.outcomes), "ms")


def _dump(ours: Runtime) -> dict[str, Any]:
    """The host, without the database's bytes: what it says is asked of the agent."""
    dump = ours.host.dump()
    del dump["state"]
    return dump


def _nothing_left(run: Run, ours: Runtime, before: dict[str, Any], case: str) -> None:
    left = diff(before, _dump(ours))
    left += [f"{row['pod']} is {row['state']}" for row in ours.host.api("GET", "/v1/status")["attachments"]]
    if left:
        run.failed(case, OURS, f"{len(left)} things are left: {'; '.join(left[:5])}")


QUESTION = Question(
    name="churn",
    text="What do two thousand ADDs and DELs at twenty a time cost, and is nothing left of them?",
    places=(Place.HOST,),
    measure=measure,
    statistics=(Statistic.P50, Statistic.P99),
)
