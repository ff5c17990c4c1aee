"""A runtime that container runtimes can trust: real clients, crashes, repairs, upgrades, hostile input."""

from __future__ import annotations

from benchmarks.accept.proof import Claim, Place, Proof, Work, later


def _of(module: str) -> Work:
    return later(__name__, module)


_HERE = (Place.HOST,)
_BOTH = (Place.HOST, Place.SHARED)

#: In the order of the issue. A row that needs RDMA runs in the virtual machine, in Claim's own place.
ROWS: Proof = {
    "spec": Claim(_of("spec"), _HERE),
    "podman": Claim(_of("podman"), _BOTH),
    "containerd": Claim(_of("containerd"), _BOTH),
    "chain": Claim(_of("chain"), _HERE),
    "kill": Claim(_of("kill"), _BOTH),
    "disk-full": Claim(_of("disk_full"), _HERE),
    "database": Claim(_of("database"), _HERE),
    "reboot": Claim(_of("reboot"), _HERE),
    "load": Claim(_of("load"), _HERE),
    "growth": Claim(_of("growth"), _HERE),
    "reconcile": Claim(_of("reconcile"), _BOTH),
    "upgrade": Claim(_of("upgrade")),
    "fuzz": Claim(_of("fuzz"), _HERE),
    "caps": Claim(_of("caps"), _BOTH),
}
