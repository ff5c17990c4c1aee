"""Runs a job: checks, makes its pods, starts its ranks, waits for them, and takes everything back, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdmanet import client
from rdmanet.config import Config
from rdmanet.environment import Environment, connection_manager, gid_indexes, is_soft_roce
from rdmanet.errors import InputError, KernelError, RdmanetError, UnavailableError
from rdmanet.model import IPAddress
from rdmanet.netlink import namespace
from rdmanet.run import cgroups, plugin
from rdmanet.run.collect import collect, for_each, take_back
from rdmanet.run.job import Ending, Plan, PodPlan, plan, verdict
from rdmanet.run.lines import Printer
from rdmanet.run.process import PodProcess, Specification
from rdmanet.run.records import Record
from rdmanet.run.variables import Member, environment, hosts_file

#: Passed on to the ranks; before these have started, the first four end the launcher.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)

Node = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for on the command line."""

    argv: Sequence[str]
    pods: int
    rdma: bool
    name: str
    namespace: str
    master_port: int
    grace_s: float
    family: int | None
    user: tuple[int, int, Sequence[int]] | None
    devices: Sequence[str]
    plugin: Path | None


def say(sentence: str) -> None:
    """To the person who started the job."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"rdmanet run: {sentence}", file=sys.stderr, flush=True)


def jobs_directory(config: Config) -> Path:
    """Where jobs are recorded: beside the agent's socket, gone after a reboot as their namespaces are."""
    return config.agent.socket.parent / "jobs"


async def run(wish: Wish, config: Config) -> int:
    """Runs a job to its end; its exit code. RdmanetError for what is not the job's fault."""
    launch = _Launch(wish, config)
    try:
        return await launch.run()
    finally:
        await launch.end()


async def cleanup(config: Config) -> int:
    """Takes back what launchers that are gone have left; 1 where something stays."""
    _require_root()
    return 1 if await collect(jobs_directory(config), say) else 0


def _require_root() -> None:
    if os.geteuid() != 0:
        raise UnavailableError("A job's pods are made by root (CAP_SYS_ADMIN): use sudo, with --user for the ranks.")


def _check(wish: Wish) -> tuple[Path, list[Node]]:
    """What can be known before anything is made: the CNI executable, and the nodes of devices asked for."""
    _require_root()
    if shutil.which(wish.argv[0]) is None:
        raise InputError(f"There is no command {wish.argv[0]!r} here, or it cannot be executed.")
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("The directory that this is started in is gone: the ranks would start in it.") from error
    nodes = []
    for device in wish.devices:
        try:
            status = Path(device).stat()
        except OSError as error:
            raise InputError(f"There is no device {device}: {error.strerror}.") from error
        if not stat.S_ISCHR(status.st_mode) or not device.startswith("/dev/"):
            raise InputError(f"{device} is no character device below /dev.")
        nodes.append((device, os.major(status.st_rdev), os.minor(status.st_rdev)))
    return plugin.find(wish.plugin, os.environ), nodes


class _Launch:
    """One job on its way. ``run`` once, then ``end`` in any case."""

    def __init__(self, wish: Wish, config: Config):
        self._wish = wish
        self._config = config
        self._printers = (Printer(sys.stdout.fileno()), Printer(sys.stderr.fileno()))
        self._plan: Plan | None = None
        self._record: Record | None = None
        self._processes: list[PodProcess] = []
        self._calls: set[asyncio.Task[None]] = set()  # those that nobody waits for any more go on all the same
        self._addresses: dict[int, tuple[IPAddress, ...]] = {}
        self._setup: asyncio.Task[Plan] | None = None
        self._interrupted: signal.Signals | None = None
        self._running = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in PASSED_ON:
            loop.add_signal_handler(number, self._take_signal, number)
        self._setup = asyncio.create_task(self._start())
        try:
            wanted = await self._setup
        except asyncio.CancelledError:
            if self._interrupted is None:
                raise
            say(f"ended by {self._interrupted.name} before the job had started")
            return 128 + self._interrupted
        began_s = loop.time()
        code, sentence = verdict(wanted, await self._watch(), loop.time() - began_s)
        say(sentence)
        return code

    async def end(self) -> None:
        """Takes everything back. What cannot be is said, and recorded for the next time."""
        self._running = False
        if self._calls:
            await asyncio.wait(self._calls)
        await asyncio.gather(*(process.close() for process in self._processes))
        if self._plan is None or self._record is None:
            return
        try:
            await take_back(self._plan, self._record)
        except (RdmanetError, OSError) as error:
            say(f"not all of job {self._plan.name} could be taken back; `rdmanet run --cleanup` tries again: {error}")
        finally:
            self._record.close()

    # Signals

    def _take_signal(self, number: signal.Signals) -> None:
        if not self._running:  # it is being made, or taken back
            if number in ENDING and self._setup is not None and not self._setup.done():
                self._interrupted = self._interrupted or number
                self._setup.cancel()
            return
        if number in (signal.SIGINT, signal.SIGTERM) and self._interrupted is not None:
            say("a second signal: the ranks are killed")
            for process in self._processes:
                process.stop_writing()
            number = signal.SIGKILL
        elif number in (signal.SIGINT, signal.SIGTERM):
            self._interrupted = number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process in self._processes:
            task = asyncio.ensure_future(process.signal(number))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    # Setting up

    async def _start(self) -> Plan:
        path, devices = _check(self._wish)
        await asyncio.to_thread(client.ask, self._config.agent.socket, "/v1/status")
        await collect(jobs_directory(self._config), say)
        self._plan = wanted = plan(
            self._wish.name,
            self._wish.pods,
            rdma=self._wish.rdma,
            namespace=self._wish.namespace,
            plugin=path,
            socket=self._config.agent.socket,
            state_dir=self._config.agent.state_dir,
            cgroup_root=await asyncio.to_thread(cgroups.root),
        )
        await self._finished(self._begin(wanted))
        await for_each(wanted.pods, lambda pod: self._finished(self._attach(wanted, pod)))
        found = await asyncio.to_thread(client.ask, self._config.agent.socket, "/v1/status")
        rows = {row["container_id"]: row for row in found["attachments"]}
        members = [Member(pod.name, self._addresses[pod.rank]) for pod in wanted.pods]
        specifications = [
            await self._specification(pod, members, devices, rows.get(pod.container_id)) for pod in wanted.pods
        ]
        assert self._record is not None
        for pod in wanted.pods:
            self._processes.append(await PodProcess.start(pod.rank, self._record.processes, self._printers))
        ready = (one.prepare(as_wanted) for one, as_wanted in zip(self._processes, specifications, strict=True))
        await asyncio.gather(*ready)
        names = [rows[pod.container_id]["device"]["name"] for pod in wanted.pods] if self._wish.rdma else []
        say(f"job {wanted.name}: {_range(wanted)}" + (f" with {', '.join(names)}" if names else ""))
        await asyncio.gather(*(process.go() for process in self._processes))
        self._running = True  # from here on signals are for the ranks
        return wanted

    async def _begin(self, wanted: Plan) -> None:
        self._record = await asyncio.to_thread(Record.begin, jobs_directory(self._config), wanted)

    def _finished(self, work: Any) -> asyncio.Future[None]:
        """Awaits a call that is not given up in the middle: what it does is undone when it is done."""
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return asyncio.shield(task)

    async def _attach(self, wanted: Plan, pod: PodPlan) -> None:
        assert self._record is not None
        group = wanted.cgroup_of(pod)
        if group is not None:
            await asyncio.to_thread(cgroups.create, group)
        await asyncio.to_thread(namespace.create, Path(pod.netns))
        result = await plugin.call("ADD", wanted, pod, self._record.processes)
        self._addresses[pod.rank] = plugin.addresses(pod, result)

    async def _specification(
        self, pod: PodPlan, members: Sequence[Member], devices: Sequence[Node], row: Mapping[str, Any] | None
    ) -> Specification:
        assert self._plan is not None
        device = row["device"] if row is not None else None
        if self._wish.rdma and device is None:
            raise UnavailableError(f"Pod {pod.name} has no RDMA device, and the job asks for one.")
        rdma: dict[str, str] = {}
        nodes = list(devices)
        if row is not None and device is not None:
            nodes += [(f"/dev/infiniband/{device['uverbs']}", device["major"], device["minor"]), *connection_manager()]
            rdma = await asyncio.to_thread(self._rdma_variables, pod, row)
        group = self._plan.cgroup_of(pod)
        umask = os.umask(0o022)
        os.umask(umask)
        return Specification(
            netns=pod.netns,
            cgroup=None if group is None else str(group),
            hostname=pod.name,
            hosts=hosts_file(members, pod.name),
            nodes=nodes,
            masked=(str(self._config.agent.socket.parent), str(self._config.agent.state_dir)),
            argv=list(self._wish.argv),
            cwd=str(Path.cwd()),
            environment=environment(os.environ, members, pod.rank, self._wish.master_port, rdma),
            umask=umask,
            user=self._wish.user,
        )

    def _rdma_variables(self, pod: PodPlan, row: Mapping[str, Any]) -> dict[str, str]:
        name = row["device"]["name"]

        def look() -> dict[str, str]:
            found = Environment(
                pod=row["pod"],
                device=name,
                gid_indexes=gid_indexes(name, self._addresses[pod.rank]),
                soft_roce=is_soft_roce(name),
                traffic_class=row["traffic_class"],
                service_level=row["service_level"],
            )
            return found.variables(self._wish.family)

        with namespace.opened(pod.netns) as descriptor:
            return namespace.run_with_sysfs(descriptor, look)

    # Running

    async def _watch(self) -> list[Ending]:
        """Waits for all ranks. When one fails the others are told to end, and killed when they have not in time."""
        loop = asyncio.get_running_loop()
        running: set[asyncio.Task[Ending]] = {asyncio.create_task(process.ending()) for process in self._processes}
        silent = {process.silent for process in self._processes}
        endings: list[Ending] = []
        kill_at_s: float | None = None
        broken: OSError | None = None
        ending = False
        while running:
            left_s = None if kill_at_s is None else max(0.0, kill_at_s - loop.time())
            watched: set[asyncio.Future[Any]] = {*running, *(one for one in silent if not one.done())}
            await asyncio.wait(watched, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            endings += [task.result() for task in running if task.done()]
            running = {task for task in running if not task.done()}
            broken = next((one.result() for one in silent if one.done() and one.result() is not None), None)
            if not ending and (broken is not None or any(one.status for one in endings)):
                ending = True
                if broken is not None:
                    say(f"the output cannot be written ({broken.strerror}): the ranks are ended")
                kill_at_s = loop.time() + self._wish.grace_s
                self._pass_on(signal.SIGTERM)
            elif kill_at_s is not None and running and loop.time() >= kill_at_s:
                kill_at_s = None
                say(f"ranks that did not end within {self._wish.grace_s:g} s are killed")
                self._pass_on(signal.SIGKILL)
        if broken is not None:
            raise KernelError("The job's output cannot be written.", operation="write", errno=broken.errno)
        return endings


def _range(wanted: Plan) -> str:
    first, last = wanted.pods[0].name, wanted.pods[-1].name
    return f"pod {first}" if first == last else f"pods {first} to {last}"
