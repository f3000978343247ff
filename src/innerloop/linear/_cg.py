"""Conjugate gradients (Hestenes and Stiefel 1952), with the guards that a vmapped, possibly indefinite system needs.

    alpha = r.r / p.Ap,    x <- x + alpha p,    r' = r - alpha Ap,    p <- r' + (r'.r' / r.r) p,    r <- r'

where A = M + (shift + damping) I and, from 0, r = p = b. Exact after n iterations for a positive definite n x n matrix;
in A's norm the error falls by (sqrt(k) - 1) / (sqrt(k) + 1) an iteration, k being A's condition number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.linear._base import Info, Product, relative_norm


@dataclass(frozen=True)
class CG:
    """The default: needs no step size and finds the best solution that its products can give.

    It stops, keeping what it has, once the residual is at the tolerance (a converged solve would go on to 0/0), and
    where ``p.Ap / p.p`` is not above 0 or within the rounding error of the largest one met: the matrix is indefinite or
    singular, and going on would leave the minimum that the system describes, or divide by what should be 0. If that
    happens in the first iteration of a solve from 0 there is nothing to keep, and the solution without the matrix is
    returned, ``b`` over what is on the diagonal (``b`` where nothing is).

    Attributes:
        iterations: at most so many, one product each, 1 or more. All products are computed, stopped or not.
        damping: added to the diagonal of the matrix, 0 or more.
        tolerance: relative residual to stop at, 0 or more; None stops at the rounding error.

    Raises:
        ValueError: a setting outside its range.

    Source:
        Hestenes and Stiefel 1952, J. Res. Natl. Bur. Stand. 49.

    Example:
        >>> il.Implicit(il.CG(iterations=5, damping=0.1))
    """

    iterations: int = 20
    damping: float = 0.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.iterations < 1:
            raise ValueError(f"CG(iterations={self.iterations}): give 1 or more; without any, use FirstOrder()")
        if not self.damping >= 0:
            raise ValueError(f"CG(damping={self.damping}): must be 0 or more")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"CG(tolerance={self.tolerance}): give a relative residual of 0 or more, or None")

    def solve(
        self, product: Product, b: Tensor, shift: float = 0.0, start: Tensor | None = None
    ) -> tuple[Tensor, Info]:
        """Solve ``(M + shift I) x = b``; see ``LinearSolver.solve``."""
        shift = shift + self.damping
        floor = torch.finfo(b.dtype).eps
        enough = max(floor, self.tolerance or 0.0) ** 2 * (b @ b)
        if start is None:
            x, r = torch.zeros_like(b), b
        else:
            x, r = start, b - product(start) - shift * start
        p, size = r, r @ r
        # written so that NaN stays active and shows in the result
        active = ~(size <= enough)
        iterations, negative, largest = torch.zeros_like(size), torch.zeros_like(active), torch.zeros_like(size)
        for iteration in range(self.iterations):
            image = product(p) + shift * p
            curve = p @ image
            square = p @ p
            stop = active & (curve <= 16 * floor * largest * square)
            largest = torch.maximum(largest, curve / torch.where(square > 0, square, 1.0))
            if iteration == 0:
                x = torch.where(stop & (x == 0).all(), b / shift if shift > 0 else b, x)
            negative, active = negative | stop, active & ~stop
            length = torch.where(active, size / torch.where(active, curve, 1.0), 0.0)
            x, r = x + length * p, r - length * image
            new = r @ r
            iterations = iterations + (active & new.isfinite())
            p = r + torch.where(active, new / torch.where(active, size, 1.0), 0.0) * p
            size = new
            active = active & ~(size <= enough)
        products = self.iterations + (start is not None)
        return x, Info(relative_norm(r, b), iterations, negative.to(b.dtype), products)
