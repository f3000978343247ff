"""Reptile (Nichol, Achiam and Schulman, arXiv 1803.02999): move the start towards where the inner loop ends.

grad = start - params_K,     so that an outer SGD step of rate e does   start <- start + e * mean(params_K - start)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from innerloop.inner import InnerSolver, bind
from innerloop.meta_gradient.base import Result
from innerloop.problem import Problem, Task, Tree


@dataclass(frozen=True)
class Reptile:
    """Not a gradient of the outer loss: the query set is only used to report a loss.

    The paper's outer step is plain interpolation; that is ``torch.optim.SGD`` with the interpolation factor as its
    rate.
    """

    second_order: ClassVar[bool] = False
    stepless: ClassVar[str] = ""

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """Refuse what Reptile has no signal for.

        Raises:
            ValueError: only some parameters are adapted, or the solver's rates are learned.
        """
        if partial:
            raise ValueError(
                "Reptile gives no gradient to parameters that the inner loop leaves alone: "
                "use adapts=Everything(), or FirstOrder() in place of Reptile()"
            )
        if type(solver).learned is not InnerSolver.learned:
            raise ValueError(
                f"Reptile gives no gradient to the rates of {type(solver).__name__}: "
                "use SGD, or Unrolled() in place of Reptile()"
            )
        return solver

    def estimate(
        self,
        problem: Problem,
        meta: Tree,
        task: Task,
        solver: InnerSolver,
        learned: Tree,
        step_weights: Sequence[float] | None = None,
    ) -> Result:
        """Reptile's direction for one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given, which weigh query losses that Reptile does not use.
        """
        if step_weights is not None:
            raise ValueError(
                "Reptile has no query loss to weigh step by step: leave step_weights out, or use Unrolled()"
            )
        support_loss = []
        loop = bind(problem, meta, task.support, solver, learned)
        final = loop.run(solver.steps, lambda step, params, state, grad, loss: support_loss.append(loss))
        value = problem.outer_loss(final, meta, task.query)
        loss, extra = value if isinstance(value, tuple) else (value, None)
        back = torch.func.vjp(problem.start, meta)[1]
        (grad,) = back({name: value - final[name] for name, value in loop.start.items()})
        diagnostics = {
            "support_loss": torch.stack(support_loss),
            "curvature_products": torch.zeros((), device=loss.device),
        }
        return Result(grad, {}, loss, final, extra, diagnostics)
