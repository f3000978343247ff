"""Gradient descent with heavy-ball momentum, as torch.optim.SGD writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from innerloop.inner._base import InnerSolver, State
from innerloop.problem import Tree


@dataclass(frozen=True, kw_only=True)
class Momentum(InnerSolver):
    """``v <- momentum * v + g``, then ``params <- params - lr * v``, with v starting at 0, as torch.optim.SGD has it.

    Attributes:
        momentum: from 0 up to, not including, 1.

    Source:
        The heavy-ball method, Polyak 1964.

    Example:
        >>> il.Momentum(lr=0.05, steps=5, momentum=0.9)
    """

    momentum: float = 0.9

    linear: ClassVar[bool] = True
    counts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Momentum(momentum={self.momentum}): must be at least 0 and below 1")

    def init(self, params: Tree) -> State:
        """Zero velocity."""
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def largest_rate(self, learned: Tree) -> float | None:
        """The largest of ``lr``."""
        return max(self.rates(), default=0.0)

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step with momentum."""
        grad = self.full_gradient(params, grad, start)
        velocity = {name: self.momentum * state[name] + g for name, g in grad.items()}
        return {name: p - self.rate(step, name) * velocity[name] for name, p in params.items()}, velocity
