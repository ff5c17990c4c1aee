"""RDMA for pods: leases that are fast, limited, isolated and usable by what people run."""

from __future__ import annotations

from benchmarks.accept.proof import Claim, Place, Proof
from benchmarks.accept.rdma import (
    allreduce,
    batch,
    counters,
    faults,
    guard,
    isolation,
    leaks,
    library,
    modes,
    mpi,
    perftest,
    pool,
    quota,
    rdma_core_tests,
    ucx,
)

#: In the order of the issue. Each row's module is imported here; modules import what is heavy where they need it.
ROWS: Proof = {
    "library": Claim(library.measure),
    "batch": Claim(batch.measure),
    "pool": Claim(pool.measure),
    "quota": Claim(quota.measure),
    "isolation": Claim(isolation.measure),
    "guard": Claim(guard.measure),
    "modes": Claim(modes.measure, (Place.SHARED, Place.EXCLUSIVE, Place.DISTRIBUTION)),
    "counters": Claim(counters.measure),
    "perftest": Claim(perftest.measure),
    "ucx": Claim(ucx.measure),
    "mpi": Claim(mpi.measure),
    "rdma-core-tests": Claim(rdma_core_tests.measure),
    "allreduce": Claim(allreduce.measure),
    "faults": Claim(faults.measure),
    "leaks": Claim(leaks.measure),
}

__all__ = ["ROWS", "Claim"]
