"""rdmanet.broker.turns: nobody gets more than a turn, and nobody waits for who takes many."""

from __future__ import annotations

import asyncio

import pytest

from rdmanet.broker.turns import Pace, Turns


async def test_pods_take_turns_whatever_the_number_of_their_messages() -> None:
    turns, order = Turns(lambda: False), []

    async def say(pod: int, number: int) -> None:
        await turns.take(pod)
        order.append((pod, number))

    asked = [say(1, number) for number in range(100)] + [say(2, 0), say(2, 1), say(3, 0)]
    await asyncio.gather(*asked)
    assert order[:5] == [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1)]
    assert order[5:] == [(1, number) for number in range(2, 100)]


async def test_no_turns_while_effects_wait() -> None:
    backlog = [1]
    turns = Turns(lambda: bool(backlog))
    taking = asyncio.create_task(turns.take(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not taking.done()
    turns.go_on()
    await asyncio.sleep(0)
    assert not taking.done()
    backlog.clear()
    turns.go_on()
    async with asyncio.timeout(10):
        await taking
    turns.go_on()  # nobody waits


async def test_a_connection_that_gives_up_costs_no_turn() -> None:
    turns = Turns(lambda: False)
    first, second = asyncio.create_task(turns.take(1)), asyncio.create_task(turns.take(1))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(10):
        await second
    assert turns._waiting == {}


def test_a_pace_allows_a_burst_and_then_so_many_a_second() -> None:
    now = [100.0]
    pace = Pace(burst=3, per_s=2.0, clock=lambda: now[0])
    assert [pace.wait_s() for _ in range(3)] == [0.0, 0.0, 0.0]
    assert pace.wait_s() == pytest.approx(0.5)
    assert pace.wait_s() == pytest.approx(1.0)
    now[0] += 1.0
    assert pace.wait_s() == pytest.approx(0.5)
    now[0] += 1000.0
    assert [pace.wait_s() for _ in range(3)] == [0.0, 0.0, 0.0]
