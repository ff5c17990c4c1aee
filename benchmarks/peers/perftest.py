"""perftest (ib_send_lat, ib_write_bw …) between the two pods of a pair; the cost of one operation.

Everything sleeps on completion events (-e), as polling on one processor measures the scheduler. ib_write_bw and
ib_write_lat cannot: the first runs here while the testbed's cgroup is idle (cpu.idle), so that it polls only when
nobody else, rxe's workers included, has anything to do; the second, whose two ends both poll, not at all. The latency
of a WRITE is therefore that of ib_write_bw with one request at a time.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.namespaces import Pair
from rdmanet.errors import UnavailableError
from testbed.container import CommandError, Completed, Process, cgroup2_root
from testbed.demo.rdma import last_figures, wait_for_line
from testbed.paths import BUILD
from testbed.rows import StepError

LISTENING = "Waiting for client"
#: perftest 4.5's ib_send_lat takes one completion per event: when two come with one it waits for ever, on any path.
#: Its messages of 4 KiB do so once in a hundred, and each run may.
STALLED_S = 10.0
ATTEMPTS = 30
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Test:
    """One of perftest's tools, and what it is told."""

    program: str
    options: tuple[str, ...]
    polls: bool = False

    @property
    def latency(self) -> bool:
        """Whether its table is a latency test's."""
        return self.program.endswith("_lat")


TESTS = {
    # -C: in cycles, as the conversion measures the clock's rate for 0.2 s at each end.
    "send-lat": Test("ib_send_lat", ("-e", "-C")),
    "read-lat": Test("ib_read_lat", ("-e", "-C")),
    "write-lat": Test("ib_write_bw", ("-t", "1"), polls=True),
    "send-bw": Test("ib_send_bw", ("-e",)),
    "read-bw": Test("ib_read_bw", ("-e",)),
    "write-bw": Test("ib_write_bw", (), polls=True),
}


def cost_us(pair: Pair, name: str, size_bytes: int, iterations: int, version: int = 4) -> float:
    """Microseconds per operation of `TESTS[name]`: latency tests' average, or the time per message of a stream.

    Addresses of IP `version` are used. A run that stalls, or that could not tell the clock's rate, is made again;
    UnavailableError when all do, CommandError when a tool fails.
    """
    why = "stalled"
    for _ in range(ATTEMPTS):
        try:
            with _idle() if TESTS[name].polls else contextlib.nullcontext():
                done = _run(pair, TESTS[name], size_bytes, iterations, version)
        except (TimeoutError, CommandError) as error:
            if isinstance(error, CommandError) and error.completed.returncode is not None:
                raise
            why = "stalled"
            continue
        found_us = each_us(TESTS[name], size_bytes, last_figures(done))
        if found_us is not None:
            return found_us
        why = "printed nothing but zeros"
    raise UnavailableError(f"{TESTS[name].program} failed {ATTEMPTS} times in a row; the last one {why}", subject=name)


def each_us(test: Test, size_bytes: int, figures: list[float]) -> float | None:
    """Microseconds per operation in a tool's table; None where it printed zeros.

    It measures the rate of the clock before it starts, and takes 0 for it when its samples do not lie on a line
    (perftest, get_clock.c, sample_get_cpu_mhz), as on a busy machine: every rate is 0 then.
    """
    if test.latency:
        return figures[5] / _clock_mhz() or None
    mib_s, million_per_s = figures[3], figures[4]
    if not mib_s and not million_per_s:
        return None
    # They are printed with two and six digits: take the one with more of them.
    return 1 / million_per_s if million_per_s * 1e6 > mib_s * 1e2 else size_bytes / (1 << 20) / mib_s * 1e6


def _run(pair: Pair, test: Test, size_bytes: int, iterations: int, version: int) -> Completed:
    """Both ends, once; what the client printed. TimeoutError or CommandError (status None) when it stalls."""
    ends = []
    for end in (pair.server, pair.client):
        # The GID by its index: the first one is link-local, which does not get through a router.
        argv = [test.program, "-d", end.device, "-x", str(end.gid_index(version)), "-F", *test.options]
        ends.append([*argv, "-s", str(size_bytes), "-n", str(iterations)])
    (BUILD / "peers").mkdir(parents=True, exist_ok=True)
    with (
        (BUILD / "peers" / f"{test.program}.log").open("wb") as log,
        # Line by line: what says that the server listens would else stay in its buffer.
        pair.server.pod.popen(["stdbuf", "-oL", *ends[0]], stdout=subprocess.PIPE, stderr=log.fileno()) as server,
    ):
        _wait_until_listening(server)
        while True:
            done = pair.client.pod.exec([*ends[1], pair.server.addresses[4]], timeout_s=STALLED_S, check=False)
            # It says that it waits just before it listens.
            early = done.returncode != 0 and "connect" in done.stdout + done.stderr and server.poll() is None
            if not early:
                break
        if done.returncode is None:
            raise CommandError("stalled", done)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip()[-300:]
            raise CommandError(f"ended with status {done.returncode}: {said!r}", done)
        server.wait(STALLED_S)
    return done


def _wait_until_listening(server: Process) -> None:
    """TimeoutError when it does not say that it listens, as where instructions are counted and the machine around is
    busy: whenever the guest waits for its disk alone, its time goes to the next timer at once, which may be this one.
    """
    try:
        wait_for_line(server, LISTENING, STALLED_S)
    except StepError as error:
        raise TimeoutError(str(error)) from error


@contextlib.contextmanager
def _idle() -> Iterator[None]:
    """Everything of the testbed's yields to everybody else (Documentation/admin-guide/cgroup-v2.rst, cpu.idle).

    A process's own SCHED_IDLE counts within its cgroup only. Nothing changes where the cpu controller is elsewhere.
    """
    switch = cgroup2_root() / "rdmanet-testbed/cpu.idle"
    if not switch.exists():
        yield
        return
    before = switch.read_text()
    switch.write_text("1")
    try:
        yield
    finally:
        switch.write_text(before)


def _clock_mhz() -> float:
    """What perftest takes as the rate of its cycles."""
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1])
    raise UnavailableError("this machine does not say how fast its clock is", subject=str(CPUINFO))
