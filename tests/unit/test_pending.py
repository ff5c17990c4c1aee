"""Queued DELs: oldest first, what is malformed aside, what fails stays, nothing blocks the loop."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from rdmanet import pending
from rdmanet.cni import pending_name
from rdmanet.errors import StateError

BODY = b'{"cniVersion":"1.0.0","name":"net","type":"rdmanet"}'


class Calls:
    """The API as ``drain`` sees it."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.seen: list[tuple[str, bytes, bool]] = []
        self.during: Callable[[], None] = lambda: None

    async def __call__(self, variables: dict[str, str], body: bytes, still_wanted: Callable[[], bool]) -> int:
        self.during()
        self.seen.append((variables["CNI_CONTAINERID"], body, still_wanted()))
        return self.statuses.pop(0) if self.statuses else 200


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "pending"


def queue(directory: Path, container_id: str, *, age_s: int = 0, ifname: str = "eth0") -> Path:
    """An entry as cni/queue.h writes it, ``age_s`` old."""
    directory.mkdir(parents=True, exist_ok=True)
    head = f"CNI-Command: DEL\r\nCNI-ContainerID: {container_id}\r\nCNI-IfName: {quote(ifname)}"
    request = f"POST /v1/cni HTTP/1.1\r\n{head}\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    path = directory / pending_name(container_id, ifname)
    path.write_bytes(request)
    os.utime(path, ns=(0, 10**18 - age_s * 10**9))
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_an_empty_or_missing_queue(directory: Path) -> None:
    assert await pending.drain(directory, Calls()) == 0
    assert mode(directory) == 0o700
    assert await pending.drain(directory, Calls()) == 0


async def test_entries_are_carried_out_oldest_first_and_go(directory: Path) -> None:
    for number, age_s in ((1, 10), (2, 30), (3, 20)):
        queue(directory, f"c{number}", age_s=age_s)
    (directory / ".new").write_bytes(b"half an ent")
    calls = Calls()
    assert await pending.drain(directory, calls) == 3
    assert calls.seen == [("c2", BODY, True), ("c3", BODY, True), ("c1", BODY, True)]
    assert names(directory) == [".new", "lock"]


async def test_what_fails_stays_and_does_not_stop_the_others(directory: Path) -> None:
    first, second = queue(directory, "c1", age_s=2), queue(directory, "c2", age_s=1)
    assert await pending.drain(directory, Calls(500, 200)) == 1
    assert first.exists()
    assert not second.exists()
    assert await pending.drain(directory, Calls()) == 1


@pytest.mark.parametrize("content", [b"", b"garbage", b"POST /v1/cni HTTP/1.1\r\nContent-Length: 5\r\n\r\nab"])
async def test_a_malformed_entry_is_set_aside(directory: Path, content: bytes) -> None:
    queue(directory, "c1")
    (directory / "c2@eth0").write_bytes(content)
    calls = Calls()
    assert await pending.drain(directory, calls) == 1
    assert [name for name, _, _ in calls.seen] == ["c1"]
    assert names(directory) == ["lock", "malformed-c2-eth0"]
    assert (directory / "malformed-c2-eth0").read_bytes() == content
    assert await pending.drain(directory, Calls()) == 0, "and is not looked at again"


async def test_an_add_meanwhile_withdraws_its_del(directory: Path) -> None:
    """The ADD removes the entry that ``drain`` has read already; the DEL's turn comes after it."""
    queue(directory, "c1")
    calls = Calls()

    def add() -> None:
        pending.superseded(directory, "c1", "eth0")

    calls.during = add
    await pending.drain(directory, calls)
    assert calls.seen == [("c1", BODY, False)]


async def test_an_add_may_withdraw_it_between_the_listing_and_the_reading(directory: Path) -> None:
    """A name that is listed, and that nothing is behind any more."""
    queue(directory, "c1")
    (directory / pending_name("c2", "eth0")).symlink_to(directory / "gone")
    calls = Calls()
    assert await pending.drain(directory, calls) == 1
    assert [name for name, _, _ in calls.seen] == ["c1"]


def test_superseded(directory: Path) -> None:
    queue(directory, "c1", ifname="eth%0")
    assert not pending.superseded(directory, "c1", "eth0")
    assert pending.superseded(directory, "c1", "eth%0")
    assert not pending.superseded(directory, "c1", "eth%0")
    assert not pending.superseded(directory / "missing", "c1", "eth0")


async def test_a_held_lock_does_not_block_the_loop(directory: Path) -> None:
    queue(directory, "c1")
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as an executable does that is writing its entry
        calls = Calls()
        draining = asyncio.create_task(pending.drain(directory, calls))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not draining.done()
        late = queue(directory, "c2")
        fcntl.flock(lock, fcntl.LOCK_UN)
    assert await draining == 2, "what was written under the lock is seen"
    assert not late.exists()


def test_the_lock_is_held_while_draining(directory: Path) -> None:
    with pending.locked(directory), (directory / "lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_queue_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "pending").write_text("")
    with (
        pytest.raises(StateError, match=r"The queue of DELs .* cannot be opened"),
        pending.locked(tmp_path / "pending"),
    ):
        pytest.fail("a file is no queue")
