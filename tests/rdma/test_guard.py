"""What the guard keeps from leased and unleased queue pairs, with an agent's programs in between: the row `guard` of
the acceptance proof, small."""

from __future__ import annotations

from benchmarks.accept.rdma.guard import Sizes, all_attempts
from benchmarks.peers import namespaces
from rdmanet.model import GuardMode, RdmaMode


def test_attempts_are_dropped_and_counted(rdma_mode: RdmaMode) -> None:
    with namespaces.agent_host("guard") as host:
        # `observe` needs pods of its own, which take their time; its verdicts are in tests/bpf.
        results = all_attempts(host, Sizes(guesses=100, repeats=20, real=5), [GuardMode.ENFORCE])
    (cases,) = results.values()
    assert [sum(case.endswith(f"IPv{version}") for case in cases) for version in (4, 6)] == [15, 15], sorted(cases)
