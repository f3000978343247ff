"""The Nystrom approximation of the inverse (Hataya and Yamada, arXiv 2302.09726).

With C = M[rows] and W = M[rows, rows] for a few rows, M is approximated by C' W^+ C, and by Woodbury's identity

    (shift I + F' F)^-1 b  =  (b - F' (shift I + F F')^-1 F b) / shift,          F = W^(-1/2) C

W's eigenvalues that are not positive are left out of W^(-1/2), so the approximation is positive definite whatever M is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.linear._base import Info, Product, relative_norm


@dataclass(frozen=True)
class Nystrom:
    """No iteration: the products are independent of each other and of ``b``, and the solve is stable at any curvature.

    Good where few directions curve. It keeps ``rank`` vectors of the length of ``b``; all tasks use the same rows.

    Attributes:
        rank: how many rows, one product each, 1 or more; more than there are count as all.
        damping: added to the diagonal of the matrix, 0 or more.
        seed: draws the rows.

    Raises:
        ValueError: a setting outside its range; and in a solve, nothing on the diagonal: neither ``damping`` nor a
            weight decay or proximal weight of the inner solver.

    Source:
        Hataya and Yamada 2023, arXiv 2302.09726.

    Example:
        >>> il.Implicit(il.Nystrom(rank=20, damping=0.01))
    """

    rank: int
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1:
            raise ValueError(f"Nystrom(rank={self.rank}): give 1 row or more")
        if not self.damping >= 0:
            raise ValueError(f"Nystrom(damping={self.damping}): must be 0 or more")

    def solve(
        self, product: Product, b: Tensor, shift: float = 0.0, start: Tensor | None = None
    ) -> tuple[Tensor, Info]:
        """Solve ``(M + shift I) x = b``; see ``LinearSolver.solve``.

        Raises:
            ValueError: nothing is added to the diagonal, so that the approximation has no inverse.
        """
        shift = shift + self.damping
        if shift <= 0:
            raise ValueError("Nystrom needs something on the diagonal: give Nystrom(damping=...) above 0, or use CG")
        rows = random.Random(self.seed).sample(range(len(b)), min(self.rank, len(b)))
        picked = torch.stack([product(_unit(b, row)) for row in rows])
        # eigh raises on NaN, for all tasks of a batch; so it gets none, and the solution has it again
        broken = ~picked.isfinite().all()
        picked = torch.where(broken, 0.0, picked)
        values, vectors = torch.linalg.eigh(picked[:, rows])
        noise = len(rows) * torch.finfo(b.dtype).eps * values.abs().max()
        kept = values > noise
        scale = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
        factor = scale[:, None] * (vectors.mT @ picked)
        small = factor @ factor.mT + shift * torch.eye(len(rows), dtype=b.dtype, device=b.device)

        r = b if start is None else b - product(start) - shift * start
        x = (r - factor.mT @ torch.linalg.solve(small, factor @ r)) / shift
        x = torch.where(broken, torch.nan, x if start is None else start + x)
        residual = relative_norm(b - product(x) - shift * x, b)
        negative = (values < -noise).any().to(b.dtype)
        return x, Info(residual, torch.ones_like(residual), negative, len(rows) + 1 + (start is not None))


def _unit(like: Tensor, place: int) -> Tensor:
    unit = torch.zeros_like(like)
    unit[place] = 1.0
    return unit
