"""What authors' published code computes where that is not their paper's formula, by name.

iMAML (Rajeswaran, Finn, Kakade and Levine, arXiv 1909.04630), their released code:

    params  <-  start + (1 - lr lambda) (params - start)          one step on the proximal term, after plain ones
    ((1 + damping) I + H / (lambda + 10)) v = d outer_loss / d params
    meta-gradient  =  d outer_loss / d meta  +  (d start / d meta)' v  -  B v / (lambda + 10)

Memory-reduced meta-learning's released code is ``MemoryReduced()`` with no weight decay. BinomMAML's is
``Binomial(order, damping="released")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from innerloop.curvature import started
from innerloop.inner import SGD, InnerLoop, InnerSolver
from innerloop.linear import CG, Info, Product
from innerloop.linear._base import relative_norm
from innerloop.meta_gradient._adjoint import Trail, add, outer_gradient, through_start
from innerloop.meta_gradient._base import MetaGradient, Result
from innerloop.meta_gradient._implicit import refuse_no_solution, refuse_path, respond
from innerloop.problem import Batch

_EXTRA = 10.0  # `lam_damping`, an undocumented default of the authors' code


@dataclass(frozen=True)
class ReleasedIMAML(MetaGradient):
    """iMAML as its authors' published code computes it; ``Implicit`` with a proximal weight is the paper's.

    The proximal term is applied in meta-training only. Their command is ``ReleasedIMAML(2.0, CG(5, damping=1.0))`` with
    ``SGD(lr=0.1, steps=16)``. With ``CG(1)`` nothing is solved, ``v`` being its right-hand side.

    Attributes:
        proximal: lambda, above 0.
        linear_solver: conjugate gradients.

    Raises:
        ValueError: a weight that is not above 0, or another linear solver.

    Source:
        Rajeswaran, Finn, Kakade and Levine 2019, arXiv 1909.04630, their published code.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=16), meta_gradient=il.ReleasedIMAML(proximal=2.0))
    """

    proximal: float = 2.0
    linear_solver: CG = field(default_factory=lambda: CG(5, damping=1.0))

    stepless: ClassVar[str] = "differentiates the solution, not the steps to it"
    through_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.proximal > 0:
            raise ValueError(f"ReleasedIMAML(proximal={self.proximal}): must be above 0")
        if not isinstance(self.linear_solver, CG):
            raise ValueError(f"ReleasedIMAML solves by CG: give linear_solver=CG(...), not {self.linear_solver}")

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse anything but plain gradient steps.

        Raises:
            ValueError: so.
        """
        super().check(solver, learns=learns, whole=whole)
        refuse_no_solution("ReleasedIMAML", solver, learns)
        if type(solver) is not SGD or solver.proximal or not isinstance(solver.lr, (int, float)):
            raise ValueError(
                "ReleasedIMAML takes plain gradient steps at one rate, and the proximal term's own afterwards: use "
                f"SGD(lr=0.1, steps=16), not {solver}"
            )

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        refuse_path("ReleasedIMAML", loop, query, step_weights)
        end, support_loss = Trail(loop, loop.steps[:0]).adapt()
        loop = replace(loop, rows=None)  # the solution is that of all examples
        kept, divisor = 1 - loop.solver.rate(0, "") * self.proximal, self.proximal + _EXTRA
        start = started(loop.problem, loop.meta, loop.support)
        params = {name: value + kept * (end.params[name] - value) for name, value in start.items()}
        outer = outer_gradient(loop.problem, params, loop.meta, loop.judged(query, loop.steps[-1]))
        linear = _Unsolved() if self.linear_solver.iterations == 1 else self.linear_solver
        shift = 1 + loop.solver.weight_decay / divisor
        solution, mixed, diagnostics = respond(loop, params, outer, linear, shift, divisor)
        grad = {name: value - mixed[name] / divisor for name, value in outer.meta.items()}
        grad = add(grad, through_start(loop, solution))
        end = end._replace(params=params, solution=solution)
        return Result(grad, {}, outer.loss, outer.extra, {"support_loss": support_loss, **diagnostics}, end)


class _Unsolved:
    """Takes the right-hand side for the solution."""

    def solve(
        self, product: Product, b: Tensor, shift: float = 0.0, start: Tensor | None = None
    ) -> tuple[Tensor, Info]:
        none = b.new_zeros(())
        return b, Info(relative_norm(b - product(b) - shift * b, b), none, none, 1)
