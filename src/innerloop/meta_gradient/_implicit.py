"""Implicit differentiation: the gradient of the solution of the inner problem, whatever path led there.

The inner loop is taken to have minimised  G(params) = inner_loss + weight_decay / 2 |params|^2 + proximal / 2
|params - start|^2.  Differentiating grad G = 0 gives

    (H + (weight_decay + proximal) I) v = d outer_loss / d params        H: Hessian of inner_loss, without the two terms
    meta-gradient  =  d outer_loss / d meta  -  B v  +  proximal (d start / d meta)' v

iMAML (Rajeswaran, Finn, Kakade and Levine, arXiv 1909.04630) is this with a proximal weight, where meta is the start.
Memory-reduced meta-learning (Yang, Ma and Yu, arXiv 2412.12030) is this with weight decay, for a head whose start is
not learned. There the meta-gradient is that of the one scalar  outer_loss(params, meta) - <d inner_loss / d params, v>
with params and v held constant: one pass through the backbone, however many inner steps and iterations went before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.inner import InnerLoop, InnerSolver
from innerloop.linear import CG, Info, LinearSolver, Nystrom, solve_tree
from innerloop.meta_gradient._adjoint import Outer, Trail, add, outer_gradient, outer_weights, scale, through_start
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch, Steps, Tree


@dataclass(frozen=True)
class Implicit(MetaGradient):
    """Differentiates the solution, not the path to it: any inner solver and any number of steps, at the memory of one.

    The error is proportional to what the inner loop leaves unsolved. The inner problem is the user's: its weight decay
    and proximal weight are those of the inner solver, ``SGD(lr=0.1, steps=16, proximal=2.0)`` for iMAML. Without a
    proximal weight the solution does not depend on the start, which then gets a gradient of zero.

    A task that is taken up (``begin=``) begins with the ``v`` that it was left with too.

    Attributes:
        linear_solver: of the linear system.
        learn_start: False takes the start for no function of meta, as memory-reduced meta-learning does.

    Raises:
        ValueError: something else than a linear solver; and what ``check`` and ``estimate`` refuse.

    Sources:
        iMAML, Rajeswaran, Finn, Kakade and Levine 2019, arXiv 1909.04630; Lorraine, Vicol and Duvenaud 2020, arXiv
        1911.02590.

    Example:
        >>> il.hypergradient(problem, meta, task, il.NewtonCG(steps=3), il.Implicit(il.CG(10)))
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=16, proximal=2.0), meta_gradient=il.Implicit())  # iMAML
    """

    linear_solver: LinearSolver = field(default_factory=lambda: CG(iterations=5))
    learn_start: bool = True

    stepless: ClassVar[str] = "differentiates the solution, not the steps to it"
    through_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check what is easily mistaken."""
        if not hasattr(self.linear_solver, "solve"):
            raise ValueError(
                f"Implicit({self.linear_solver!r}): give a linear solver, such as Implicit(il.CG(5)); the weight of "
                "iMAML's proximal term belongs to the inner solver, as in SGD(lr=0.1, steps=16, proximal=2.0)"
            )

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse what the solution does not depend on, and what has no solution.

        Raises:
            ValueError: the solver's rates are learned, its weight decay is no term of the inner loss, everything is
                adapted without a proximal term, or Nystrom's approximation has no inverse.
        """
        super().check(solver, learns=learns, whole=whole)
        refuse_no_solution("Implicit", solver, learns, whole)
        shift = solver.weight_decay + solver.proximal
        if isinstance(self.linear_solver, Nystrom) and not shift + self.linear_solver.damping:
            raise ValueError(
                "Implicit(Nystrom(...)) has nothing on the diagonal, so that the approximation has no inverse: give "
                f"{type(solver).__name__} weight_decay or proximal, give Nystrom(damping=...) above 0, or use CG"
            )
        if whole is False and not shift:
            warnings.warn(
                "Implicit() without weight_decay or proximal in the inner solver: the Hessian of a classifier's head "
                "is singular, so watch solution_norm and residual in the diagnostics"
                + ("" if not self.learn_start else "; and the start of what is adapted gets a gradient of zero"),
                stacklevel=4,
            )

    def advice(self, seen: Seen) -> str:
        """Which of the three things that a solution's derivative relies on is missing."""
        if not seen.far:
            return ""
        if seen.largest is None or seen.smallest is None:
            return "its inner loop diverges: use a smaller inner rate"
        term = "proximal" if seen.inner.proximal or not seen.inner.weight_decay else "weight_decay"
        weight, causes = getattr(seen.inner, term), []
        if abs(seen.smallest) <= 1e-6 * seen.largest:
            causes.append("its system is singular: give weight_decay or proximal above 0")
        elif seen.smallest < 0:
            needed = weight - seen.smallest
            slower = "" if seen.rate is None else f" and an inner rate below {1 / (seen.largest - seen.smallest):.3g}"
            causes.append(
                f"its system is not positive definite, the smallest eigenvalue with {term} {weight:g} being "
                f"{seen.smallest:.3g}: give {term} above {needed:.3g}{slower}"
            )
        if seen.unsolved is not None and seen.unsolved > 0.1:
            overshoots = seen.rate is not None and seen.rate * seen.largest > 1.5
            cure = f"a rate below {1 / seen.largest:.3g}" if overshoots else f"a larger rate or a larger {term}"
            causes.append(
                f"the inner loop leaves {seen.unsolved:.0%} of its gradient, and the estimate takes it for solved: "
                f"take more inner steps, {'or ' if overshoots else ''}{cure}"
            )
        if seen.residual is not None and seen.residual > 0.1:
            causes.append(
                f"the linear solver leaves a residual of {seen.residual:.0%}: give it more iterations, or a larger "
                f"{term}"
            )
        return "; ".join(causes)

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The implicit meta-gradient of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given, or a support batch for every step.
        """
        refuse_path("Implicit", loop, query, step_weights)
        end, support_loss = Trail(loop, loop.steps[:0]).adapt()
        loop = replace(loop, rows=None)  # the solution is that of all examples
        outer = outer_gradient(loop.problem, end.params, loop.meta, loop.judged(query, loop.steps[-1]))
        shift = loop.solver.weight_decay + loop.solver.proximal
        solution, mixed, diagnostics = respond(loop, end.params, outer, self.linear_solver, shift)
        grad = {name: value - mixed[name] for name, value in outer.meta.items()}
        if self.learn_start and loop.solver.proximal:
            grad = add(grad, through_start(loop, scale(solution, loop.solver.proximal)))
        diagnostics = {"support_loss": support_loss, **diagnostics}
        return Result(grad, {}, outer.loss, outer.extra, diagnostics, end._replace(solution=solution))


def MemoryReduced(linear_solver: LinearSolver | None = None) -> Implicit:  # the name of a method
    """Memory-reduced meta-learning (Yang, Ma and Yu, arXiv 2412.12030): ``Implicit(linear_solver, learn_start=False)``.

    Only a head is adapted, from a start that is not learned, and weight decay makes its inner loss strongly convex:

    >>> il.MetaLearner(
    ...     model, adapts=il.Head(), inner=il.SGD(lr=0.1, steps=20, weight_decay=0.05), meta_gradient=il.MemoryReduced()
    ... )

    ``MetaLearner(carry="slot")`` begins every task where the same place of the last batch ended, as printed in the
    paper. The authors' code has no weight decay and begins every task at the same head: leave both out.

    Args:
        linear_solver: 20 conjugate gradients where none is given, as the authors take.
    """
    return Implicit(linear_solver if linear_solver is not None else CG(iterations=20), learn_start=False)


def respond(
    loop: InnerLoop, params: Tree, outer: Outer, linear_solver: LinearSolver, shift: float, divisor: float = 1.0
) -> tuple[Tree, Tree, dict[str, Tensor]]:
    """Solve ``(H / divisor + shift I) v = d outer_loss / d params``.

    Returns:
        ``v``, a tree like ``params``; ``B v``, a tree like meta; and the diagnostics of the solve: ``residual``,
        ``iterations`` and ``negative_curvature`` as in ``innerloop.linear.Info``, ``solution_norm``, which is that of
        ``v``, and ``curvature_products``, the one with the mixed derivative among them.
    """
    hessian, mixed = loop.parts(loop.steps.stop, params)

    def product(direction: Tree) -> Tree:
        return hessian(direction) if divisor == 1 else scale(hessian(direction), 1 / divisor)

    solution, info = solve_tree(linear_solver, product, outer.params, shift, loop.begin.solution or None)
    return solution, mixed(solution), diagnose_solve(solution, info)


def diagnose_solve(solution: Tree, info: Info) -> dict[str, Tensor]:
    """What a linear solve reports."""
    norm = torch.stack([value.square().sum() for value in solution.values()]).sum().sqrt()
    return {
        "curvature_products": torch.as_tensor(info.products + 1.0, device=norm.device),
        "residual": info.residual,
        "iterations": info.iterations,
        "negative_curvature": info.negative_curvature,
        "solution_norm": norm,
    }


def refuse_no_solution(estimator: str, solver: InnerSolver, learns: bool, whole: bool | None = None) -> None:
    """Refuse solvers whose own settings the solution does not follow, and a start that it does not depend on.

    Raises:
        ValueError: learned rates, decoupled weight decay, clipping beside the two terms, or everything adapted without
            a proximal term.
    """
    rule = type(solver).__name__
    if whole and not solver.proximal:
        raise ValueError(
            f"{estimator}() finds that the solution of the inner problem does not depend on where it starts, and all "
            f"that could be learned here is that: give {rule}(proximal=2.0), which is iMAML, or adapt less, as in "
            "adapts=Head()"
        )
    if solver.clip is not None and solver.weight_decay + solver.proximal:
        raise ValueError(
            f"{estimator} differentiates the solution of the inner problem, which {rule}(clip=...) misses: it shortens "
            "the loss's gradient but not weight_decay's and proximal's. Leave clip out, or use Unrolled()"
        )
    if learns:
        raise ValueError(
            f"{estimator} gives no gradient to the rates of {rule}, on which the solution of the inner problem does "
            "not depend: use SGD, Momentum, Adam or NewtonCG, or Unrolled() in its place"
        )
    if solver.decoupled and solver.weight_decay:
        raise ValueError(
            f"{estimator} differentiates the solution of the inner problem, of which {rule}'s weight decay is no term: "
            "use Adam or SGD with weight_decay, or Unrolled()"
        )


def refuse_path(estimator: str, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None) -> None:
    """Refuse what is about the steps to the solution.

    Raises:
        ValueError: a multi-step loss, or a support batch for every step.
    """
    if step_weights is not None:
        raise ValueError(
            f"{estimator} differentiates the solution, not the steps to it: leave step_weights out, or use Unrolled()"
        )
    if isinstance(loop.support, Steps):
        raise ValueError(
            f"{estimator} differentiates the solution of one inner problem and needs one fixed support batch, not a "
            "batch for every step (Steps): use Unrolled(), Truncated() or Window()"
        )
    outer_weights(loop, query, None)  # refuses a stream of queries that is too short
