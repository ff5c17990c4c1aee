"""What redirect_peer brings into a pod was let in by its ingress policy: every way, and every way around, live."""

from __future__ import annotations

import pytest

from rdmanet.errors import UnavailableError
from testbed.bpf import lab as labs
from testbed.bpf.redirects import Redirects, carry_out
from testbed.container import cgroup2_root


def test_nobody_gets_around_ingress_policy() -> None:
    labs.require_root()
    try:
        cgroup2_root()
    except UnavailableError as error:
        pytest.skip(str(error))
    with Redirects.build(labs.artifact()) as lab:
        proof = carry_out(lab)
    assert proof.wrong == []
    assert proof.attempts > 100
    assert proof.stopped > 50
