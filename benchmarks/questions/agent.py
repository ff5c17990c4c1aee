"""What does the agent itself cost: memory, idle processor time, a restart, STATUS, with few pods and many?

One agent on a scratch host, with real pods: namespaces with an attachment each. Cases, N being the number of pods:

``memory/N``            resident memory (VmRSS) after the ADDs; the limit is 60 MB and 20 KB per pod
``memory-adopted/N``    the same after a restart that adopted them; the same limit
``memory-private/N``    what of the memory after the ADDs no other process shares (Private_* of smaps_rollup)
``idle/N``              processor time per second while nobody asks anything
``adopt/N``             after SIGKILL: from the first line of the agent's own code until it serves, as its log says; all
                        pods are adopted then. The limit is 2 s
``restart/N``           the same from the start of the process, imports included
``status-cni/N``        CNI STATUS through our executable, beside a process that does nothing
``status-api/N``        GET /v1/status, which describes every pod

Where there is no limit the peer is the same agent without pods: the ratio says how it grows.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers.plugins import EMPTY, PluginError, Runtime, runtime
from benchmarks.question import LIMIT, OURS, Goal, Place, Question, Run
from testbed.host import CNI_EXECUTABLE

ALONE = "rdmanet without pods"
AGENT_MB, POD_MB, ADOPTION_S = 60.0, 0.020, 2.0
#: So many ADDs at a time while pods are made, and so many pods with one request.
AT_ONCE, BATCH = 10, 100
#: A process's clock of its processor time, in the lowest bits of the clock's number (linux/posix-timers.h).
CPUCLOCK_SCHED = 2


def measure(run: Run) -> None:
    """Every round has an agent of its own, which gets more and more pods."""
    for _ in run.rounds(3, 1):
        with runtime(OURS, "agent") as ours:
            measured = _Round(run, ours)
            for size in run.pick((0, 100, 1000), (0, 100), (0, 2)):
                measured.with_pods(size)


class _Round:
    """One agent; what was measured without pods is what it is compared with when it has some."""

    def __init__(self, run: Run, ours: Runtime):
        self._run = run
        self._ours = ours
        self._alone: dict[str, list[float]] = defaultdict(list)

    def with_pods(self, size: int) -> None:
        """Everything with so many pods, none of which goes away before the end."""
        run, host = self._run, self._ours.host
        run.tell(f"{size} pods")
        self._make(size)
        limit_mb = AGENT_MB + POD_MB * size
        self._keep("memory", size, [self._memory_mb("status", "VmRSS")], "MB", limit_mb)
        self._keep("memory-private", size, [self._memory_mb("smaps_rollup", r"Private_\w+")], "MB")
        self._keep("idle", size, [self._idle_ms_per_s(run.pick(10.0, 3.0, 0.1))], "ms/s")
        count = run.pick(30, 20, 1)
        self._status(size, count)
        self._keep("status-api", size, [self._status_ms() for _ in range(count)], "ms")
        for _ in range(run.pick(3, 2, 1)):
            host.kill_agent()
            restart_s = host.start_agent()
            self._keep("adopt", size, [self._ready_s()], "s", ADOPTION_S)
            self._keep("restart", size, [restart_s], "s")
        self._keep("memory-adopted", size, [self._memory_mb("status", "VmRSS")], "MB", limit_mb)
        states = [row["state"] for row in host.api("GET", "/v1/status")["attachments"]]
        if states != ["ready"] * size:
            run.failed(f"adopt/{size}", OURS, f"{states.count('ready')} of {size} pods were adopted")

    def _make(self, size: int) -> None:
        for first in range(len(self._ours.pods), size, BATCH):
            last = min(first + BATCH, size)
            calls = self._ours.call(["ADD"], self._ours.ensure(last)[first:], AT_ONCE)
            if calls.errors:
                raise PluginError("; ".join(calls.errors), operation="ADD", subject=f"{size} pods")

    def _status(self, size: int, count: int) -> None:
        """CNI STATUS, in turns with a process that does nothing."""
        case = f"status-cni/{size}"
        for _ in range(count):
            call = self._ours.execute([str(CNI_EXECUTABLE)], 1, 1, {"CNI_COMMAND": "STATUS"})
            if call.errors:
                self._run.failed(case, OURS, "; ".join(call.errors))
                return
            self._run.sample(case, OURS, call.elapsed_s()[0] * 1000, "ms")
            empty = self._ours.execute(["/bin/true"], 1, 1)
            self._run.sample(case, EMPTY, empty.elapsed_s()[0] * 1000, "ms")

    def _keep(self, what: str, size: int, values: Iterable[float], unit: str, limit: float | None = None) -> None:
        """Samples, with what they are compared to: the limit, or the same without pods."""
        case = f"{what}/{size}"
        for value in values:
            self._run.sample(case, OURS, value, unit)
            if size == 0:
                self._alone[what].append(value)
        if limit is not None:
            self._run.sample(case, LIMIT, limit, unit)
        elif size:
            for value in self._alone[what]:
                self._run.sample(case, ALONE, value, unit)

    # What the kernel, the log and the API say of the agent

    @property
    def _process(self) -> Path:
        agent = self._ours.host.agent
        assert agent is not None
        return Path("/proc", str(agent.process.pid))

    def _memory_mb(self, file: str, key: str) -> float:
        """The sum of the lines with that key, which are in KiB (proc(5))."""
        found = re.findall(rf"^{key}:\s+(\d+) kB$", (self._process / file).read_text(), re.MULTILINE)
        return sum(int(size) for size in found) * 1024 / 1e6

    def _idle_ms_per_s(self, window_s: float) -> float:
        """Time on a processor of all its threads, those that ended meanwhile among them."""
        began_s, before_ns = time.monotonic(), self._processor_ns()
        time.sleep(window_s)
        return (self._processor_ns() - before_ns) / 1e6 / (time.monotonic() - began_s)

    def _processor_ns(self) -> int:
        """The clock of the process (clock_getcpuclockid(3)): a sum over its threads would fall where one ends."""
        assert self._ours.host.agent is not None
        return time.clock_gettime_ns(~self._ours.host.agent.process.pid << 3 | CPUCLOCK_SCHED)

    def _status_ms(self) -> float:
        began_s = time.monotonic()
        self._ours.host.api("GET", "/v1/status")
        return (time.monotonic() - began_s) * 1000

    def _ready_s(self) -> float:
        """What the log says of the start (rdmanet.agent.Agent.serve)."""
        agent = self._ours.host.agent
        assert agent is not None
        found = re.search(r"ready after (\d+) ms", agent.log)
        if found is None:
            raise PluginError("the agent's log does not say after what time it was ready", operation="restart")
        return int(found[1]) / 1000


QUESTION = Question(
    name="agent",
    text="What does the agent itself cost: memory, idle processor time, a restart, STATUS, with few pods and many?",
    places=(Place.HOST,),
    measure=measure,
    goals=(Goal("memory/*", LIMIT, 1.0), Goal("memory-adopted/*", LIMIT, 1.0), Goal("adopt/*", LIMIT, 1.0)),
)
