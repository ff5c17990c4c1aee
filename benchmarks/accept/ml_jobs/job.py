"""Row `job`: examples/train in four pods over RDMA gives what one process gives, as a job here and as a Kubernetes Job.

The second training has of its environment what a pod of an Indexed Job has, and nothing of other launchers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accept.rdma.allreduce import MOST_OVERHEAD, sent_bytes
from benchmarks.peers.namespaces import agent_host
from testbed import training
from testbed.host import Host
from testbed.jobs import Gate, Job, left
from testbed.rows import Figure, need

PODS = 4
STEPS = 8
OPTIONS = ("--hidden", "200", "--steps", str(STEPS))
FAMILIES = (4, 6)


def measure() -> Figure:
    """How far the parameters are from one process', at most."""
    differences: dict[str, float] = {}
    with agent_host("job") as host, tempfile.TemporaryDirectory() as folder:
        one = training.alone(host, *OPTIONS)
        for kubernetes in (False, True):
            for family in FAMILIES:
                name = f"{'kubernetes' if kubernetes else 'run'}-{family}"
                file = Path(folder, f"{name}.npy")
                differences[name] = _train(host, name, family, file, one, kubernetes)
        need(left(host) == [], f"left: {left(host)}")
    detail = (
        f"largest difference of parameters; {PODS} ranks of `rdmanet run --rdma`, IPv4 and IPv6, with all variables and"
        f" with a Kubernetes Job's alone: {len(differences)} trainings of {STEPS} steps, equal bits in all ranks, and"
        " RoCE carried what the ring sends (the datapath's counters)"
    )
    return Figure(max(differences.values()), "off one process", detail, {"differences": differences})


def _train(host: Host, name: str, family: int, file: Path, one: tuple[dict[str, Any], Any], kubernetes: bool) -> float:
    command = training.command(*OPTIONS, "--family", str(family), "--save", str(file), kubernetes=kubernetes)
    words = ("--pods", str(PODS), "--rdma", "--family", str(family), "--name", name, *command)
    with Gate(host, "DEL", name) as gate, Job(host, *words, plugin=gate.plugin) as job:
        gate.wait(timeout_s=600.0)
        sent = sent_bytes(host, "roce")
        gate.go(PODS)
        reports, difference = training.trained(job, PODS, file, one)
    # In either round of a step nearly the whole gradient.
    expected = 2 * reports[0]["gradient_bytes"] * (PODS - 1) // PODS * STEPS
    need(len(sent) == PODS, f"the pods were {sorted(sent)}")
    for pod, count in sent.items():
        need(
            expected <= count < MOST_OVERHEAD * expected, f"{pod} sent {count} bytes as RoCE; the ring needs {expected}"
        )
    need({report["transport"] for report in reports} == {"rdma"}, f"{name} did not train over RDMA")
    return difference
