"""Reptile (Nichol, Achiam and Schulman, arXiv 1803.02999): move the start towards where the inner loop ends.

grad = start - params_K,     so that an outer SGD step of rate e does   start <- start + e * mean(params_K - start)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from innerloop.curvature import outer, started
from innerloop.inner import InnerLoop, InnerSolver
from innerloop.meta_gradient._adjoint import Trail, outer_weights, through_start
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch


@dataclass(frozen=True)
class Reptile(MetaGradient):
    """Not a gradient of the outer loss: the query set is only used to report a loss.

    The paper's outer step is plain interpolation; that is ``torch.optim.SGD`` with the interpolation factor as its
    rate.

    Raises:
        ValueError: at construction of the learner, where only some parameters are adapted or rates are learned; in a
            meta-step, where ``step_weights`` are given.

    Source:
        Nichol, Achiam and Schulman 2018, arXiv 1803.02999.

    Example:
        >>> inner = il.Adam(lr=1e-3, steps=5, betas=(0.0, 0.999), minibatch=10)
        >>> learner = il.MetaLearner(model, inner=inner, meta_gradient=il.Reptile())
        >>> optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    """

    second_order: ClassVar[bool] = False
    through_steps: ClassVar[bool] = False
    is_gradient: ClassVar[bool] = False

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse what Reptile has no signal for.

        Raises:
            ValueError: only some parameters are adapted, or the solver's rates are learned.
        """
        super().check(solver, learns=learns, whole=whole)
        if whole is False:
            raise ValueError(
                "Reptile gives no gradient to parameters that the inner loop leaves alone: "
                "use adapts=Everything(), or FirstOrder() in place of Reptile()"
            )
        if learns:
            raise ValueError(
                f"Reptile gives no gradient to the rates of {type(solver).__name__}: "
                "use SGD, or Unrolled() in place of Reptile()"
            )

    def advice(self, seen: Seen) -> str:
        """What is a gradient at the same cost."""
        return "for one that is, at no curvature product either, use first-order"

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """Reptile's direction for one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given, which weigh query losses that Reptile does not use.
        """
        if step_weights is not None:
            raise ValueError(
                "Reptile has no query loss to weigh step by step: leave step_weights out, or use Unrolled()"
            )
        outer_weights(loop, query, None)  # refuses a stream that is too short
        end, support_loss = Trail(loop, loop.steps[:0]).adapt()
        loss, extra = outer(loop.problem, end.params, loop.meta, loop.judged(query, loop.steps[-1]))
        start = started(loop.problem, loop.meta, loop.support)
        grad = through_start(loop, {name: value - end.params[name] for name, value in start.items()})
        diagnostics = {"support_loss": support_loss, "curvature_products": torch.zeros((), device=loss.device)}
        return Result(grad, {}, loss, extra, diagnostics, end)
