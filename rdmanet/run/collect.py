"""Takes back what a job has on the host; and what jobs have left whose launchers are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from rdmanet.errors import RdmanetError, StateError
from rdmanet.netlink import namespace
from rdmanet.run import cgroups, plugin
from rdmanet.run.job import Plan, PodPlan
from rdmanet.run.records import Record, left

#: CNI calls at a time: the agent carries them out one after another, each costs a process here.
CALLS_AT_A_TIME = 8


async def for_each(pods: Sequence[PodPlan], call: Callable[[PodPlan], asyncio.Future[None]]) -> None:
    """One call for each pod, some at a time, all of them to their end. Raises the first failure, by rank."""
    turns = asyncio.Semaphore(CALLS_AT_A_TIME)

    async def one(pod: PodPlan) -> None:
        async with turns:
            await call(pod)

    results = await asyncio.gather(*(one(pod) for pod in pods), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def take_back(plan: Plan, record: Record) -> None:
    """Undoes all of a job, in whatever state it is; its processes have ended or may be ended. Idempotent.

    Raises what could not be undone, when everything else is: the record stays for the next try.
    """
    failures: list[RdmanetError] = []

    async def attempt(work: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(work)
        except RdmanetError as error:
            failures.append(error)

    async def pod_back(pod: PodPlan) -> None:
        try:
            await plugin.call("DEL", plan, pod, record.processes)
        except RdmanetError as error:
            failures.append(error)
        await attempt(lambda: namespace.remove(Path(pod.netns)))

    if plan.cgroup is not None:
        # First, that nothing runs in what is taken away; removed last, as the agent forgets it in DEL.
        await attempt(lambda: cgroups.end_processes(Path(plan.cgroup or "")))
    await for_each(plan.pods, lambda pod: asyncio.ensure_future(pod_back(pod)))
    if plan.cgroup is not None:
        await attempt(lambda: cgroups.remove(Path(plan.cgroup or "")))
    if failures:
        raise failures[0]
    await asyncio.to_thread(record.forget)


async def collect(jobs: Path, say: Callable[[str], None]) -> int:
    """Takes back the jobs of launchers that are gone; how many could not be, each with a sentence."""
    kept = 0
    records = left(jobs)
    while (record := await asyncio.to_thread(next, records, None)) is not None:
        try:
            await asyncio.to_thread(record.wait_for_processes)
            plan = record.plan()
            if plan is None:
                await asyncio.to_thread(record.forget)
                continue
            await take_back(plan, record)
            say(f"job {plan.name}, whose launcher is gone, was taken back")
        except (RdmanetError, OSError) as error:
            kept += 1
            if isinstance(error, StateError):
                say(f"a job's record cannot be read: {error}")
            else:
                say(f"a job whose launcher is gone cannot be taken back now: {error}")
        finally:
            record.close()
    return kept
