"""examples/allreduce without a network: the ring's order, the model's gradients, and a process that trains alone.

tests/rdma/test_example.py runs it as it is meant, in pods.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.allreduce.__main__ import main
from examples.allreduce.ring import Ring, memory_for
from examples.allreduce.train import Layers, Model, batch, train
from examples.allreduce.transport import Memory, Part, Place, TcpTransport, Vector


class Neighbours:
    """Memory to memory, as RDMA does: a put is there whatever its receiver is doing; turns are random."""

    def __init__(self, right: Memory, memory: Memory, here: asyncio.Semaphore, there: asyncio.Semaphore, seed: int):
        self._right = right
        self._memory = memory
        self._here = here
        self._there = there
        self._random = random.Random(seed)

    async def _others_turn(self) -> None:
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)

    async def put(self, source: Part, target: Part) -> None:
        await self._others_turn()
        self._right.bytes_of(target)[:] = self._memory.bytes_of(source)
        self._there.release()
        await self._others_turn()

    async def arrival(self, target: Part) -> None:
        await self._here.acquire()
        await self._others_turn()


async def reduced(vectors: list[Vector], rounds: int, seed: int) -> list[Vector]:
    """What each process of a ring has after so many all-reduces, beginning with these."""
    size = len(vectors)
    memories = [memory_for(vector.copy(), size) for vector in vectors]
    arrivals = [asyncio.Semaphore(0) for _ in vectors]

    async def process(rank: int) -> None:
        right = (rank + 1) % size
        neighbours = Neighbours(memories[right], memories[rank], arrivals[rank], arrivals[right], seed + rank)
        ring = Ring(neighbours, memories[rank], rank, size)
        for _ in range(rounds):
            await ring.all_reduce()

    await asyncio.gather(*map(process, range(size)))
    return [memory.vector for memory in memories]


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(1, 3), st.integers(0, 1000))
def test_every_process_has_the_sum_whoever_is_ahead(size: int, length: int, rounds: int, seed: int) -> None:
    """Whole numbers, so that sums are exact in any order; vectors also shorter than the ring."""
    given_vectors = [np.arange(length, dtype=float) * (rank + 1) + rank for rank in range(size)]
    expected = sum(given_vectors) * size ** (rounds - 1)
    for vector in asyncio.run(reduced(given_vectors, rounds, seed)):
        assert np.array_equal(vector, expected)


def test_all_processes_have_the_same_bits() -> None:
    given_vectors = [np.random.default_rng(rank).normal(size=101) for rank in range(4)]
    found = asyncio.run(reduced(given_vectors, 1, seed=0))
    assert len({vector.tobytes() for vector in found}) == 1
    assert np.allclose(found[0], sum(given_vectors), rtol=1e-15, atol=1e-15)


def test_gradient_is_the_losses_slope() -> None:
    model = Model(hidden=5)
    inputs, wanted = batch(0, 0, 1)
    model.differentiate(inputs, wanted)
    gradient = model.gradient.copy()
    for element in range(0, Layers.length(5), 7):
        losses = []
        for change in (1e-6, -2e-6):
            model.parameters[element] += change
            model.differentiate(inputs, wanted)
            losses.append(model.gradient[-1])
        model.parameters[element] += 1e-6
        assert gradient[element] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_parts_of_a_batch_make_the_whole() -> None:
    whole, part = Model(hidden=7), Model(hidden=7)
    whole.differentiate(*batch(3, 0, 1))
    total = np.zeros_like(whole.gradient)
    for rank in range(4):
        part.differentiate(*batch(3, rank, 4))
        total += part.gradient
    assert np.allclose(total, whole.gradient, rtol=1e-12, atol=1e-15)


def test_it_learns() -> None:
    course = asyncio.run(train(Model(hidden=40), 30))
    assert course.losses[-1] < course.losses[0] / 2


async def test_tcp_puts_into_the_part_that_it_was_told() -> None:
    one, other = socket.socketpair()
    with one, other:
        for end in (one, other):
            end.setblocking(False)
        source, target = (memory_for(vector, 3) for vector in (np.arange(9.0), np.zeros(9)))
        ours, theirs = TcpTransport(one, one, source), TcpTransport(other, other, target)
        part = Ring(ours, source, 1, 3)._chunk(1)
        await asyncio.gather(ours.put(part, part), theirs.arrival(part))
        assert target.vector.tolist() == [0, 0, 0, 3, 4, 5, 0, 0, 0]
        one.close()
        with pytest.raises(ConnectionError, match="left neighbour is gone"):
            await theirs.arrival(part)


def test_one_pod_trains_without_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pods", "alone", "--name", "alone", "--steps", "3", "--hidden", "4,6", "--compare"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["hidden"], len(row["losses"])) for row in said] == [(4, 3), (6, 3)]
    assert all(row["alone"]["difference"] == 0 for row in said)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pods", "a,b", "--name", "c"], "c is not one of the pods"),
        (["--pods", "a,b", "--name", "a", "--transport", "smoke"], "--transport is rdma or tcp"),
    ],
)
def test_wrong_words(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert sentence in capsys.readouterr().err


def test_places_go_round() -> None:
    place = Place(("a", "b", "c"), 0)
    assert (place.left, place.right) == (2, 1)
