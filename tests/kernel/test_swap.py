"""A running datapath is replaced under traffic; the row `swap` of `make accept` does it a hundred times."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rdmanet.datapath.artifact import Artifact
from testbed.host import ARTIFACT
from testbed.services import Scene
from testbed.swapping import (
    SIZES,
    Traffic,
    be_refused,
    changed,
    offer,
    put_back,
    refused,
    running,
    swap,
    uninstall_under_traffic,
)


def test_nothing_is_lost(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    one, other = Artifact.load(ARTIFACT), changed(tmp_path)
    assert {name for name in one.maps if one.maps[name] != other.maps[name]} == {"drops", "flows", "fragments"}
    offer(one, tmp_path)
    config: dict[str, dict[str, Any]] = {"datapath": {"artifact_dir": str(tmp_path)}, **SIZES}
    with Scene.start("swap", ("one", "two"), config) as scene:
        with Traffic.start(scene, "one", "two") as traffic:
            first = running(scene)
            offer(other, tmp_path)
            second = swap(scene)
            traffic.reach(3)
            offer(one, tmp_path)
            assert swap(scene, by_command=True) == first
            traffic.reach(3)
            put_back(scene, second)
            traffic.reach(3)
            offer(refused(one), tmp_path)
            assert be_refused(scene) == "/var/lib/rdmanet/datapath/verifier.log"
            traffic.reach(3)
            carried = traffic.end()
            assert min(carried.values()) > 0
        assert uninstall_under_traffic(scene) > 0
