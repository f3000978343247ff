"""Plain gradient descent, the inner loop of MAML (arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from innerloop.inner._base import InnerSolver, State
from innerloop.problem import Tree


@dataclass(frozen=True, kw_only=True)
class SGD(InnerSolver):
    """Plain gradient descent, ``params <- params - lr * g``.

    Source:
        The inner loop of MAML, Finn, Abbeel and Levine 2017, arXiv 1703.03400.

    Example:
        >>> il.SGD(lr=0.1, steps=5)
        >>> il.SGD(lr=0.1, steps=16, proximal=2.0)  # of iMAML
        >>> il.SGD(lr={"head.*": 0.1, "*": lambda step: 0.01 / (1 + step)}, steps=5, clip=1.0)
    """

    linear: ClassVar[bool] = True
    counts: ClassVar[bool] = False

    def largest_rate(self, learned: Tree) -> float | None:
        """The largest of ``lr``."""
        return max(self.rates(), default=0.0)

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step of gradient descent."""
        grad = self.full_gradient(params, grad, start)
        return {name: p - self.rate(step, name) * grad[name] for name, p in params.items()}, state

    def pull_back(self, step: int, cotangent: Tree) -> tuple[Tree, Tree, Tree] | None:
        """In closed form, unless the gradient is clipped or a subclass has a rule of its own."""
        kind = type(self)
        if self.clip is not None or (kind.update, kind.full_gradient) != (SGD.update, SGD.full_gradient):
            return None
        grad = {name: -self.rate(step, name) * value for name, value in cotangent.items()}
        pulled = self.weight_decay + self.proximal
        params = {name: value + pulled * grad[name] for name, value in cotangent.items()} if pulled else cotangent
        return params, grad, {name: -self.proximal * value for name, value in grad.items()} if self.proximal else {}
