"""What do ADD and DEL cost a container runtime, against the reference plugins ptp and bridge?

Every contender has a scratch host of its own; all are alive at the same time, and take turns. A sample is one execution
of the plugin as a runtime sees it: from the start of the process to its end, its result read. Making the namespace
before and deleting it afterwards is the runtime's work and not in it. Cases:

``add/N``, ``del/N``                 N calls at a time, each of another pod
``add/1 with N pods``, ``del/1 …``   one call while N other pods are there, made by the contender itself
``del-until-gone/1``                 DEL until the interface is gone and the address free: ours answers before that
``add-dad/1``                        ADD with the kernel's own duplicate address detection, which is off elsewhere
``add+rdma/1``, ``del+rdma/1``       with a Soft-RoCE device in the pod; the peer's is made with ``rdma link add``
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.peers.plugins import (
    DETECTION,
    EMPTY,
    NO_DETECTION,
    PLUGINS,
    Calls,
    Runtime,
    runtimes,
)
from benchmarks.question import OURS, Goal, Place, Question, Run, Statistic

MASQUERADED = "ptp+ipMasq"
#: ptp knows no RDMA: what somebody would run after it.
WITH_DEVICE = "ptp+ipMasq, rdma link add"


def measure(run: Run) -> None:
    """All cases of one place."""
    if run.place is Place.VM:
        _with_device(run)
        return
    with runtimes(list(PLUGINS)) as contenders:
        _at_once(run, contenders)
        _with_detection(run, contenders)
        _with_others(run, contenders)


def _at_once(run: Run, contenders: Mapping[str, Runtime]) -> None:
    sizes = run.pick((1, 10, 50), (1, 10, 50), (1, 2))
    repeated = run.pick(10, 7, 1)
    for number in run.rounds(10, 3):
        for at_once in sizes:
            if at_once == sizes[-1] and run.pick(0, 1, 0) and number:
                continue  # half of the quick run's time
            for name, contender in run.turns(contenders):
                for _ in range(repeated if at_once == 1 else 1):
                    _add_and_delete(run, name, contender, at_once, "")
            _nothing(run, contenders[MASQUERADED], at_once, repeated if at_once == 1 else 1)


def _nothing(run: Run, host: Runtime, at_once: int, repeated: int) -> None:
    """What the measuring itself costs: the same way with /bin/true."""
    for _ in range(repeated):
        for elapsed_s in host.execute(["/bin/true"], at_once, at_once).elapsed_s():
            run.sample(f"add/{at_once}", EMPTY, elapsed_s * 1000, "ms")


def _add_and_delete(run: Run, name: str, contender: Runtime, at_once: int, suffix: str, first: int = 0) -> None:
    pods = contender.ensure(first + at_once)[first:]
    added = contender.call(["ADD"], pods, at_once)
    _keep(run, f"add/{at_once}{suffix}", name, added)
    deleted = contender.call(["DEL"], pods, at_once)
    _keep(run, f"del/{at_once}{suffix}", name, deleted)
    if at_once == 1 and not suffix and not deleted.errors:
        run.sample("del-until-gone/1", name, deleted.settled_s * 1000, "ms")


def _keep(run: Run, case: str, name: str, calls: Calls) -> None:
    if calls.errors:
        run.failed(case, name, "; ".join(calls.errors))
        return
    for elapsed_s in calls.elapsed_s():
        run.sample(case, name, elapsed_s * 1000, "ms")


def _with_detection(run: Run, contenders: Mapping[str, Runtime]) -> None:
    some = {name: contenders[name] for name in (OURS, "ptp", "bridge")}
    with _detecting(list(some.values())):
        for _ in run.rounds(5, 2):
            for name, contender in run.turns(some):
                pods = contender.ensure(1)
                _keep(run, "add-dad/1", name, contender.call(["ADD"], pods, 1))
                contender.call(["DEL"], pods, 1)


@contextlib.contextmanager
def _detecting(contenders: Sequence[Runtime]) -> Iterator[None]:
    for contender in contenders:
        contender.settings([pod.netns for pod in contender.ensure(1)], DETECTION)
    try:
        yield
    finally:
        for contender in contenders:
            contender.settings([pod.netns for pod in contender.ensure(1)], NO_DETECTION)


def _with_others(run: Run, contenders: Mapping[str, Runtime]) -> None:
    """With pods that stay: what lists, chains and tables cost when they are long."""
    others = run.pick(500, 50, 2)
    suffix = f" with {others} pods"
    crowded = {}
    for name, contender in contenders.items():
        run.tell(f"{others} pods of {name}")
        calls = contender.call(["ADD"], contender.ensure(others), at_once=10)
        if calls.errors:
            run.failed(f"add/1{suffix}", name, "; ".join(calls.errors))
        else:
            crowded[name] = contender
    repeated = run.pick(5, 7, 1)
    for _ in run.rounds(10, 3):
        for name, contender in run.turns(crowded):
            for _ in range(repeated):
                _add_and_delete(run, name, contender, 1, suffix, first=others)


# With an RDMA device, where network namespaces can have one


def _with_device(run: Run) -> None:
    names = (OURS, MASQUERADED)
    with runtimes(names) as contenders:
        for contender in contenders.values():  # modules are loaded and files read by the first call
            pods = contender.ensure(1)
            contender.call(["ADD", "DEL"], pods, 1)
        for _ in run.rounds(5, 2):
            for name, contender in run.turns(contenders):
                for _ in range(run.pick(4, 1, 1)):
                    if name == OURS:
                        _ours_with_device(run, contender)
                    else:
                        _peer_with_device(run, contender)


def _ours_with_device(run: Run, contender: Runtime) -> None:
    pods = contender.ensure(1)
    _keep(run, "add+rdma/1", OURS, contender.call(["ADD"], pods, 1, {"rdma": True}))
    _keep(run, "del+rdma/1", OURS, contender.call(["DEL"], pods, 1, {"rdma": True}))


def _peer_with_device(run: Run, contender: Runtime) -> None:
    """ADD is reported without the device as well; DEL takes the device with the interface."""
    pods = contender.ensure(1)
    added = contender.call(["ADD"], pods, 1)
    _keep(run, "add+rdma/1", MASQUERADED, added)
    words = "rdma link add rxe_bench type rxe netdev eth0"
    made = contender.execute(["/usr/bin/nsenter", f"--net={pods[0].netns}", *words.split()], 1, 1)
    if errors := added.errors + made.errors:
        run.failed("add+rdma/1", WITH_DEVICE, "; ".join(errors))
    else:
        run.sample("add+rdma/1", WITH_DEVICE, (added.elapsed_s()[0] + made.elapsed_s()[0]) * 1000, "ms")
    _keep(run, "del+rdma/1", WITH_DEVICE, contender.call(["DEL"], pods, 1))


QUESTION = Question(
    name="cni",
    text="What do ADD and DEL cost a container runtime, against the reference plugins ptp and bridge?",
    places=(Place.HOST, Place.VM),
    measure=measure,
    goals=(Goal("add/*", MASQUERADED, 0.35), Goal("del/*", MASQUERADED, 0.15)),
    statistics=(Statistic.P50, Statistic.P99),
    timeout_s=1800.0,
)
