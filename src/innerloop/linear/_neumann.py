"""The Neumann series of the inverse (Lorraine, Vicol and Duvenaud, arXiv 1911.02590).

    x  =  step * sum_{j < terms} (I - step A)^j b,          A = M + shift I

which is gradient descent from 0 on the quadratic that A and b define: it needs 0 < step * eigenvalue < 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.linear._base import Info, Product, relative_norm

_POWER_ITERATIONS = 5


@dataclass(frozen=True)
class Neumann:
    """A fixed polynomial of the matrix: no division, and linear in ``b`` where the step is given.

    Attributes:
        terms: how many are summed, one product each, 1 or more.
        step: its scale, above 0; ``1 / proximal`` makes the series of ``Implicit`` the sum of ``(-H / proximal)^j b /
            proximal``. None takes 1 over the largest eigenvalue, estimated by five power iterations from ``b``, one
            product each.

    Raises:
        ValueError: a setting outside its range.

    Source:
        Lorraine, Vicol and Duvenaud 2020, arXiv 1911.02590.

    Example:
        >>> il.Implicit(il.Neumann(terms=10, step=0.1))
    """

    terms: int
    step: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.terms < 1:
            raise ValueError(f"Neumann(terms={self.terms}): give 1 or more; without any, use FirstOrder()")
        if self.step is not None and not self.step > 0:
            raise ValueError(f"Neumann(step={self.step}): give a step above 0, or None to have it estimated")

    def solve(
        self, product: Product, b: Tensor, shift: float = 0.0, start: Tensor | None = None
    ) -> tuple[Tensor, Info]:
        """Solve ``(M + shift I) x = b``; see ``LinearSolver.solve``."""

        def apply(vector: Tensor) -> Tensor:
            return product(vector) + shift * vector

        step = _inverse_of_largest(apply, b) if self.step is None else self.step
        x, r = (torch.zeros_like(b), b) if start is None else (start, b - apply(start))
        iterations = b.new_zeros(())
        negative = torch.zeros((), dtype=torch.bool, device=b.device)
        for _ in range(self.terms):
            image = apply(r)
            negative = negative | (r @ image < 0)
            x, r = x + step * r, r - step * image
            iterations = iterations + r.norm().isfinite()
        products = self.terms + (start is not None) + (_POWER_ITERATIONS if self.step is None else 0)
        return x, Info(relative_norm(r, b), iterations, negative.to(b.dtype), products)


def _inverse_of_largest(apply: Product, b: Tensor) -> Tensor:
    """1 over the largest absolute eigenvalue, as far as power iterations from ``b`` see it."""
    vector, size = b, b.norm()
    for _ in range(_POWER_ITERATIONS):
        vector = apply(vector / torch.where(size > 0, size, 1.0))
        size = vector.norm()
    return 1 / torch.where(size > 0, size, 1.0)
