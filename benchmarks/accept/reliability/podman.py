"""Row `podman`: real containers of Debian's podman on our network, by TCP and, where the kernel has it, RDMA."""

from __future__ import annotations

from benchmarks.accept.reliability import runtimes
from testbed.host import Host
from testbed.podman import IMAGE, Podman
from testbed.rows import Figure

TESTS = (
    "tests/kernel/test_podman.py",
    "tests/kernel/test_runtime_guides.py::test_podman",
    "tests/kernel/test_reboot.py::test_podman_starts_its_containers_again",
)


def measure() -> Figure:
    """What `podman run` takes, then everything else."""
    rdma = runtimes.with_rdma("tests/rdma/test_podman.py")
    if rdma is not None:
        return rdma
    with Host.scratch("accept-podman") as host:
        host.start_agent()
        with Podman.start(host) as podman:
            podman.network("net", [{"type": "rdmanet"}])
            ours_ms = runtimes.median_ms(lambda: podman("run", "--rm", "--network", "net", IMAGE, "true"))
            alone_ms = runtimes.median_ms(lambda: podman("run", "--rm", "--network", "none", IMAGE, "true"))
    return runtimes.figure("podman run", ours_ms, "no network", alone_ms, TESTS)
