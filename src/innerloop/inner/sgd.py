"""Plain gradient descent, the inner loop of MAML (arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass

from innerloop.inner.base import InnerSolver, State
from innerloop.problem import Tree


@dataclass(frozen=True, kw_only=True)
class SGD(InnerSolver):
    """``params <- params - lr * g``."""

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step of gradient descent."""
        grad = self.full_gradient(params, grad, start)
        return {name: p - self.lr * grad[name] for name, p in params.items()}, state
