"""The inner loop of one task: the solver bound to a problem, a support set and the current meta-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from innerloop.curvature import curvature, gradient, replayed
from innerloop.inner.base import InnerSolver, Probe, State
from innerloop.problem import Batch, Problem, Tree


@dataclass(frozen=True)
class InnerLoop:
    """Everything that stays fixed while a task is adapted to; no method records a graph."""

    problem: Problem
    meta: Tree
    support: Batch
    solver: InnerSolver
    learned: Tree
    start: Tree

    def gradient(self, step: int, params: Tree) -> tuple[Tree, Tensor]:
        """Gradient of the inner loss and the loss, with the random draws of ``step``."""
        return gradient(self.problem, params, self.meta, self.support, step)

    def curvature(self, step: int, params: Tree, direction: Tree) -> tuple[Tree, Tree]:
        """``(H w, B w)`` with the random draws of ``step``."""
        return curvature(self.problem, params, self.meta, self.support, direction, step)

    def hessian(self, step: int, params: Tree, direction: Tree) -> Tree:
        """``H w`` alone, which spares the way back to the meta-parameters."""
        return curvature(self._constant_meta, params, {}, self.support, direction, step)[0]

    def value(self, step: int, params: Tree) -> Tensor:
        """The inner loss, with the random draws of ``step``."""
        with replayed(self.problem.seed, step):
            return self.problem.inner_loss(params, self.meta, self.support)

    def update(self, step: int, params: Tree, grad: Tree, state: State) -> tuple[Tree, State]:
        """One update of the solver."""
        probe = Probe(partial(self.value, step), partial(self.hessian, step))
        return self.solver.advance(step, params, grad, state, self.learned, self.start, probe)

    def run(self, steps: int, visit: Callable[[int, Tree, State, Tree, Tensor], None] | None = None) -> Tree:
        """Take ``steps`` steps from the start and return the adapted parameters.

        Args:
            steps: how many.
            visit: called before every update with (step, parameters, state, gradient, loss).
        """
        params, state = self.start, self.solver.init(self.start)
        for step in range(steps):
            grad, loss = self.gradient(step, params)
            if visit is not None:
                visit(step, params, state, grad, loss)
            params, state = self.update(step, params, grad, state)
        return params

    @cached_property
    def _constant_meta(self) -> Problem:
        return replace(
            self.problem, inner_loss=lambda params, _, support: self.problem.inner_loss(params, self.meta, support)
        )


def bind(problem: Problem, meta: Tree, support: Batch, solver: InnerSolver, learned: Tree) -> InnerLoop:
    """The inner loop that begins at ``problem.start(meta)``."""
    return InnerLoop(problem, meta, support, solver, learned, problem.start(meta))
