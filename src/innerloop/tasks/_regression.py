"""Regression tasks of the papers, generated: sinusoid, linear and quadratic.

Everything is computed in float64 from the task's own random bits and rounded to float32 last. Unlike the random bits
themselves, sines and matrix products may differ in the last digit from one machine to another.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.problem import Task
from innerloop.tasks._episodes import SPLITS, Bits, TaskSource, check_seed, check_split, random_bits, recorded, uniform

Floats = NDArray[np.float64]


class Regression(TaskSource):
    """Tasks of ``shots`` support and ``queries`` query examples with one number to predict.

    Inputs are float32 ``[tasks, shots, inputs]`` and ``[tasks, queries, inputs]``, targets ``[tasks, shots, 1]`` and
    ``[tasks, queries, 1]``. The three splits are separate streams of random tasks.

    Raises:
        ValueError: ``shots`` or ``queries`` below 1, or an impossible seed.
    """

    ways = None
    output_size = 1

    def __init__(self, name: str, inputs: int, shots: int, queries: int, seed: int) -> None:
        for what, value in {"shots": shots, "queries": queries}.items():
            if value < 1:
                raise ValueError(f"{what} is {value}; it must be at least 1")
        check_seed(seed)
        self.name, self.input_shape = name, (inputs,)
        self.shots, self.queries, self.seed = shots, queries, seed
        self._examples = shots + queries

    def batch(self, split: str, start: int, count: int) -> Task:
        """See `TaskSource.batch`."""
        check_split(self.name, split, SPLITS)
        bits = random_bits(f"{self.name}/{split}", self.seed, start, count, self._width())
        inputs, targets = (torch.from_numpy(values).float() for values in self._draw(split, bits))
        return Task(
            (inputs[:, : self.shots], targets[:, : self.shots]), (inputs[:, self.shots :], targets[:, self.shots :])
        )

    @abstractmethod
    def _width(self) -> int:
        """Random integers that a task needs."""

    @abstractmethod
    def _draw(self, split: str, bits: Bits) -> tuple[Floats, Floats]:
        """Inputs ``[tasks, examples, inputs]`` and targets ``[tasks, examples, 1]`` of tasks, support first."""


class Sinusoid(Regression):
    """See `sinusoid`."""

    def __init__(self, shots: int, queries: int, seed: int) -> None:
        super().__init__("sinusoid", 1, shots, queries, seed)

    def _width(self) -> int:
        return 2 + self._examples

    def _draw(self, split: str, bits: Bits) -> tuple[Floats, Floats]:
        numbers = uniform(bits)[..., None]
        amplitude, phase, x = 0.1 + 4.9 * numbers[:, :1], math.pi * numbers[:, 1:2], 10 * numbers[:, 2:] - 5
        return x, amplitude * np.sin(x - phase)


class Linear(Regression):
    """See `linear`."""

    def __init__(self, shots: int, queries: int, seed: int, inputs: int, noise: float) -> None:
        super().__init__("linear", inputs, shots, queries, seed)
        self._inputs, self._noise = inputs, noise

    def _width(self) -> int:
        return 2 * (self._inputs + self._examples * (self._inputs + 1))

    def _draw(self, split: str, bits: Bits) -> tuple[Floats, Floats]:
        numbers = normal(bits)
        weights, rest = 1 + numbers[:, : self._inputs], numbers[:, self._inputs :]
        rest = rest.reshape(-1, self._examples, self._inputs + 1)
        inputs, noise = rest[..., :-1], rest[..., -1:]
        return inputs, inputs @ weights[..., None] + self._noise * noise


class Quadratic(Regression):
    """See `quadratic`."""

    def __init__(self, shots: int, queries: int, seed: int, inputs: int, eigenvalues: tuple[float, float]) -> None:
        super().__init__("quadratic", inputs, shots, queries, seed)
        for what, value in {"shots": shots, "queries": queries}.items():
            if value < inputs:
                raise ValueError(
                    f"quadratic: {what} is {value}, fewer than its {inputs} inputs, which leaves the Hessian singular; "
                    f"ask for {inputs} or more"
                )
        self._inputs = inputs
        self._eigenvalues = np.geomspace(*eigenvalues, inputs)

    def _width(self) -> int:
        return 2 * self._inputs * (1 + self._examples + 2 * self._inputs)

    def _draw(self, split: str, bits: Bits) -> tuple[Floats, Floats]:
        numbers = normal(bits).reshape(len(bits), -1, self._inputs)
        sizes = (1, self.shots, self.queries, self._inputs, self._inputs)
        optimum, *frames = np.split(numbers, np.cumsum(sizes)[:-1], axis=1)
        left, axes = frames[:2], frames[2:]
        # With orthonormal columns on the left, 2/n X'X has exactly the eigenvalues in the middle.
        inputs = np.concatenate(
            [
                _orthonormal(rows) * np.sqrt(rows.shape[1] / 2 * self._eigenvalues) @ _orthonormal(turn).swapaxes(1, 2)
                for rows, turn in zip(left, axes, strict=True)
            ],
            axis=1,
        )
        return inputs, inputs @ (1 + optimum).swapaxes(1, 2)


@recorded
def sinusoid(shots: int = 10, queries: int = 10, seed: int = 0) -> Regression:
    """Sine waves: ``y = amplitude * sin(x - phase)``.

    Amplitude is uniform in [0.1, 5], phase in [0, pi] and x in [-5, 5]. Finn, Abbeel and Levine, "Model-agnostic
    meta-learning" (ICML 2017), section 5.1. Inputs and targets are ``[examples, 1]``.

    Args:
        shots: support examples.
        queries: query examples.
        seed: selects the stream of tasks.

    Raises:
        ValueError: a number out of range.
    """
    return Sinusoid(shots, queries, seed)


@recorded
def linear(shots: int = 10, queries: int = 10, seed: int = 0, inputs: int = 10, noise: float = 0.1) -> Regression:
    """Linear regression, ``y = w . x + noise``, with standard normal x and w normal around a vector of ones.

    The synthetic setting of iMAML (Rajeswaran et al. 2019), where inner solutions and meta-gradients have closed forms
    (see `quadratic_form`). The best initialisation of a linear model without bias is known: all ones.

    Args:
        shots: support examples.
        queries: query examples.
        seed: selects the stream of tasks.
        inputs: length of x.
        noise: standard deviation of the noise.

    Raises:
        ValueError: a number out of range.
    """
    if inputs < 1 or noise < 0:
        raise ValueError(f"inputs is {inputs} and noise is {noise}; they must be at least 1 and at least 0")
    return Linear(shots, queries, seed, inputs, noise)


@recorded
def quadratic(
    shots: int = 8,
    queries: int = 8,
    seed: int = 0,
    inputs: int = 8,
    eigenvalues: tuple[float, float] = (0.5, 8.0),
) -> Regression:
    """Quadratic losses with a known Hessian, as regression tasks, for tests against closed forms.

    The mean squared error of a linear model without bias, ``torch.nn.Linear(inputs, 1, bias=False)``, is
    ``(w - o)' H (w - o) / 2`` on the support set and the same with another H on the query set. Each H has random axes
    and eigenvalues spaced evenly in logarithm; the optimum o is normal around a vector of ones and shared by both.
    `quadratic_form` gives H of a task as it was rounded to its float type.

    Args:
        shots: support examples, at least ``inputs``.
        queries: query examples, at least ``inputs``.
        seed: selects the stream of tasks.
        inputs: number of weights.
        eigenvalues: the smallest and the largest.

    Raises:
        ValueError: a number out of range.
    """
    if inputs < 1 or not 0 < eigenvalues[0] <= eigenvalues[1]:
        raise ValueError(
            f"inputs is {inputs} and eigenvalues {eigenvalues}; inputs must be at least 1, and eigenvalues the "
            f"smallest and the largest, above 0"
        )
    return Quadratic(shots, queries, seed, inputs, eigenvalues)


def quadratic_form(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """H ``[..., d, d]`` and c ``[..., d]`` of a linear model's mean squared error ``w'Hw/2 - c'w + constant``.

    Args:
        inputs: ``[..., examples, d]``.
        targets: ``[..., examples, 1]``.
    """
    scale = 2 / inputs.shape[-2]
    return scale * inputs.mT @ inputs, scale * (inputs.mT @ targets).squeeze(-1)


def normal(bits: Bits) -> Floats:
    """Standard normal numbers ``[..., n]`` from random integers ``[..., 2 * n]`` (Box and Muller 1958)."""
    first, second = np.split(uniform(bits), 2, axis=-1)
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)


def _orthonormal(rows: Floats) -> Floats:
    """Orthonormal columns that span those of ``[..., n, d]``; R's positive diagonal makes them unique."""
    q, r = np.linalg.qr(rows)
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
