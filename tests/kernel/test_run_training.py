"""examples/train under `rdmanet run` over TCP: both families, and with a Kubernetes Job's variables alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import training
from testbed.jobs import Job, left
from testbed.world import World

PODS = 3
SMALL = ("--hidden", "40", "--steps", "4")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("training") as world:
        yield world


@pytest.mark.parametrize("kubernetes", [False, True], ids=["run", "kubernetes"])
@pytest.mark.parametrize("family", ["4", "6"])
def test_all_ranks_learn_what_one_process_does(world: World, tmp_path: Path, family: str, kubernetes: bool) -> None:
    one = training.alone(world.host, *SMALL)
    file = tmp_path / "parameters.npy"
    words = training.command(*SMALL, "--family", family, "--save", str(file), kubernetes=kubernetes)
    with world.unchanged():
        with Job(world.host, "--pods", str(PODS), *words) as job:
            reports, _ = training.trained(job, PODS, file, one)
        assert left(world.host) == []
    assert [(report["rank"], report["transport"]) for report in reports] == [(rank, "tcp") for rank in range(PODS)]
