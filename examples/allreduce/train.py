"""The job: a two-layer perceptron learns what another one computes, each process from its part of every batch.

Parameters and gradients are one vector each, with the layers as views into it: what is all-reduced is the memory that
the gradients were computed into.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from .transport import Vector

INPUTS = 32
OUTPUTS = 8
BATCH = 32
#: Of a layer with one hidden unit: the wider the layer, the more each step changes what it says.
LEARNING_RATE = 2.0
SEED = 4


class Layers:
    """Weights and biases of both layers as views into one vector."""

    def __init__(self, vector: Vector, hidden: int):
        sizes = (INPUTS * hidden, hidden, hidden * OUTPUTS, OUTPUTS)
        ends = np.cumsum(sizes)
        first, self.first_bias, second, self.second_bias = (
            vector[end - size : end] for size, end in zip(sizes, ends, strict=True)
        )
        self.first = first.reshape(INPUTS, hidden)
        self.second = second.reshape(hidden, OUTPUTS)

    @staticmethod
    def length(hidden: int) -> int:
        """Elements of the vector."""
        return (INPUTS + 1) * hidden + (hidden + 1) * OUTPUTS

    def forward(self, inputs: Vector) -> tuple[Vector, Vector]:
        """What the hidden layer and the output say, a row per sample."""
        hidden = np.tanh(inputs @ self.first + self.first_bias)
        return hidden, hidden @ self.second + self.second_bias


class Model:
    """Parameters, and a gradient whose last element is the loss: one vector to all-reduce."""

    def __init__(self, hidden: int):
        length = Layers.length(hidden)
        # The same in all processes: from the same seed.
        self.parameters: Vector = np.random.default_rng(SEED).normal(0, INPUTS**-0.5, length)
        self.gradient: Vector = np.zeros(length + 1)
        self._layers = Layers(self.parameters, hidden)
        self._layers.second *= (INPUTS / hidden) ** 0.5
        self._gradients = Layers(self.gradient, hidden)
        self._rate = LEARNING_RATE / hidden

    def differentiate(self, inputs: Vector, wanted: Vector) -> None:
        """Half the mean squared error over a batch, as far as these samples of it go, and its gradient."""
        hidden, outputs = self._layers.forward(inputs)
        error = (outputs - wanted) / BATCH
        back = (error @ self._layers.second.T) * (1 - hidden**2)
        np.matmul(hidden.T, error, out=self._gradients.second)
        np.sum(error, axis=0, out=self._gradients.second_bias)
        np.matmul(inputs.T, back, out=self._gradients.first)
        np.sum(back, axis=0, out=self._gradients.first_bias)
        self.gradient[-1] = 0.5 * BATCH * np.sum(error**2)

    def descend(self) -> float:
        """One step against the gradient; the loss before it."""
        self.parameters -= self._rate * self.gradient[:-1]
        return float(self.gradient[-1])


def batch(step: int, rank: int, size: int) -> tuple[Vector, Vector]:
    """The samples of a step that one of ``size`` processes takes: inputs and wanted outputs."""
    random = np.random.default_rng((SEED, step))
    inputs = random.normal(size=(BATCH, INPUTS))
    teacher = Layers(np.random.default_rng(SEED + 1).normal(0, 0.3, Layers.length(INPUTS)), INPUTS)
    own = slice(BATCH * rank // size, BATCH * (rank + 1) // size)
    return inputs[own], teacher.forward(inputs[own])[1]


@dataclass
class Course:
    """What a training did: the loss before each step, seconds per step and those of its all-reduce, and the parameters
    that it ended with."""

    parameters: Vector
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    reduce_s: list[float] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters: equal where every bit is."""
        return hashlib.sha256(self.parameters.data).hexdigest()


async def nothing_to_reduce() -> None:
    """The all-reduce of a process that trains alone."""


async def train(
    model: Model,
    steps: int,
    *,
    all_reduce: Callable[[], Awaitable[None]] = nothing_to_reduce,
    rank: int = 0,
    size: int = 1,
) -> Course:
    """Train for so many steps; ``all_reduce`` sums every process' ``model.gradient`` in place."""
    course = Course(model.parameters)
    for step in range(steps):
        inputs, wanted = batch(step, rank, size)
        began = time.perf_counter()
        model.differentiate(inputs, wanted)
        computed = time.perf_counter()
        await all_reduce()
        reduced = time.perf_counter()
        course.losses.append(model.descend())
        course.step_s.append(time.perf_counter() - began)
        course.reduce_s.append(reduced - computed)
    return course
