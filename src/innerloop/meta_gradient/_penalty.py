"""The penalty method: two inner problems solved by first-order steps, and the difference of their gradients in meta.

    params*  minimises  G,          params_w  minimises  G + w outer_loss,          G as for implicit differentiation
    grad  =  d outer_loss / d meta (params_w)  +  [ d G / d meta (params_w)  -  d G / d meta (params*) ] / w

which is the derivative of  (min (G + w outer_loss) - min G) / w  and of order w from that of the solution. After
first-order MAML by a penalty (arXiv 2409.03682), reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from innerloop.curvature import outer, parted
from innerloop.inner import InnerLoop, InnerSolver
from innerloop.meta_gradient._adjoint import Trail, add, outer_gradient, through_start
from innerloop.meta_gradient._base import MetaGradient, Result, Seen, without_products
from innerloop.meta_gradient._implicit import refuse_no_solution, refuse_path
from innerloop.meta_gradient._sama import gradient_in_meta
from innerloop.problem import Batch, End, Tree


@dataclass(frozen=True)
class Penalty(MetaGradient):
    """Differentiates the solution like `Implicit`, with plain gradients alone: no product and no linear system.

    The second problem starts at the solution of the first and takes as many steps. Errors of the solutions count
    ``1 / weight`` times, so a smaller weight asks for more steps, and for float64 below 1e-3. Without ``proximal`` the
    start gets a gradient of zero, as in `Implicit`.

    Attributes:
        weight: w, above 0; the error is of its order.

    Raises:
        ValueError: a weight that is not above 0; and what `Implicit` refuses of a solver and a task.

    Source:
        After arXiv 2409.03682; reconstructed from what is said of it.

    Example:
        >>> il.hypergradient(problem, meta, task, il.SGD(lr=0.1, steps=200), il.Penalty(0.01))
    """

    weight: float = 0.01

    stepless: ClassVar[str] = "differentiates the solution, not the steps to it"
    through_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.weight > 0:
            raise ValueError(f"Penalty({self.weight}): must be above 0")

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse what the solution does not depend on.

        Raises:
            ValueError: as `Implicit`.
        """
        super().check(solver, learns=learns, whole=whole)
        refuse_no_solution("Penalty", solver, learns, whole)

    def advice(self, seen: Seen) -> str:
        """That both problems have to be solved."""
        return "it takes both inner problems for solved: use more inner steps, or another weight" if seen.far else ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The penalised estimate of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given, or a support batch for every step.
        """
        refuse_path("Penalty", loop, query, step_weights)
        end, support_loss = Trail(loop, loop.steps[:0]).adapt()
        loop, judged = replace(loop, rows=None), loop.judged(query, loop.steps[-1])
        loss, extra = outer(loop.problem, end.params, loop.meta, judged)
        pushed = self._pushed(loop, end, judged)
        direct = outer_gradient(loop.problem, pushed, loop.meta, judged).meta
        after, before = (gradient_in_meta(loop, loop.steps.stop, params) for params in (pushed, end.params))
        grad = {name: direct[name] + (after[name] - before[name]) / self.weight for name in direct}
        if share := loop.solver.proximal / self.weight:
            grad = add(grad, through_start(loop, {n: share * (p - pushed[n]) for n, p in end.params.items()}))
        return without_products((grad, {}), loss, support_loss, extra, end)

    def _pushed(self, loop: InnerLoop, end: End, query: Batch) -> Tree:
        """The solution once the outer loss counts ``weight``."""
        own = loop.problem

        def both(params: Tree, meta: Tree, batch: Batch) -> Tensor:
            return (
                own.inner_loss(params, meta, batch[0]) + self.weight * parted(own.outer_loss(params, meta, batch[1]))[0]
            )

        problem = replace(own, inner_loss=both, inner_chain=None, engine=None)
        begin = End(end.params, loop.solver.init(end.params), 0)
        return replace(loop, problem=problem, support=(loop.support, query), begin=begin).run(loop.solver.steps).params
