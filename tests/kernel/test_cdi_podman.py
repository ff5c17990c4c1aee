"""A CDI file of ours, read by a real runtime: podman gives its container the node and the variables, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rdmanet import cdi
from testbed.container import Completed
from testbed.host import Host
from testbed.session import session

DEVICE = "rdmanet.io/rdma=slot-3"
#: A node that everybody may use in the place of a verbs one, and whose use can be seen: /dev/null's numbers.
NODES = [cdi.Node("/dev/infiniband/uverbs3", 1, 3)]
VARIABLES = {"RDMANET_DEVICE": "rxe_rn7", "NCCL_IB_HCA": "=rxe_rn7:1"}
ROOT = "/run/image"
STORAGE = ["--root", "/run/podman", "--runroot", "/run/podman-run", "--storage-driver", "vfs"]
LIMITS = ["--pids-limit", "0", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
PODMAN = ["podman", "--cgroup-manager", "cgroupfs", *STORAGE, "run", "--rm", "--network", "none", *LIMITS]


def run(host: Host, device: str) -> Completed:
    script = "ls /dev/infiniband; echo $RDMANET_DEVICE $NCCL_IB_HCA; echo x > /dev/infiniband/uverbs3"
    parent = f"/rdmanet-testbed/{session().id}-podman"  # which goes with the session
    argv = [*PODMAN, "--cgroup-parent", parent, "--device", device, "--rootfs", ROOT, "/bin/sh", "-c", script]
    return host.exec(argv, check=False, timeout_s=120)


def test_podman_reads_it(host: Host) -> None:
    missing = [program for program in ("podman", "busybox") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} missing; install podman and busybox-static")
    busybox = Path(str(shutil.which("busybox"))).resolve()
    host.exec(["mkdir", "-p", *(f"{ROOT}/{name}" for name in ("bin", "etc", "proc", "sys", "dev"))])
    for applet in ("sh", "ls"):
        host.exec(["cp", str(busybox), f"{ROOT}/bin/{applet}"])
    cdi.write(host.path("/run/cdi"), DEVICE, cdi.document(DEVICE, NODES, VARIABLES))
    done = run(host, DEVICE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["uverbs3", "rxe_rn7", "=rxe_rn7:1"]
    done = run(host, "rdmanet.io/rdma=slot-4")
    assert done.returncode != 0
    assert "unresolvable CDI devices rdmanet.io/rdma=slot-4" in done.stderr
    cdi.remove(host.path("/run/cdi"), DEVICE)
    assert run(host, DEVICE).returncode != 0, "a container got a device that is gone"
