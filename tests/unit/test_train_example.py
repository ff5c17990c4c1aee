"""examples/train: what it makes of its environment, and meeting, without a network of pods."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from types import ModuleType

import pytest

from testbed.paths import REPOSITORY

SCRIPT = REPOSITORY / "examples/train/train.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module; it imports its neighbours by itself."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import train  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(SCRIPT.parent))
    found: ModuleType = train
    return found


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1, "", 0)),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, (1, 4, "a", 29500)),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"}, (1, 4, "a", 7)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "MASTER_ADDR": "a"}, (2, 3, "a", 29500)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "MASTER_ADDR": "a"}, (2, 3, "a", 29500)),
        ({"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, (0, 2, "a", 29500)),
        ({"RANK": "3", "JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, (3, 4, "a", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, "", 29500)),
    ],
)
def test_world(example: ModuleType, environment: dict[str, str], wanted: tuple[int, int, str, int]) -> None:
    found = example.World.of(environment)
    assert (found.rank, found.size, found.master, found.port) == wanted


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "no WORLD_SIZE or"),
        ({"WORLD_SIZE": "2"}, "says which of 2 processes"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "not below 2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is missing"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "invalid literal"),
    ],
)
def test_a_world_that_cannot_be(example: ModuleType, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        example.World.of(environment)


async def test_all_meet(example: ModuleType) -> None:
    """Rank 0 comes last."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    worlds = [example.World(rank, 3, "127.0.0.1", port) for rank in range(3)]
    others = [asyncio.create_task(example.meet(world, f"pod-{world.rank}", socket.AF_INET)) for world in worlds[1:]]
    first = asyncio.create_task(example.meet(worlds[0], "pod-0", socket.AF_INET))
    members = await first
    assert [(one.rank, one.pod, one.address) for one in members] == [
        (rank, f"pod-{rank}", "127.0.0.1") for rank in range(3)
    ]
    assert [await other for other in others] == [members, members]


def test_alone() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "3", "--hidden", "5"], env={"PATH": ""}, capture_output=True, check=True
    )
    said = json.loads(done.stdout)
    assert (said["rank"], said["size"], said["transport"], said["steps"]) == (0, 1, "none", 3)
    assert said["last_loss"] < said["first_loss"]
    wrong = subprocess.run([sys.executable, SCRIPT], env={"RANK": "1"}, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("train.py: there is a rank, 1, and no WORLD_SIZE")
