"""The exact meta-gradient of MAML (arXiv 1703.03400), at the memory of one inner step.

With u = d outer_loss / d params after the last step, and for plain gradient descent,

    u <- u - lr * H(params_k) u,     grad_meta <- grad_meta - lr * B(params_k) u          for k = steps - 1 .. 0

which is back-propagation through the unrolled loop, written with one curvature product a step in place of the graph
(the mixed-mode differentiation of MixFlow-MG, arXiv 2505.00793).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop.curvature import outer, pullback, started
from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import outer_weights, walk
from innerloop.meta_gradient._base import MetaGradient, Result, without_products
from innerloop.problem import Batch, End, Tree


@dataclass(frozen=True, kw_only=True)
class Unrolled(MetaGradient):
    """Exact for every inner solver, learned rates and meta-parameters inside the inner loss included.

    Attributes:
        record: True keeps the graph of the whole inner loop, as plain autograd does, and takes no curvature product:
            memory grows with every step, and time is less where that memory is there. The same numbers. None leaves it
            to a learner, which keeps graphs within its ``memory=``; False never does.
        copies: hold at most so many copies of parameters and solver state on the way back, 2 or more, and compute those
            between again: with 20 copies, 1,000 steps are run at most 3 times each (4 times where the solver's update
            is not linear in the gradient). None holds one a step, which is best unless steps times parameters is what
            fills the memory.
        offload: hold them in the CPU's memory.
        learn_start: False holds what is adapted at its first values, which then are no meta-parameters: with ``Head()``
            that is ITD-BiO (arXiv 2010.07962), bilevel in the backbone alone.

    Raises:
        ValueError: ``copies`` below 2; ``copies`` or ``offload`` given with ``record``; ``record`` that is neither True
            nor False.

    Sources:
        MAML, Finn, Abbeel and Levine 2017, arXiv 1703.03400; products in place of the graph, MixFlow-MG, arXiv
        2505.00793; the copies' places, "revolve", Griewank and Walther 2000, ACM TOMS 26.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.Unrolled())
        >>> il.hypergradient(problem, meta, task, il.AdamW(lr=1e-3, steps=1000), il.Unrolled(copies=20))
    """

    record: bool | None = None
    copies: int | None = None
    offload: bool = False
    learn_start: bool = True

    stays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not isinstance(self.record, bool | None):
            raise ValueError(
                f"Unrolled(record={self.record!r}): give True, False or None; the number of copies is copies="
            )
        if self.copies is not None and not (isinstance(self.copies, int) and self.copies >= 2):
            raise ValueError(f"Unrolled(copies={self.copies!r}): give a whole number from 2, or None for one a step")
        if self.record and (self.copies is not None or self.offload):
            raise ValueError("Unrolled(record=True) keeps a graph and no copies: leave copies and offload out")

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The exact meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        record = self.record or (self.record is None and loop.keep_graphs and self.copies is None and not self.offload)
        if record and loop.solver.steps:
            return _recorded(loop, query, step_weights, self.learn_start)
        return walk(
            loop,
            query,
            step_weights,
            horizon=loop.solver.steps,
            learn_start=self.learn_start,
            copies=self.copies,
            offload=self.offload,
        )


def _recorded(loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None, learn_start: bool) -> Result:
    """Back-propagation through the recorded loop, as one would write it on a blackboard."""
    unrolled = unroll(replace(loop, record=True), query, step_weights, learn_start)
    loss, pull, (support_loss, params, state, extra) = pullback(unrolled, loop.meta, loop.learned, aux=True)
    return without_products(pull(torch.ones_like(loss)), loss, support_loss, extra, End(params, state, loop.steps.stop))


def unroll(
    loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None, learn_start: bool = True
) -> Callable[[Tree, Tree], tuple[Tensor, Any]]:
    """The outer loss as a function of meta and of what the solver learns, a run of the inner loop.

    Beside it the function returns the inner losses, the parameters and state at the end, and what the outer loss
    returned beside its value, ``()`` if nothing. Arguments as in ``MetaGradient.estimate``.
    """
    weights, first = outer_weights(loop, query, step_weights), loop.steps.start

    def unrolled(meta: Tree, learned: Tree) -> tuple[Tensor, Any]:
        start, at = loop.start, loop.begin
        if learn_start and (loop.solver.proximal or not loop.resumed):
            start = started(loop.problem, meta, loop.support)
            at = at if loop.resumed else at._replace(params=start, state=loop.solver.init(start))
        running = replace(loop, meta=meta, learned=learned, start=start, begin=at)
        support_loss: list[Tensor] = []
        judged: list[Tensor] = []

        def judge(step: int, params: Tree) -> Any:
            weight = weights[step - first]
            if not weight and step != loop.steps[-1]:
                return None
            value, extra = outer(loop.problem, params, meta, loop.judged(query, step))
            judged.append(weight * value)
            return extra

        def visit(step: int, params: Tree, state: Any, grad: Tree, loss: Tensor) -> None:
            support_loss.append(loss)
            if step > first:
                judge(step - 1, params)

        end = running.run(loop.solver.steps, visit)
        extra = judge(loop.steps[-1], end.params)
        total = torch.stack(judged).sum() if judged else torch.zeros(())
        return total, (torch.stack(support_loss), end.params, end.state, () if extra is None else extra)

    return unrolled
