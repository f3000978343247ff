"""Forward gradients: directional derivatives of the whole inner loop, for few meta-parameters and very many steps.

    grad  =  1 / b  sum_i  (d F . v_i) v_i,       v_i random signs,     F = outer loss after the inner loop, of meta

(FG)2U (Shen et al., arXiv 2406.14095) takes this as its second phase, with b = 8. It is unbiased, and with d
meta-parameters its variance is (d - 1) / b times the squared length of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from innerloop.curvature import OWN, dense, replayed
from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import add
from innerloop.meta_gradient._base import MetaGradient, Result, Seen, without_products
from innerloop.meta_gradient._unrolled import unroll
from innerloop.problem import Batch, End
from innerloop.trees import tree_leaves, tree_map


@dataclass(frozen=True)
class ForwardGradient(MetaGradient):
    """Goes forward through the inner steps alone, at the memory of one step, however many there are.

    A direction costs a run of the inner loop with its tangents, some three plain ones. Every task draws its own.

    Attributes:
        directions: b, 1 or more.
        most: meta-parameters above which it refuses, because the variance grows with their number; those of a learned
            inner solver count as well.

    Raises:
        ValueError: a setting outside its range; in use, more meta-parameters than ``most``.

    Source:
        Shen et al. 2024, arXiv 2406.14095; Baydin et al. 2022, arXiv 2202.08587.

    Example:
        >>> il.hypergradient(problem, {"log decay": torch.zeros(8)}, task, il.AdamW(lr=1e-3, steps=1000),
        ...     il.ForwardGradient(directions=8))
    """

    directions: int = 8
    most: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.directions < 1 or self.most < 1:
            raise ValueError(f"{self!r}: give 1 or more directions, and the most meta-parameters, 1 or more")

    def advice(self, seen: Seen) -> str:
        """That it is noise."""
        return "one draw of it is mostly noise: use more directions, more tasks or unrolled" if seen.far else ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The forward gradient of one task; arguments as in ``MetaGradient.estimate``."""
        given = dense((loop.meta, loop.learned))
        refuse_many(self, given, self.most, f"its variance is (d - 1) / {self.directions} times the gradient's square")
        function = unroll(loop, query, step_weights)
        total: Any = None
        for number in range(self.directions):
            signs = draw(
                loop, number, given, lambda like: torch.randint(0, 2, like.shape, device=like.device) * 2.0 - 1
            )
            found: Any = torch.func.jvp(function, given, signs, has_aux=True)
            loss, slope, (support_loss, params, state, extra) = found
            part = tree_map(lambda value, slope=slope: slope / self.directions * value, signs)
            total = part if total is None else add(total, part)
        return without_products(total, loss, support_loss, extra, End(params, state, loop.steps.stop))


def refuse_many(estimator: MetaGradient, given: Any, most: int, why: str) -> None:
    """Refuse more meta-parameters than a random estimate is of use for.

    Raises:
        ValueError: so.
    """
    count = sum(value.numel() for value in tree_leaves(given))
    if count > most:
        raise ValueError(
            f"{type(estimator).__name__} is for few meta-parameters and there are d = {count:,}: {why}. Use Unrolled() "
            f"or Truncated(), or raise most={most} if you know better"
        )


def draw(loop: InnerLoop, number: int, given: Any, one: Callable[[Tensor], Tensor]) -> Any:
    """Random numbers like a tree, the ``number``-th of a task; under vmap every task has its own."""
    with replayed(loop.seed, OWN + loop.begin.step * 2**20 + number, given):
        return tree_map(lambda value: one(value).to(value.dtype), given)
