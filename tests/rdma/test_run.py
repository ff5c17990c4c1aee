"""`rdmanet run --rdma`: each rank has its own device and what it needs to use it, in both modes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmanet.model import RdmaMode
from testbed import training
from testbed.host import Host
from testbed.jobs import Ended, Job, left, python, run
from testbed.rows import need

PODS = 2
JOB = ("--pods", str(PODS), "--rdma")
SMALL = ("--hidden", "20", "--steps", "2")
LOOK = """
import json, os
from pathlib import Path
nodes = sorted(os.listdir("/dev/infiniband"))
print(json.dumps({
    "device": os.environ["RDMANET_DEVICE"],
    "nodes": nodes,
    "seen": sorted(os.listdir("/sys/class/infiniband")),
    "own": [Path("/sys/class/infiniband_verbs", n, "ibdev").read_text().strip() for n in nodes if n[0] == "u"],
}))
"""


@pytest.fixture
def ready(host: Host) -> Iterator[Host]:
    """With an agent; nothing of jobs is left."""
    host.start_agent()
    yield host
    assert left(host) == []
    host.stop_agent()
    host.uninstall()


def succeeded(ended: Ended) -> Ended:
    need(ended.code == 0, f"{ended.code}: {ended.stdout}{ended.stderr}")
    return ended


@pytest.mark.both_modes
def test_ranks_have_their_own_devices_and_train(ready: Host, rdma_mode: RdmaMode, tmp_path: Path) -> None:
    ended = succeeded(run(ready, *JOB, *python(LOOK)))
    found = [ended.json(rank) for rank in range(PODS)]
    assert len({one["device"] for one in found}) == PODS
    for one in found:
        assert one["own"] == [one["device"]]
        assert len(one["nodes"]) == 2
        if rdma_mode is RdmaMode.EXCLUSIVE:
            assert one["seen"] == [one["device"]]
    alone = training.alone(ready, *SMALL)
    file = tmp_path / "parameters.npy"
    with Job(ready, *JOB, "--family", "6", *training.command(*SMALL, "--family", "6", "--save", str(file))) as job:
        reports, _ = training.trained(job, PODS, file, alone)
    assert {report["transport"] for report in reports} == {"rdma"}
