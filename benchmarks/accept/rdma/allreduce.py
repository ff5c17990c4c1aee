"""Row `allreduce`: examples/allreduce in four pods, over leased queue pairs and over TCP, beside one process alone."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.namespaces import End, agent_host, attached
from testbed.host import Host
from testbed.paths import BUILD, REPOSITORY
from testbed.progress import say
from testbed.rows import Figure, need

PODS = ("train-0", "train-1", "train-2", "train-3")
#: Transport → what the datapath counts it as.
PATHS = {"rdma": "roce", "tcp": "ip"}
#: Headers, acknowledgements and what else a pod says, of what the ring sends.
MOST_OVERHEAD = 1.5
FAMILIES = (4, 6)
#: Units of the hidden layer: gradients of 4 KB to 1 MB.
HIDDEN = (12, 50, 200, 800, 3200)
STEPS = 8
#: A missing or doubled share of a float64 gradient is ten orders of magnitude above it.
ROUNDING = 1e-12
PLOT = BUILD / "accept" / "rdma-allreduce"
TIMEOUT_S = 600.0

#: What one pod prints of one training (examples/allreduce/__main__.py).
Report = dict[str, Any]


def train(
    ends: Sequence[End],
    transports: Sequence[str],
    family: int,
    hidden: Sequence[int],
    steps: int,
    *,
    compare: bool,
    timeout_s: float = TIMEOUT_S,
) -> list[list[Report]]:
    """Run the example in all pods at once; for each transport and size of the hidden layer what every pod reports, in
    their order. To `compare`, the first trains alone as well.

    CommandError with a program's last words when one fails.
    """
    argv = [sys.executable, "-m", "examples.allreduce", "--transport", ",".join(transports), "--steps", str(steps)]
    argv += ["--pods", ",".join(end.pod.name for end in ends), "--hidden", ",".join(map(str, hidden))]
    argv += ["--addresses", ",".join(end.addresses[family] for end in ends)]
    # More threads than processors would take them from each other, and from Soft-RoCE.
    environment = {"OPENBLAS_NUM_THREADS": "1"}

    def run(end: End) -> list[Report]:
        own = [*argv, "--compare"] if compare and end is ends[0] else argv
        done = end.pod.exec(own, cwd=str(REPOSITORY), environment=environment, timeout_s=timeout_s)
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(len(ends)) as executor:
        return [list(reports) for reports in zip(*executor.map(run, ends), strict=True)]


def agreement(trainings: Sequence[Sequence[Report]]) -> float:
    """How far parameters and losses of a model are from those of one process alone, at most, in absolute numbers.

    `trainings` are all of one model, each with every pod's report. StepError unless all of them ended with the same
    bits, and within rounding of the process alone.
    """
    reports = [report for training in trainings for report in training]
    digests = {report["parameters_sha256"] for report in reports}
    hidden = reports[0]["hidden"]
    need(len(digests) == 1, f"{len(digests)} different results of {len(reports)} processes, {hidden} hidden units")
    alone = next(report["alone"] for report in reports if "alone" in report)
    losses = zip(*(report["losses"] for report in (*reports, alone)), strict=True)
    difference = max(alone["difference"], *(max(loss) - min(loss) for loss in losses))
    need(difference < ROUNDING, f"{difference:.3g} from one process alone, {hidden} hidden units")
    first, last = alone["losses"][0], alone["losses"][-1]
    need(last < first, f"nothing was learned: the loss went from {first:.3g} to {last:.3g}, {hidden} hidden units")
    return float(difference)


def sent_bytes(host: Host, path: str) -> dict[str, int]:
    """Pod → bytes that it has sent as ``roce`` or ``ip``, as the datapath counted them."""
    rows = host.api("GET", "/v1/status")["attachments"]
    return {row["pod"]: row["counters"].get(f"from_pod_{path}", {"bytes": 0})["bytes"] for row in rows}


def ring_bytes(trainings: Sequence[Sequence[Report]], transport: str) -> int:
    """What each process sends over a transport at least: nearly the whole gradient in either round of a step."""
    return sum(
        2 * reports[0]["gradient_bytes"] * (len(reports) - 1) // len(reports) * len(reports[0]["losses"])
        for reports in trainings
        if reports[0]["transport"] == transport
    )


def carried(host: Host, trainings: Sequence[Sequence[Report]], before: dict[str, dict[str, int]]) -> None:
    """StepError unless RDMA went as RoCE and TCP did not, by the datapath's counters since `before`."""
    for transport, path in PATHS.items():
        expected = ring_bytes(trainings, transport)
        for pod, count in sent_bytes(host, path).items():
            sent = count - before[path][pod]
            need(
                expected <= sent < MOST_OVERHEAD * expected,
                f"{pod} sent {sent} bytes as {path}; over {transport} the ring needs {expected}",
            )


def measure() -> Figure:
    """Both transports over both families: equal results, what carried them, and the time of a step by its message."""
    results: dict[int, list[list[Report]]] = {}
    with agent_host("allreduce") as host, attached(host, PODS) as ends:
        for family in FAMILIES:
            before = {path: sent_bytes(host, path) for path in PATHS.values()}
            say(f"allreduce: {len(PODS)} pods train {len(HIDDEN)} models over RDMA and TCP, IPv{family}")
            results[family] = train(ends, tuple(PATHS), family, HIDDEN, STEPS, compare=not results)
            carried(host, results[family], before)
        leases = host.api("GET", "/v1/status")["leases"]
        need(not leases, f"{len(leases)} leases are left")
    trainings = [reports for trained in results.values() for reports in trained]
    differences = [agreement([reports for reports in trainings if reports[0]["hidden"] == hidden]) for hidden in HIDDEN]
    steps = [row for family, trained in results.items() for row in step_times(family, trained)]
    files = draw(steps)
    return Figure(
        max(differences),
        "off one process",
        f"largest difference of losses and parameters; {len(PODS)} pods, RDMA and TCP, IPv4 and IPv6, {STEPS} steps "
        f"of {len(HIDDEN)} models, each of them with equal bits in {len(PATHS) * len(FAMILIES) * len(PODS)} processes; "
        f"{sentence(steps)}; drawn in {', '.join(files)}",
        {"differences": dict(zip(HIDDEN, differences, strict=True)), "steps": steps},
    )


def step_times(family: int, trained: Sequence[Sequence[Report]]) -> list[dict[str, Any]]:
    """Per model: milliseconds of a step, of its all-reduce and of making the ring. A step is as slow as its slowest
    process; the first one, with cold memory, does not count."""
    rows = []
    for reports in trained:
        rows.append(
            {
                "transport": reports[0]["transport"],
                "family": family,
                "gradient_bytes": reports[0]["gradient_bytes"],
                "step_ms": [1000 * max(times) for times in zip(*(r["step_s"][1:] for r in reports), strict=True)],
                "reduce_ms": [1000 * max(times) for times in zip(*(r["reduce_s"][1:] for r in reports), strict=True)],
                "ready_ms": 1000 * max(report["ready_s"] for report in reports),
            }
        )
    return rows


def sentence(steps: Sequence[dict[str, Any]]) -> str:
    """Median steps of the smallest and the largest message."""
    sizes = sorted({row["gradient_bytes"] for row in steps})
    parts = []
    for size in (sizes[0], sizes[-1]):
        medians = []
        for transport in PATHS:
            times = [
                t for r in steps if (r["gradient_bytes"], r["transport"]) == (size, transport) for t in r["step_ms"]
            ]
            medians.append(f"{statistics.median(times):.3g} ms {transport.upper()}")
        parts.append(f"a step with {size / 1000:.3g} KB of gradients {', '.join(medians)}")
    return "; ".join(parts)


def draw(steps: Sequence[dict[str, Any]]) -> list[str]:
    """The figure's files."""
    from benchmarks.step_plot import draw_steps

    PLOT.parent.mkdir(parents=True, exist_ok=True)
    return [str(file.relative_to(REPOSITORY)) for file in draw_steps(steps, PLOT)]
