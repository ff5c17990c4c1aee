"""Random policies and services: programs, sockets, leases and iptables against the plain model of Kubernetes."""

from __future__ import annotations

import shutil
from random import Random

import pytest

from rdmanet.errors import UnavailableError
from testbed.bpf import lab as labs
from testbed.bpf.differential import PolicyLab, Tally
from testbed.bpf.service_differential import ServiceLab
from testbed.container import cgroup2_root
from testbed.semantics.network_policy import Judgement


@pytest.fixture(params=["fixed", "random"])
def random(request: pytest.FixtureRequest) -> Random:
    """Its seed is printed."""
    labs.require_root()
    if shutil.which("ip6tables-restore") is None:
        pytest.skip("ip6tables-restore is missing: apt-get install iptables")
    seed = 5 if request.param == "fixed" else Random().randrange(1 << 32)
    print(f"seed {seed}")
    return Random(seed)


def test_policies(random: Random) -> None:
    tally = Tally()
    with PolicyLab.build(labs.artifact()) as lab:
        for _ in range(8):
            lab.compare(tally, random, flows=60, live=40)
            assert tally.disagreements == []
    assert set(tally.judgements) == set(Judgement)
    assert tally.cases > 1500


def test_services(random: Random) -> None:
    try:
        cgroup2_root()
    except UnavailableError as error:
        pytest.skip(str(error))
    tally = Tally()
    with ServiceLab.build(labs.artifact()) as lab:
        for _ in range(2):
            lab.compare(tally, random, live=60, beside=30)
            assert tally.disagreements == []
    assert tally.cases > 1500
