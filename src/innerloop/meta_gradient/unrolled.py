"""The exact meta-gradient of MAML (arXiv 1703.03400), at the memory of one inner step.

With u = d outer_loss / d params after the last step, and for plain gradient descent,

    u <- u - lr * H(params_k) u,     grad_meta <- grad_meta - lr * B(params_k) u          for k = steps - 1 .. 0

which is back-propagation through the unrolled loop, written with one curvature product a step in place of the graph
(the mixed-mode differentiation of MixFlow-MG, arXiv 2505.00793).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from innerloop.inner import InnerSolver
from innerloop.meta_gradient.adjoint import refuse_undifferentiable, walk
from innerloop.meta_gradient.base import Result
from innerloop.problem import Problem, Task, Tree


@dataclass(frozen=True)
class Unrolled:
    """Exact for every inner solver, learned rates and meta-parameters inside the inner loss included.

    Attributes:
        keep_every: keep the parameters before every n-th inner step and compute those between again on the way back:
            n times fewer snapshots for one more pass over the inner loop. ``"sqrt"`` takes the root of the steps; None
            keeps all, which is best unless steps times parameters is what fills the memory.
        learn_start: False holds what is adapted at its first values, which then are no meta-parameters: with ``Head()``
            that is ITD-BiO (arXiv 2010.07962), bilevel in the backbone alone.

    Raises:
        ValueError: ``keep_every`` below 1.
    """

    keep_every: int | Literal["sqrt"] | None = None
    learn_start: bool = True

    second_order: ClassVar[bool] = True
    stepless: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.keep_every not in (None, "sqrt") and not (isinstance(self.keep_every, int) and self.keep_every >= 1):
            raise ValueError(f"Unrolled(keep_every={self.keep_every!r}): give a whole number from 1, 'sqrt' or None")

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """Refuse solvers whose steps cannot be differentiated, and learning nothing."""
        refuse_undifferentiable(self, solver)
        if partial is False and not self.learn_start:
            raise ValueError(
                "Unrolled(learn_start=False) learns only what is not adapted, and here all that is not frozen "
                "is: use adapts=Head() with a body that learns, or Unrolled() in place of Unrolled(learn_start=False)"
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
        """The exact meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        if not self.learn_start:
            start = problem.start(meta)
            problem = replace(problem, start=lambda meta: start)
        root = math.ceil(math.sqrt(solver.steps))
        keep_every = root if self.keep_every == "sqrt" else self.keep_every or 1
        return walk(
            problem, meta, task, solver, learned, horizon=solver.steps, keep_every=keep_every, step_weights=step_weights
        )
