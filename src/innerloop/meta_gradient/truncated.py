"""Truncated back-propagation: the meta-gradient through the last n inner steps only.

u  =  prod_{k = steps - n}^{steps - 1} (I - lr H(params_k))  d outer_loss / d params
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from innerloop.inner import InnerSolver
from innerloop.meta_gradient.adjoint import refuse_undifferentiable, walk
from innerloop.meta_gradient.base import Result
from innerloop.problem import Problem, Task, Tree


@dataclass(frozen=True)
class Truncated:
    """Cheaper than ``Unrolled`` by the steps left out; equal to it if ``horizon`` reaches all of them.

    Attributes:
        horizon: how many of the last steps to differentiate, 0 or more. Rates learn from those steps alone: rates of
            earlier steps, and with a horizon of 0 all of them, stay as they are.

    Raises:
        ValueError: a negative horizon.
    """

    horizon: int

    second_order: ClassVar[bool] = True
    stepless: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.horizon < 0:
            raise ValueError(
                f"Truncated({self.horizon}): give how many of the last inner steps to differentiate, 0 or more"
            )

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
        """The truncated meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        return walk(problem, meta, task, solver, learned, horizon=self.horizon, step_weights=step_weights)
