"""Plain gradient descent, the inner loop of MAML (arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass

from innerloop.inner._base import InnerSolver, State
from innerloop.problem import Tree


@dataclass(frozen=True, kw_only=True)
class SGD(InnerSolver):
    """``params <- params - lr * g``: ``SGD(lr=0.1, steps=5)``."""

    def largest_rate(self, learned: Tree) -> float | None:
        """The largest of ``lr``."""
        return max(self.rates())

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step of gradient descent."""
        grad = self.full_gradient(params, grad, start)
        return {name: p - self.rate(step, name) * grad[name] for name, p in params.items()}, state
