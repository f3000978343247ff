"""Meta-RKHS-I: no inner loop, but a term that rewards long gradients (Zhou et al., arXiv 2102.03909).

    F  =  outer_loss(start)  -  < A g, d outer_loss / d params >,          g = d inner_loss / d params,  at the start

with A the sum of the inner rates of all steps. This is the outer loss after them to first order in the rates. Published
with one batch for both, which makes the second term a squared norm; with support and query apart it has no bias by the
gradients' noise (that form is reconstructed). Its gradient takes a product of each loss:

    d F / d params  =  b  -  H A b  -  H_outer A g,       b = d outer_loss / d params;         in meta likewise, with B
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from innerloop.curvature import OUTER, linearised, parted
from innerloop.inner import InnerLoop, InnerSolver
from innerloop.meta_gradient._adjoint import add, conclude, judge, outer_weights
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch, Tree


@dataclass(frozen=True)
class MetaRKHS(MetaGradient):
    """Two curvature products at the start, however many inner steps: their rates count, added up.

    The error is of second order in the rates, and of the order of what momentum, moments, clipping, weight decay and
    proximal term do, which it leaves out. The outer loss that it reports is that of the start, and ``params`` are those
    of the start too: only evaluation and adaptation take the inner steps.

    Raises:
        ValueError: at construction of the learner, learned rates; in use, ``step_weights``.

    Source:
        Zhou, Wang, Xian, Chen and Xu 2021, arXiv 2102.03909, version I.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.MetaRKHS())
    """

    stepless: ClassVar[str] = "takes no inner step"
    through_steps: ClassVar[bool] = False

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse learned rates.

        Raises:
            ValueError: so.
        """
        super().check(solver, learns=learns, whole=whole)
        if learns:
            raise ValueError(
                f"MetaRKHS takes no inner step that the rates of {type(solver).__name__} could change: use SGD, or "
                "Unrolled() in place of MetaRKHS()"
            )

    def advice(self, seen: Seen) -> str:
        """How far the rates reach."""
        if not seen.far or seen.reach is None:
            return ""
        return (
            f"it is of first order in steps * lr * |H| = {seen.inner.steps * seen.reach:.3g}: use unrolled or binomial"
        )

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The estimate of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given.
        """
        if step_weights is not None:
            raise ValueError("MetaRKHS takes no inner step to weigh: leave step_weights out, or use Unrolled()")
        outer_weights(loop, query, None)  # refuses a stream that is too short
        step, end = loop.steps.start, loop.begin
        rates = {name: sum(loop.solver.rate(k, name) for k in loop.steps) for name in end.params}
        grad, support_loss = loop.gradient(step, end.params)
        loss, cotangents, extra = judge(loop, query, step, end.params, 1.0)

        def outer_loss(params: Tree, meta: Tree, batch: Batch) -> Tensor:
            return parted(loop.problem.outer_loss(params, meta, batch))[0]

        judging = replace(loop.problem, inner_loss=outer_loss, inner_chain=None, engine=None)
        last = linearised(judging, end.params, loop.meta, loop.judged(query, step), OUTER, keep=False)
        for product, vector in ((loop.products(step, end.params), cotangents.params), (last, grad)):
            in_params, in_meta = product({name: -rates[name] * value for name, value in vector.items()})
            cotangents = cotangents._replace(
                params=add(cotangents.params, in_params), meta=add(cotangents.meta, in_meta)
            )
        return conclude(loop, cotangents, loss, end, extra, support_loss.unsqueeze(0), 2)
