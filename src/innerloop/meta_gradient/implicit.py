"""Implicit gradients, iMAML (Rajeswaran, Finn, Kakade and Levine, arXiv 1909.04630).

The inner loop is taken to have minimised  G(params) = inner_loss + proximal / 2 |params - start|^2.  Whatever path led
there, differentiating grad G = 0 gives

    v = (I + H / proximal)^-1 d outer_loss / d params                H: Hessian of inner_loss, without the proximal term
    meta-gradient  =  d outer_loss / d meta  +  (d start / d meta)' v  -  B v / proximal

whose first and last terms vanish where, as in the paper, meta is the start alone. With weight decay w in the inner
solver, G has w / 2 |params|^2 too, and the matrix is (1 + w / proximal) I + H / proximal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop.inner import SGD, InnerLoop, InnerSolver, bind
from innerloop.linear import CG, Info, LinearSolver, Product, solve_tree
from innerloop.linear.base import relative_norm
from innerloop.meta_gradient.adjoint import Outer, adapt, add, outer_gradient
from innerloop.meta_gradient.base import Result
from innerloop.problem import Problem, Task, Tree

_RELEASED_EXTRA = 10.0  # `lam_damping`, an undocumented default of the authors' code


@dataclass(frozen=True)
class Implicit:
    """Differentiates the solution, not the path to it: any inner solver and any number of steps, at the memory of one.

    The error is proportional to what the inner loop leaves unsolved. The weight ``proximal`` is handed to the inner
    solver, so that meta-training, evaluation and adaptation minimise the same G.

    Attributes:
        proximal: weight of the pull towards the start, above 0; the paper takes 2 on Omniglot.
        solver: of the linear system; its ``damping`` g makes the matrix (1 + g) I + H / proximal.
        released_variant: what the authors' published code computes in place of the paper's formula. Plain gradient
            steps without the proximal term, then one gradient step on that term alone, which takes the parameters to
            ``start + (1 - lr * proximal) (params - start)``, in meta-training only; the matrix
            ``(1 + damping) I + H / (proximal + 10)``; no solve, ``v`` being its right-hand side, for ``CG(1)``. Their
            command is ``Implicit(2.0, CG(5, damping=1.0), released_variant=True)`` with ``SGD(lr=0.1)``.

    Raises:
        ValueError: a weight that is not above 0, or the released variant without CG.
    """

    proximal: float = 2.0
    solver: LinearSolver = field(default_factory=lambda: CG(iterations=5))
    released_variant: bool = False

    second_order: ClassVar[bool] = True
    stepless: ClassVar[str] = "differentiates the solution, not the steps to it"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.proximal > 0:
            raise ValueError(
                f"Implicit(proximal={self.proximal}): must be above 0, or the start has no part in the solution; "
                "for a head whose start is not meta-learned use MemoryReduced()"
            )
        if self.released_variant and not isinstance(self.solver, CG):
            raise ValueError(f"Implicit(released_variant=True) solves by CG: give solver=CG(...), not {self.solver}")

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """The solver with this proximal weight.

        Raises:
            ValueError: another weight was given to the solver, its rates are learned, or the released variant is to run
                with anything but plain gradient descent.
        """
        refuse_learned_rates("Implicit", solver)
        if solver.proximal not in (0.0, self.proximal):
            raise ValueError(
                f"Implicit(proximal={self.proximal}) and {type(solver).__name__}(proximal={solver.proximal}) disagree: "
                "give the weight to Implicit alone"
            )
        if self.released_variant:
            if type(solver) is not SGD:
                raise ValueError(
                    f"Implicit(released_variant=True) takes plain gradient steps: use SGD, not {type(solver).__name__}"
                )
            return replace(solver, proximal=0.0)
        return replace(solver, proximal=self.proximal)

    def estimate(
        self,
        problem: Problem,
        meta: Tree,
        task: Task,
        solver: InnerSolver,
        learned: Tree,
        step_weights: Sequence[float] | None = None,
    ) -> Result:
        """The implicit meta-gradient of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given; only the solution is differentiated, not the steps to it.
        """
        refuse_step_weights("Implicit", step_weights)
        loop = bind(problem, meta, task.support, solver, learned)
        params, _, support_loss = adapt(loop, keep=())
        scale, linear = self.proximal, self.solver
        if self.released_variant:
            scale = self.proximal + _RELEASED_EXTRA
            kept = 1 - solver.lr * self.proximal
            params = {name: start + kept * (params[name] - start) for name, start in loop.start.items()}
            if isinstance(linear, CG) and linear.iterations == 1:
                linear = _Unsolved()
        outer = outer_gradient(problem, params, meta, task.query)
        response = respond(loop, params, outer, linear, scale, 1 + solver.weight_decay / scale)
        back = torch.func.vjp(problem.start, meta)[1]
        (through_start,) = back(response.solution)
        return Result(
            add(response.meta, through_start),
            {},
            outer.loss,
            params,
            outer.extra,
            {"support_loss": support_loss, **response.diagnostics},
        )


class _Unsolved:
    """Takes the right-hand side for the solution."""

    def solve(
        self, product: Product, b: Tensor, shift: float = 0.0, start: Tensor | None = None
    ) -> tuple[Tensor, Info]:
        none = b.new_zeros(())
        return b, Info(relative_norm(b - product(b) - shift * b, b), none, none, 1)


class Response(NamedTuple):
    """The outer loss's pull on a solution, carried to the meta-parameters that the two losses read."""

    solution: Tree
    meta: Tree
    diagnostics: dict[str, Tensor]


def respond(
    loop: InnerLoop,
    params: Tree,
    outer: Outer,
    solver: LinearSolver,
    scale: float,
    shift: float,
    begin: Tree | None = None,
) -> Response:
    """Solve ``(H / scale + shift I) v = d outer_loss / d params``, and form ``d outer_loss / d meta - B v / scale``.

    Returns:
        ``v``, a tree like ``params``; the difference, a tree like meta; and the diagnostics of the solve: ``residual``,
        ``iterations`` and ``negative_curvature`` as in ``innerloop.linear.Info``, ``solution_norm``, which is that of
        ``v``, and ``curvature_products``.
    """
    step = loop.solver.steps

    def product(direction: Tree) -> Tree:
        return {name: value / scale for name, value in loop.hessian(step, params, direction).items()}

    solution, info = solve_tree(solver, product, outer.params, shift, begin)
    _, mixed = loop.curvature(step, params, solution)
    norm = torch.stack([value.square().sum() for value in solution.values()]).sum().sqrt()
    diagnostics = {
        "curvature_products": torch.as_tensor(info.products + 1.0, device=norm.device),
        "residual": info.residual,
        "iterations": info.iterations,
        "negative_curvature": info.negative_curvature,
        "solution_norm": norm,
    }
    return Response(solution, {name: value - mixed[name] / scale for name, value in outer.meta.items()}, diagnostics)


def refuse_learned_rates(estimator: str, solver: InnerSolver) -> None:
    """The solution of the inner problem does not depend on the rates that led to it.

    Raises:
        ValueError: the solver learns its rates.
    """
    if type(solver).learned is not InnerSolver.learned:
        raise ValueError(
            f"{estimator} gives no gradient to the rates of {type(solver).__name__}, on which the solution of the "
            "inner problem does not depend: use SGD, Momentum, Adam or NewtonCG, or Unrolled() in its place"
        )


def refuse_step_weights(estimator: str, step_weights: Sequence[float] | None) -> None:
    """A multi-step loss judges the path, which is not differentiated here.

    Raises:
        ValueError: weights are given.
    """
    if step_weights is not None:
        raise ValueError(
            f"{estimator} differentiates the solution, not the steps to it: leave step_weights out, or use Unrolled()"
        )
