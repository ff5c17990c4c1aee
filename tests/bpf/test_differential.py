"""Random policies and services: programs, sockets, leases and iptables against the plain model of Kubernetes."""

from __future__ import annotations

import shutil
from random import Random

import pytest

from testbed.semantics.network_policy import Judgement
from tests.bpf import lab as labs
from tests.bpf.differential import PolicyLab, Tally


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "random"])
def test_policies(fixed: bool) -> None:
    labs.require_root()
    if shutil.which("ip6tables-restore") is None:
        pytest.skip("ip6tables-restore is missing: apt-get install iptables")
    seed = 5 if fixed else Random().randrange(1 << 32)
    print(f"seed {seed}")
    random, tally = Random(seed), Tally()
    with PolicyLab.build(labs.artifact()) as lab:
        for _ in range(12):
            lab.compare(tally, random, flows=60, live=40)
            assert tally.disagreements == [], seed
    assert set(tally.judgements) == set(Judgement)
    assert tally.cases > 2000
