"""First-order MAML (arXiv 1703.03400, 1803.02999): every inner gradient counts as a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from innerloop.inner import InnerSolver
from innerloop.meta_gradient.adjoint import refuse_undifferentiable, walk
from innerloop.meta_gradient.base import Result
from innerloop.problem import Problem, Task, Tree


@dataclass(frozen=True)
class FirstOrder:
    """No curvature product at all: the outer gradient at the adapted parameters is handed to the start.

    What the update does apart from the inner gradient (weight decay, the proximal term, learned rates) is
    differentiated exactly. Meta-parameters that only the inner loss reads get zero: use ``Unrolled`` or ``Truncated``
    for those.
    """

    second_order: ClassVar[bool] = False
    stepless: ClassVar[str] = ""

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """Refuse solvers whose steps cannot be differentiated."""
        refuse_undifferentiable(self, solver)
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
        """The first-order meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        return walk(
            problem,
            meta,
            task,
            solver,
            learned,
            horizon=solver.steps,
            second_order=False,
            step_weights=step_weights,
        )
