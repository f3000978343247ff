"""A convex mixture of truncated meta-gradients, all of them from one walk (Bonnet et al., arXiv 2111.00206).

    grad  =  sum_n c_n grad^(n),     grad^(n) = the meta-gradient through the last n inner steps,     sum_n c_n = 1

Short horizons are biased, long ones noisy where inner batches or environments are random; the mixture trades the two.
Every grad^(n) is what the walk back to the longest horizon holds after n steps, so that all cost what the longest does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from innerloop.inner import InnerSolver, bind
from innerloop.meta_gradient.adjoint import (
    adapt,
    add,
    bend,
    conclude,
    judge,
    outer_weights,
    pull,
    refuse_undifferentiable,
    scale,
)
from innerloop.meta_gradient.base import Result
from innerloop.problem import Problem, Task, Tree


@dataclass(frozen=True)
class Mixed:
    """The sum of ``weights[i] * Truncated(horizons[i])``, at the cost of the longest horizon.

    Attributes:
        horizons: through how many of the last steps to go back, each 0 or more and no two alike. Where the inner loop
            has fewer steps, all of them.
        weights: one for each horizon, 0 or more, with sum 1.

    Raises:
        ValueError: horizons or weights outside these ranges.
    """

    horizons: tuple[int, ...]
    weights: tuple[float, ...]

    second_order: ClassVar[bool] = True
    stepless: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the ranges; lists will do where tuples are meant."""
        object.__setattr__(self, "horizons", tuple(self.horizons))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.horizons or any(not isinstance(n, int) or n < 0 for n in self.horizons):
            raise ValueError(f"Mixed(horizons={self.horizons}): give one or more numbers of last steps, each 0 or more")
        if len(set(self.horizons)) < len(self.horizons):
            raise ValueError(f"Mixed(horizons={self.horizons}): a horizon occurs twice; add up its weights")
        if len(self.weights) != len(self.horizons):
            raise ValueError(f"Mixed has {len(self.horizons)} horizons and {len(self.weights)} weights: give one each")
        if not all(weight >= 0 for weight in self.weights) or not math.isclose(sum(self.weights), 1.0, rel_tol=1e-6):
            raise ValueError(f"Mixed(weights={self.weights}): each must be 0 or more, and their sum 1")

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """Refuse what cannot be differentiated step by step.

        Raises:
            ValueError: the solver's steps are not differentiable.
        """
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
        """The mixed meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        shares: dict[int, float] = {}
        for horizon, weight in zip(self.horizons, self.weights, strict=True):
            reached = min(horizon, solver.steps)
            shares[reached] = shares.get(reached, 0.0) + weight
        loop = bind(problem, meta, task.support, solver, learned)
        weights = outer_weights(solver, step_weights)
        back = range(solver.steps - max(shares), solver.steps)
        final, kept, support_loss = adapt(loop, keep=back)
        loss, cotangents, extra = judge(loop, task.query, final, weights[-1])
        mixed = scale(cotangents, shares.get(0, 0.0))
        for step in reversed(back):
            place = kept.pop(step)
            cotangents, grad = pull(loop, range(step, step + 1), place, cotangents)
            cotangents = bend(loop, step, place.params, cotangents, grad)
            if step > 0 and weights[step - 1]:
                early, more, _ = judge(loop, task.query, place.params, weights[step - 1])
                loss, cotangents = loss + early, add(cotangents, more)
            if share := shares.get(solver.steps - step):
                mixed = add(mixed, scale(cotangents, share))
        return conclude(loop, mixed, loss, final, extra, support_loss, len(back))
