"""Row `run-crash`: every way out of `rdmanet run`, some of them at random moments: nothing may be left of any.

Ranks hold an RDMA device open. After each way what a host has of jobs is counted: records, namespaces, cgroups and
processes, attachments, RDMA devices; where the launcher was killed, after `rdmanet run --cleanup`.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.peers.namespaces import agent_host
from testbed.host import Host, diff
from testbed.jobs import Job, left, run
from testbed.rows import Figure, StepError, need

PODS = 2
HOLD = 'echo there $RANK; exec ib_send_lat -d "$RDMANET_DEVICE" -x "$RDMANET_GID_INDEX" -F'
JOB = ("--pods", str(PODS), "--rdma", "--grace-s", "1", "--name", "crash")
RANDOM_KILLS = 8
RANDOM_SIGNALS = 4
RANDOM_AGENT_KILLS = 3
SEED = 7
AGAIN_S = 60.0


def measure() -> Figure:
    """Leaks."""
    leaks: dict[str, list[str]] = {}
    choice = random.Random(SEED)
    with agent_host("run-crash") as host:
        began_s = time.monotonic()
        need(run(host, *JOB, "--", "true").code == 0, "a job that does nothing failed")
        whole_s = time.monotonic() - began_s
        before, devices = host.dump(), _devices()

        def way(name: str, work: Callable[[], object]) -> None:
            try:
                work()
            except Exception as error:
                raise StepError(f"{name}: {error}") from error
            leaks[name] = left(host) + [f"device {name}" for name in _devices() if name not in devices]

        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            way(f"{one.name} while it runs", partial(_signalled, host, one))
        way("two Ctrl-C of ranks that ignore one", partial(_stubborn, host))
        way("a rank crashes", partial(_crash, host, "kill -SEGV $$", 139))
        way("a rank fails", partial(_crash, host, "exit 3", 3))
        way("a pod's first process is killed", partial(_first_process, host))
        way("the launcher is killed while it runs", partial(_killed, host))
        way("the agent is killed while it runs", partial(_agent_killed, host))
        way("launcher and agent are killed", partial(_both_killed, host))
        for _ in range(RANDOM_KILLS):
            after_s = choice.uniform(0.0, whole_s)
            way(f"the launcher is killed after {after_s:.2f} s", partial(_killed, host, after_s))
        for number in range(RANDOM_SIGNALS):
            after_s = choice.uniform(0.0, whole_s)
            one = (signal.SIGINT, signal.SIGTERM)[number % 2]
            way(f"{one.name} after {after_s:.2f} s", partial(_signalled, host, one, after_s))
        for _ in range(RANDOM_AGENT_KILLS):
            after_s = choice.uniform(0.0, whole_s)
            way(f"the agent is killed after {after_s:.2f} s", partial(_agent_killed, host, after_s))
        after = host.dump()
        for dump in (before, after):
            del dump["state"]  # the agent's database
        leaks["all of it"] = diff(before, after)
    found = {name: what for name, what in leaks.items() if what}
    need(not found, f"left: {found}")
    detail = (
        f"leaks after {len(leaks) - 1} ways out: signals, crashes of ranks, of first processes and of the agent, the"
        f" launcher killed while it runs and at {RANDOM_KILLS} random moments, signals at {RANDOM_SIGNALS}, the agent"
        f" killed at {RANDOM_AGENT_KILLS}"
    )
    return Figure(0, "leaks", detail, {"seed": SEED, "ways": list(leaks), "job_s": whole_s})


def _devices() -> list[str]:
    """RDMA devices: in shared mode sysfs shows all of the machine's."""
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def _started(job: Job) -> None:
    job.wait_for(*(f"there {rank}" for rank in range(PODS)))


def _hold(host: Host) -> Job:
    return Job(host, *JOB, "--", "sh", "-c", HOLD)


def _signalled(host: Host, number: signal.Signals, after_s: float | None = None) -> None:
    with _hold(host) as job:
        if after_s is None:
            _started(job)
        else:
            time.sleep(after_s)
        job.signal(number)
        with contextlib.suppress(TimeoutError):
            job.process.wait(AGAIN_S)
        if "KeyboardInterrupt" in job.stderr:  # before our first line Python may ignore it: people try again
            job.signal(number)
        ended = job.end()
    # Before the launcher takes signals the kernel ends it, or Python where SIGINT comes before our first line.
    early = ended.code == -number or "init_import_site" in ended.stderr
    need(ended.code == 128 + number or (after_s is not None and early), f"it gave {ended.code}: {ended.stderr}")
    if early:
        _cleanup(host)


def _stubborn(host: Host) -> None:
    # Both: signals that are pending together come in any order.
    program = "trap '' INT TERM; echo there $RANK; while :; do sleep 1000; done"
    with Job(host, *JOB, "--", "sh", "-c", program) as job:
        _started(job)
        job.signal(signal.SIGINT)
        job.signal(signal.SIGTERM)
        code = job.end().code
    need(code == 137, f"two signals gave {code}")


def _crash(host: Host, what: str, wanted: int) -> None:
    code = run(host, *JOB, "--", "sh", "-c", f"if [ $RANK = 1 ]; then {what}; fi; {HOLD}").code
    need(code == wanted, f"a rank that does {what} gave {code}")


def _first_process(host: Host) -> None:
    with _hold(host) as job:
        _started(job)
        host.exec(["pkill", "-KILL", "-o", "-P", str(job.process.pid), "-f", "pod_init.py"])
        code = job.end().code
    need(code == 137, f"a first process that was killed gave {code}")


def _killed(host: Host, after_s: float | None = None) -> None:
    with _hold(host) as job:
        if after_s is None:
            _started(job)
        else:
            time.sleep(after_s)
        job.signal(signal.SIGKILL)
        job.end()
    _cleanup(host)


def _cleanup(host: Host) -> None:
    done = run(host, "--cleanup")
    need(done.code == 0, f"--cleanup: {done.stderr}")


def _agent_killed(host: Host, after_s: float | None = None) -> None:
    with _hold(host) as job:
        if after_s is None:
            _started(job)
        else:
            time.sleep(after_s)
        host.kill_agent()
        job.signal(signal.SIGINT)
        job.end()
    host.start_agent()
    _cleanup(host)


def _both_killed(host: Host) -> None:
    with _hold(host) as job:
        _started(job)
        host.kill_agent()
        job.signal(signal.SIGKILL)
        job.end()
    _cleanup(host)
    host.start_agent()
