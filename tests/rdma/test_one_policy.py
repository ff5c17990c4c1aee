"""One policy for both worlds, with an agent's programs between: the row `one-policy` of the acceptance proof, small."""

from __future__ import annotations

from benchmarks.accept.datapath.one_policy import CASES, NAMES, PACKETS, prove
from rdmanet.model import RdmaMode


def test_leases_follow_policy(rdma_mode: RdmaMode) -> None:
    few = [case for case in CASES if case.name in ("no policy", "nobody but one pair")]
    figure = prove(few, families=(6,))  # of transfers under way and of perftest; everything else over both
    pairs, families = len(NAMES) * (len(NAMES) - 1), 2
    refused = (pairs - 1) * families  # each was told a sentence besides
    assert figure.more["matrix"] == len(few) * pairs * families * 2 + refused
    # Of each transport and family, twice: before policy allows again, and after.
    assert figure.more["dropped"] == {"roce_revoked": PACKETS * 8, "roce_nat": PACKETS * families}
