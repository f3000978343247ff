"""Memory-reduced meta-learning (Yang, Ma and Yu, arXiv 2412.12030).

Only a head is adapted, its inner loss is strongly convex (a squared L2 term sees to that), and its start is not
meta-learned: a bilevel problem in the backbone alone. At the solution,

    (H + l2 I) v = d outer_loss / d params            H: Hessian of inner_loss, without the L2 term l2 / 2 |params|^2
    meta-gradient  =  d outer_loss / d meta  -  B v

which is the gradient in meta of the one scalar  outer_loss(params, meta) - < d inner_loss / d params, v >  with params
and v held constant: one pass through the backbone, however many inner steps and solver iterations went before.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from innerloop.inner import InnerLoop, InnerSolver
from innerloop.linear import CG, LinearSolver, Nystrom
from innerloop.meta_gradient.adjoint import adapt, outer_gradient, zeros
from innerloop.meta_gradient.base import Result
from innerloop.meta_gradient.failures import finite
from innerloop.meta_gradient.implicit import refuse_learned_rates, refuse_step_weights, respond
from innerloop.problem import Problem, Task, Tree


class Warm(NamedTuple):
    """Where to begin with a task: the inner loop's parameters and the linear system's ``v``, two trees alike."""

    params: Tree
    solution: Tree


@dataclass(frozen=True)
class MemoryReduced:
    """The start gets a gradient of zero, whatever it is a function of.

    The error falls by ``1 - lr * l2`` an inner step at worst, so a small ``l2`` wants many steps or ``NewtonCG``: far
    from the solution the estimate can be worse than ``FirstOrder()``.

    Attributes:
        solver: of the linear system.
        l2: weight of the L2 term, 0 or more; handed to the inner solver as its weight decay, so evaluation and
            adaptation have it too. Give 0 where the inner loss is strongly convex by itself.
        warm_start: what inner loop and linear system begin from. ``"none"``: the start and zero. ``"slot"``: where the
            same place of the last batch ended, whichever task that was, as printed in the paper. ``"task"``: where the
            same task ended when it was last seen, of use where tasks recur. Outside meta-training a task always begins
            at the start.

    Raises:
        ValueError: a setting outside its range.
    """

    solver: LinearSolver = field(default_factory=CG)
    l2: float = 0.05
    warm_start: Literal["none", "slot", "task"] = "none"

    second_order: ClassVar[bool] = True
    stepless: ClassVar[str] = "differentiates the solution, not the steps to it"
    learn_start: ClassVar[bool] = False

    @classmethod
    def paper(cls, l2: float = 0.05, iterations: int = 20) -> MemoryReduced:
        """The algorithm as printed: L2 term, and warm starts by place in the batch."""
        return cls(CG(iterations), l2, "slot")

    @classmethod
    def released(cls, iterations: int = 20) -> MemoryReduced:
        """What the authors' code runs: no L2 term, and every task begins at the same head, which is never changed.

        The system is singular then, and the limited number of iterations all that keeps ``v`` small.
        """
        return cls(CG(iterations), 0.0, "none")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.l2 >= 0:
            raise ValueError(f"MemoryReduced(l2={self.l2}): must be 0 or more")
        if self.warm_start not in ("none", "slot", "task"):
            raise ValueError(f"MemoryReduced(warm_start={self.warm_start!r}): choose 'none', 'slot' or 'task'")
        if isinstance(self.solver, Nystrom) and self.l2 + self.solver.damping == 0:
            raise ValueError(
                "MemoryReduced(Nystrom(...), l2=0) has nothing on the diagonal, so that the approximation has no "
                "inverse: give l2 or Nystrom(damping=...) above 0, or use CG"
            )

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """The solver with the L2 term as its weight decay; ``partial`` is None for a problem that is no learner's.

        Raises:
            ValueError: everything is adapted, so that nothing is left to learn; or the solver has another weight decay,
                a proximal term or learned rates.
        """
        if partial is False:
            raise ValueError(
                "MemoryReduced does not meta-learn the parameters that are adapted, and here that is all that is not "
                "frozen: use adapts=Head() with a body that learns, or Implicit() in place of MemoryReduced()"
            )
        refuse_learned_rates("MemoryReduced", solver)
        name = type(solver).__name__
        if solver.proximal:
            raise ValueError(
                f"{name}(proximal={solver.proximal}) pulls towards a start that MemoryReduced does not meta-learn: "
                "leave it out, or use Implicit(proximal=...) in place of MemoryReduced()"
            )
        if solver.weight_decay not in (0.0, self.l2):
            raise ValueError(
                f"MemoryReduced(l2={self.l2}) and {name}(weight_decay={solver.weight_decay}) disagree: "
                "give the weight to MemoryReduced alone"
            )
        if partial and self.l2 == 0:
            warnings.warn(
                "MemoryReduced(l2=0): without an L2 term the Hessian of a classifier's head is singular and the linear "
                "system has no solution; watch solution_norm and residual in the diagnostics, or give l2 above 0",
                stacklevel=3,
            )
        return replace(solver, weight_decay=self.l2)

    def estimate(
        self,
        problem: Problem,
        meta: Tree,
        task: Task,
        solver: InnerSolver,
        learned: Tree,
        step_weights: Sequence[float] | None = None,
    ) -> Result:
        """The meta-gradient of one task from a cold start; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given; only the solution is differentiated, not the steps to it.
        """
        refuse_step_weights("MemoryReduced", step_weights)
        return self._from(problem, meta, task, solver, problem.start(meta), None)[0]

    def cold(self, problem: Problem, meta: Tree) -> Warm:
        """Where a task begins that has not been seen."""
        start = problem.start(meta)
        return Warm(start, zeros(start))

    def resume(self, problem: Problem, meta: Tree, task: Task, solver: InnerSolver, warm: Warm) -> tuple[Result, Warm]:
        """The meta-gradient of one task from where it was left, and where it is left now.

        A task in which something is not finite is left where it was.
        """
        result, left = self._from(problem, meta, task, solver, warm.params, warm.solution)
        whole = finite((result.grad, result.loss, left))
        return result, torch.utils._pytree.tree_map(lambda new, old: torch.where(whole, new, old), left, warm)

    def _from(
        self, problem: Problem, meta: Tree, task: Task, solver: InnerSolver, start: Tree, solution: Tree | None
    ) -> tuple[Result, Warm]:
        loop = InnerLoop(problem, meta, task.support, solver, {}, start)
        params, _, support_loss = adapt(loop, keep=())
        outer = outer_gradient(problem, params, meta, task.query)
        response = respond(loop, params, outer, self.solver, 1.0, solver.weight_decay, solution)
        diagnostics = {"support_loss": support_loss, **response.diagnostics}
        result = Result(response.meta, {}, outer.loss, params, outer.extra, diagnostics)
        return result, Warm(params, response.solution)


class WarmStarts:
    """Where tasks were left, by key: the place in the batch, or whatever names a task that recurs.

    Holds twice the adapted parameters for every key seen. Saved and loaded like an optimiser's state.
    """

    def __init__(self) -> None:
        self._left: dict[Hashable, Warm] = {}

    def gather(self, keys: Sequence[Hashable], cold: Warm) -> Warm:
        """Where the tasks of a batch begin, stacked in the order of the keys; ``cold`` for a key not seen."""
        found = [self._left.get(key, cold) for key in keys]

        def stack(like: Tensor, *parts: Tensor) -> Tensor:
            return torch.stack([part.to(like) for part in parts])  # what was loaded may lie on another device

        return torch.utils._pytree.tree_map(stack, cold, *found)

    def store(self, keys: Sequence[Hashable], left: Warm) -> None:
        """Keep where the tasks of a batch were left, stacked likewise."""
        for place, key in enumerate(keys):
            self._left[key] = torch.utils._pytree.tree_map(lambda value, place=place: value[place].clone(), left)

    def state_dict(self) -> dict[Hashable, dict[str, Tree]]:
        """Where every task was left, in dicts and tensors alone."""
        return {key: left._asdict() for key, left in self._left.items()}

    def load_state_dict(self, state: Mapping[Hashable, Mapping[str, Tree]]) -> None:
        """Take over what ``state_dict`` gave, in place of what is held."""
        self._left = {key: Warm(**left) for key, left in state.items()}
