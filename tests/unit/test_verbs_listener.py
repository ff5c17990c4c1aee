"""Who gets which queue pair of a listener; the queue pairs are only names here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rdmanet.errors import LeaseRefusedError, UnavailableError
from rdmanet.verbs.listener import BACKLOG, Listener
from rdmanet.verbs.options import Options


@pytest.fixture
def ended() -> list[Listener]:
    return []


@pytest.fixture
def listener(ended: list[Listener]) -> Listener:
    async def on_close(closed: Listener) -> None:
        ended.append(closed)

    return Listener("params", Options(), on_close)


def deliver(listener: Listener, *names: str) -> bool:
    qps: list[Any] = list(names)
    return listener.deliver(qps)


async def test_one_by_one_in_order(listener: Listener) -> None:
    deliver(listener, "a", "b")
    deliver(listener, "c")
    assert [str(await listener.accept()) for _ in range(3)] == ["a", "b", "c"]


async def test_a_batch_is_what_is_left_of_it(listener: Listener) -> None:
    deliver(listener, "a", "b", "c")
    deliver(listener, "d", "e")
    assert str(await listener.accept()) == "a"
    assert [*map(str, await listener.accept_batch())] == ["b", "c"]
    assert [*map(str, await listener.accept_batch())] == ["d", "e"]


async def test_device_that_goes_is_told_to_all_who_wait_and_whoever_asks(listener: Listener) -> None:
    waiting = [asyncio.create_task(listener.accept()) for _ in range(3)]
    await asyncio.sleep(0)
    listener.device_state("the device is gone")
    for accepting in (*waiting, listener.accept(), listener.accept_batch()):
        with pytest.raises(UnavailableError, match="the device is gone"):
            await accepting
    with pytest.raises(UnavailableError, match="the device is gone"):
        async for _ in listener:
            pass


async def test_device_that_comes_back_is_accepted_on_again(listener: Listener) -> None:
    for _ in range(2):
        listener.device_state("the device is gone")
        listener.device_state(None)
    waiting = [asyncio.create_task(listener.accept()) for _ in range(2)]
    await asyncio.sleep(0)
    deliver(listener, "a", "b")
    assert [str(qp) for qp in await asyncio.gather(*waiting)] == ["a", "b"]
    await listener.close()
    with pytest.raises(UnavailableError, match="has been closed"):
        await listener.accept()


async def test_those_who_wait_get_one_each(listener: Listener) -> None:
    waiting = [asyncio.create_task(listener.accept()) for _ in range(3)]
    await asyncio.sleep(0)
    deliver(listener, "a", "b", "c")
    assert sorted(map(str, await asyncio.gather(*waiting))) == ["a", "b", "c"]


async def test_who_is_cancelled_takes_nothing(listener: Listener) -> None:
    waiting = asyncio.create_task(listener.accept())
    await asyncio.sleep(0)
    waiting.cancel()
    deliver(listener, "a")
    assert str(await listener.accept()) == "a"


async def test_full_counts_connects(listener: Listener) -> None:
    for _ in range(BACKLOG - 1):
        deliver(listener, *"abcdef")
    assert not listener.full
    deliver(listener, "z")
    assert listener.full


async def test_everybody_hears_of_the_end(listener: Listener, ended: list[Listener]) -> None:
    async def many() -> list[object]:
        return [qp async for qp in listener]

    waiting = [asyncio.create_task(listener.accept()), asyncio.create_task(listener.accept_batch())]
    iterating = asyncio.create_task(many())
    await asyncio.sleep(0)
    await listener.close()
    for task in waiting:
        with pytest.raises(UnavailableError, match="has been closed"):
            await task
    assert await iterating == []
    assert not deliver(listener, "late")
    await listener.close()
    assert ended == [listener]


async def test_a_refusal_comes_after_what_waits(listener: Listener) -> None:
    deliver(listener, "a")
    listener.fail(LeaseRefusedError("somebody else listens there"))
    assert str(await listener.accept()) == "a"
    for _ in range(2):
        with pytest.raises(LeaseRefusedError, match="somebody else listens there"):
            await listener.accept()
