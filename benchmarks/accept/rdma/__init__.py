"""RDMA for pods: leases that are fast, limited, isolated and usable by what people run."""

from __future__ import annotations

from benchmarks.accept.proof import Claim, Proof

#: In the order of the issue. Each row's module is imported here; modules import what is heavy where they need it.
ROWS: Proof = {}

__all__ = ["ROWS", "Claim"]
