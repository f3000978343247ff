"""What every linear solver takes and gives: a symmetric matrix known by its products, and a right-hand side.

    (M + shift I) x = b

Everything is written for one system and free of branches on values, so that ``torch.func.vmap`` solves one a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from innerloop.problem import Tree

Product = Callable[[Tensor], Tensor]
"""``x -> M x`` for a vector ``x``."""


class Info(NamedTuple):
    """How a solve went; the first three are scalars.

    Attributes:
        residual: norm of ``b - (M + shift I) x`` over that of ``b``; 0 where ``b`` is 0, NaN if a product was.
        iterations: how many were taken before a stop, all of them with finite numbers: a solve whose result is not
            finite broke down in the next one.
        negative_curvature: 1 if a direction along which the matrix does not curve upwards was met, which is so of an
            indefinite matrix and of a singular one, else 0.
        products: how many products were computed, those after a stop included.
    """

    residual: Tensor
    iterations: Tensor
    negative_curvature: Tensor
    products: int


class LinearSolver(Protocol):
    """A way to solve ``(M + shift I) x = b``; any object with such a method is one, and need not inherit from this."""

    def solve(
        self, product: Product, b: Tensor, shift: float = 0.0, start: Tensor | None = None
    ) -> tuple[Tensor, Info]:
        """Solve for one right-hand side.

        Args:
            product: ``x -> M x``, without the shift; ``M`` is symmetric.
            b: the right-hand side, ``[n]``.
            shift: what is added to the diagonal.
            start: where to begin, ``[n]``; None begins at 0.

        Returns:
            ``x``, ``[n]``, and how it was found.
        """
        ...


def solve_tree(
    solver: LinearSolver, product: Callable[[Tree], Tree], b: Tree, shift: float = 0.0, start: Tree | None = None
) -> tuple[Tree, Info]:
    """The same for a matrix that maps trees to trees.

    Args:
        solver: of the flat system.
        product: ``x -> M x`` for trees like ``b``.
        b: the right-hand side.
        shift: what is added to the diagonal.
        start: where to begin, a tree like ``b``; None begins at 0.

    Returns:
        ``x``, a tree like ``b``, and how it was found.

    Raises:
        ValueError: ``b`` is complex; a Hessian is no linear map of complex numbers.
    """
    if any(value.is_complex() for value in b.values()):
        raise ValueError(
            "linear systems are solved for real parameters alone: give torch.view_as_real(...) of complex ones to the "
            "problem, or use Unrolled()"
        )

    def ravel(tree: Tree) -> Tensor:
        return torch.cat([tree[name].reshape(-1) for name in b])

    def unravel(vector: Tensor) -> Tree:
        parts = vector.split([value.numel() for value in b.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(b.items(), parts, strict=True)}

    x, info = solver.solve(
        lambda vector: ravel(product(unravel(vector))), ravel(b), shift, None if start is None else ravel(start)
    )
    return unravel(x), info


def relative_norm(residual: Tensor, b: Tensor) -> Tensor:
    """Norm of a residual over that of the right-hand side, 0 where that is 0."""
    size = b.norm()
    return torch.where(size > 0, residual.norm() / torch.where(size > 0, size, 1.0), 0.0)
