"""Row `mpi`: an Open MPI job (mpi4py, all-reduce with checked sums) over UCX between pods; counters prove RoCE.

mpirun runs inside the first pod and starts the others through a launch agent that enters them, as `kubectl exec` would.
What each pod's processes are told is what `rdmanet.verbs env` says there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accept.rdma.perftest import FAMILIES
from benchmarks.peers import namespaces, programs
from benchmarks.peers.namespaces import End
from testbed.container import CommandError
from testbed.host import Host
from testbed.launcher import AGENT, Launcher
from testbed.rows import Figure, StepError, need

JOB = Path(__file__).with_name("mpi_job.py")
#: The distribution's Python has mpi4py.
PYTHON = "/usr/bin/python3"
PODS = ("mpi-0", "mpi-1", "mpi-2", "mpi-3")
RANKS = len(PODS)
COUNT = 65536  # of 8 bytes
ROUNDS = 4
TIMEOUT_S = 180.0


def mpirun(ends: Sequence[End], count: int, rounds: int) -> list[str]:
    """The command line, one rank per pod."""
    names = ("rsh", "ssh")  # as it is called in Open MPI 4 and 5, which pass over what they do not know
    launching = [("agent", " ".join(AGENT)), ("no_tree_spawn", "1")]
    return [
        *("mpirun", "--allow-run-as-root"),
        *(word for name in names for key, value in launching for word in ("--mca", f"plm_{name}_{key}", value)),
        # Ranks that never yield take the processors that Soft-RoCE needs.
        *("--mca", "mpi_yield_when_idle", "1"),
        *("--host", ",".join(end.pod.name for end in ends), "-np", str(len(ends))),
        *(PYTHON, str(JOB), str(count), str(rounds)),
    ]


def introduce(ends: Sequence[End]) -> None:
    """Let the pods know each other's addresses by name, as a cluster's name service does: mpirun asks for them, and
    waits long for no answer."""
    lines = "".join(f"{end.addresses[4]} {end.pod.name}\n" for end in ends)
    for end in ends:
        end.pod.exec(["sh", "-c", "cat >>/run/hosts"], input=lines)


def run(
    host: Host, ends: Sequence[End], environments: dict[str, dict[str, str]], count: int, rounds: int
) -> dict[str, int]:
    """The job once; StepError unless every rank ran in its own pod and checked every sum. The counters."""
    before = programs.traffic(host, ends)
    first = ends[0].pod
    with Launcher(first, [end.pod for end in ends], environments):
        try:
            done = first.exec(
                mpirun(ends, count, rounds), timeout_s=TIMEOUT_S, environment=environments.get(first.name)
            )
        except CommandError as error:
            said = (error.completed.stdout + error.completed.stderr).strip()[-600:]
            raise StepError(f"mpirun failed: {error.sentence}: {said}") from error
    moved = programs.traffic(host, ends).since(before)
    said = json.loads(done.stdout.strip().splitlines()[-1])
    need(said["ranks"] == len(ends), f"{said['ranks']} ranks ran, not {len(ends)}")
    need(sorted(said["hosts"]) == sorted(end.pod.name for end in ends), f"the ranks ran in {said['hosts']}")
    need(said["elements"] == len(ends) * count * rounds, f"{said['elements']} sums were checked")
    return {
        "sums": said["elements"],
        "roce_bytes": moved.roce_bytes,
        "roce_packets": moved.roce_packets,
        "other_bytes": moved.other_bytes,
    }


def least_bytes(ranks: int, count: int, rounds: int) -> int:
    """No all-reduce sends fewer than this between the ranks: each has to send 2 (N-1)/N of the vector."""
    return 2 * (ranks - 1) * 8 * count * rounds


def over_roce(
    host: Host, ends: Sequence[End], told: Sequence[dict[str, str]], count: int, rounds: int
) -> dict[str, int]:
    """The job with what `rdmanet.verbs env` says; StepError unless RoCE carried it all."""
    environments = {end.pod.name: variables for end, variables in zip(ends, told, strict=True)}
    result = run(host, ends, environments, count, rounds)
    least = least_bytes(len(ends), count, rounds)
    need(result["roce_bytes"] >= least, f"RoCE carried {result['roce_bytes']} bytes of at least {least}")
    need(result["other_bytes"] < least / 2, f"{result['other_bytes']} bytes went beside RoCE")
    return result


def measure() -> Figure:
    """Two and four pods, both families, and the same job without the settings: that one goes by TCP."""
    results: dict[str, dict[str, int]] = {}
    with namespaces.agent_host("mpi") as host, namespaces.attached(host, PODS, 9000) as ends:
        introduce(ends)
        told = programs.told_all(ends)
        for family in FAMILIES:
            results[f"{RANKS} pods, IPv{family}"] = over_roce(host, ends, told[family], COUNT, ROUNDS)
        results["2 pods, IPv4"] = over_roce(host, ends[:2], told[4][:2], COUNT, ROUNDS)
        control = run(host, ends, {}, COUNT, ROUNDS)
        results[f"{RANKS} pods without the settings"] = control
    least = least_bytes(RANKS, COUNT, ROUNDS)
    need(
        control["roce_bytes"] < least <= control["other_bytes"],
        f"the counters do not tell RoCE from TCP: without settings {control}",
    )
    sums = sum(result["sums"] for result in results.values())
    return Figure(
        sums,
        "sums",
        f"of all-reduces by mpi4py between 2 and {RANKS} pods, all right; over UCX RoCE carried at least what an "
        "all-reduce needs, IPv4 and IPv6; without the settings Open MPI took TCP",
        {"results": results},
    )
