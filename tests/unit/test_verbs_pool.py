"""Who gets which queue pair of a pool, and when it leases again; the queue pairs do nothing here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from rdmanet.errors import InputError, LeaseRefusedError, UnavailableError
from rdmanet.verbs import Session
from rdmanet.verbs.pool import Pool


class NamedPair:
    """As much of a queue pair as a pool knows."""

    def __init__(self, name: str):
        self.name = name
        self.broken = self.closed = False
        self.idle = True
        self.on_broken: Callable[[], None] | None = None

    def look(self) -> None: ...

    def fail(self) -> None:
        self.broken = True
        if self.on_broken is not None:
            self.on_broken()

    async def close(self) -> None:
        self.shut()

    def shut(self) -> None:
        if not self.closed:
            self.closed = True
            self.fail()

    on_close = None


class Peer:
    """Leases until it is told to refuse; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.made: list[NamedPair] = []
        self.refusal: LeaseRefusedError | None = None
        self.refused = asyncio.Event()
        self.most = 64

    async def lease(self, count: int) -> list[Any]:
        self.asked.append(count)
        if self.refusal is not None:
            self.refused.set()
            raise self.refusal
        if count > self.most:
            self.refused.set()
            raise LeaseRefusedError(f"{self.most} are left", operation="limit")
        new = [NamedPair(f"{len(self.made) + number}") for number in range(count)]
        self.made += new
        return list(new)


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
async def pool(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr("rdmanet.verbs.pool._FIRST_PAUSE_S", 0.001)
    made = Pool("train-1:params", 3, peer.lease, forget)
    await made.open()
    yield made
    await made.close()


async def forget(pool: Pool) -> None: ...


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not reached():  # noqa: ASYNC110 - turns of the loop are what it waits for
            await asyncio.sleep(0)


async def test_the_one_used_last_is_the_next(pool: Pool, peer: Peer) -> None:
    assert peer.asked == [3]
    first, second = await pool.acquire(), await pool.acquire()
    await pool.release(second)
    await pool.release(first)
    assert await pool.acquire() is first
    found = pool.statistics
    assert (found.ready, found.acquired, found.handed_out, found.at_once, found.leased) == (2, 1, 3, 3, 3)


async def test_who_waits_gets_what_is_released_in_turn(pool: Pool) -> None:
    taken = [await pool.acquire() for _ in range(3)]
    waiting = [asyncio.create_task(pool.acquire()) for _ in range(2)]
    await until(lambda: pool.statistics.waiting == 2)
    await pool.release(taken[1])
    await pool.release(taken[0])
    assert [await task for task in waiting] == [taken[1], taken[0]]
    assert pool.statistics.at_once == 3


async def test_who_is_cancelled_takes_none(pool: Pool) -> None:
    taken = [await pool.acquire() for _ in range(3)]
    waiting = asyncio.create_task(pool.acquire())
    await until(lambda: pool.statistics.waiting == 1)
    # Given and cancelled in the same turn.
    await pool.release(taken[0])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await pool.acquire() is taken[0]


async def test_nobody_waits_longer_than_asked(pool: Pool) -> None:
    for _ in range(3):
        await pool.acquire()
    with pytest.raises(LeaseRefusedError, match=r"ready within 0\.01 s: all 3 are in use") as caught:
        await pool.acquire(timeout_s=0.01)
    assert caught.value.operation == "timed_out"


async def test_one_that_broke_is_replaced(pool: Pool, peer: Peer) -> None:
    peer.made[1].fail()
    await until(lambda: pool.statistics.ready == 3)
    assert peer.asked == [3, 1]
    assert peer.made[1].closed
    assert pool.statistics.lost == 1


async def test_one_that_broke_in_use_is_replaced_at_once(pool: Pool, peer: Peer) -> None:
    taken: Any = await pool.acquire()
    taken.fail()
    await until(lambda: pool.statistics.ready == 3)
    await pool.release(taken)
    assert taken.closed
    assert pool.statistics.ready == 3


@pytest.mark.parametrize("how", ["closed", "unread", "exception"])
async def test_one_that_cannot_be_used_again_is_replaced(pool: Pool, how: str) -> None:
    with pytest.raises(ValueError, match="mine") if how == "exception" else contextlib.nullcontext():
        async with pool.queue_pair() as qp:
            taken: Any = qp
            if how == "closed":
                await qp.close()
            if how == "unread":
                taken.idle = False
            if how == "exception":
                raise ValueError("mine")
    assert taken.closed
    await until(lambda: pool.statistics.ready == 3)
    assert pool.statistics.leased == 4


async def test_a_peer_that_is_away_is_asked_again(pool: Pool, peer: Peer) -> None:
    peer.refusal = LeaseRefusedError("no process of train-1 listens on params", operation="not_listening")
    for qp in list(peer.made):
        qp.fail()
    await peer.refused.wait()
    with pytest.raises(LeaseRefusedError, match="no process of train-1 listens on params"):
        await pool.acquire(timeout_s=0.01)
    peer.refusal = None
    await pool.acquire(timeout_s=30)
    await until(lambda: pool.statistics.ready == 2)
    assert pool.statistics.failures >= 1


async def test_a_limit_leaves_what_fits(pool: Pool, peer: Peer) -> None:
    peer.most = 1
    for qp in list(peer.made):
        qp.fail()
    await until(lambda: pool.statistics.ready == 3)
    assert peer.asked[1:] == [3, 1, 2, 1, 1]


async def test_what_cannot_be_leased_at_all_is_an_error(peer: Peer) -> None:
    peer.refusal = LeaseRefusedError("there is no pod train-9", operation="no_such_pod")
    with pytest.raises(LeaseRefusedError, match="there is no pod"):
        await Pool("train-9:params", 3, peer.lease, forget).open()
    with pytest.raises(InputError, match="at least one"):
        await Session().pool("train-9:params", size=0)


async def test_more_than_a_batch(peer: Peer) -> None:
    pool = Pool("train-1:params", 150, peer.lease, forget)
    await pool.open()
    assert peer.asked == [64, 64, 22]
    await pool.close()
    assert all(qp.closed for qp in peer.made)


async def test_close_tells_those_who_wait(peer: Peer) -> None:
    pool = Pool("train-1:params", 1, peer.lease, forget)
    await pool.open()
    await pool.acquire()
    waiting = asyncio.create_task(pool.acquire())
    await until(lambda: pool.statistics.waiting == 1)
    await pool.close()
    for attempt in (waiting, pool.acquire()):
        with pytest.raises(UnavailableError, match="the pool has been closed"):
            await attempt
    assert peer.made[0].closed
    await pool.close()
