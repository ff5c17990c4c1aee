"""Row `containerd`: real pods of Debian's containerd, asked by CRI, by TCP and, where the kernel has it, RDMA."""

from __future__ import annotations

import itertools

from benchmarks.accept.reliability import runtimes
from testbed.containerd import Containerd
from testbed.host import Host
from testbed.rows import Figure

TESTS = (
    "tests/kernel/test_containerd.py",
    "tests/kernel/test_runtime_guides.py::test_containerd",
    "tests/kernel/test_reboot.py::test_containerd_removes_its_old_pods_and_runs_others",
)
#: What to compare with: containerd wants addresses from whatever network there is.
PTP = {"type": "ptp", "ipam": {"type": "host-local", "dataDir": "/run/host-local", "subnet": "10.214.0.0/16"}}
_numbers = itertools.count()


def measure() -> Figure:
    """What a pod takes from RunPodSandbox to RemovePodSandbox, then everything else."""
    rdma = runtimes.with_rdma("tests/rdma/test_containerd.py")
    if rdma is not None:
        return rdma
    with Host.scratch("accept-containerd") as host:
        host.start_agent()
        with Containerd.start(host) as containerd:
            taken = []
            for plugin in ({"type": "rdmanet"}, PTP):
                containerd.network("net", [plugin])
                taken.append(runtimes.median_ms(lambda: _once(containerd)))
    return runtimes.figure("a pod, run and removed,", taken[0], "Debian's ptp for IPv4 alone", taken[1], TESTS)


def _once(containerd: Containerd) -> None:
    containerd.remove_pod(containerd.run_pod(f"pod-{next(_numbers)}").id)
