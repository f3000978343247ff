"""The inner loop of one task: the solver bound to a problem, a support set and the current meta-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
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
        """Gradient of the inner loss and the loss, with the random draws of ``step``; 0 for what stands still in it."""
        moving = {name: value for name, value in params.items() if self._moves(name, step)}
        if len(moving) == len(params):
            return self._gradient(self.problem, step, params)

        def inner_loss(moving: Tree, meta: Tree, support: Batch) -> Tensor:
            return self.problem.inner_loss({**params, **moving}, meta, support)

        grad, loss = self._gradient(replace(self.problem, inner_loss=inner_loss), step, moving)
        return {name: grad[name] if name in grad else torch.zeros_like(p) for name, p in params.items()}, loss

    def _gradient(self, problem: Problem, step: int, params: Tree) -> tuple[Tree, Tensor]:
        return gradient(problem, params, self.meta, self.support, step)

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
        after = self.solver.advance(step, params, grad, state, self.learned, self.start, probe)
        return self.hold(step, (params, state), after)

    def hold(self, step: int, before: tuple[Tree, State], after: tuple[Tree, State]) -> tuple[Tree, State]:
        """Parameters and state after ``step``, in which what does not move is as before."""
        if not self.problem.moves:
            return after

        def merge(old: Any, new: Any) -> Any:
            if not isinstance(new, dict):
                return new
            if new.keys() == self.start.keys():
                return {name: value if self._moves(name, step) else old[name] for name, value in new.items()}
            return {key: merge(old[key], value) for key, value in new.items()}

        return merge(before[0], after[0]), merge(before[1], after[1])

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

    def _moves(self, name: str, step: int) -> bool:
        rows = self.problem.moves
        return not rows or name in rows[min(step, len(rows) - 1)]

    @cached_property
    def _constant_meta(self) -> Problem:
        return replace(
            self.problem, inner_loss=lambda params, _, support: self.problem.inner_loss(params, self.meta, support)
        )


class FirstOrderLoop(InnerLoop):
    """For adaptation alone: its gradients cannot be differentiated again, of which ``torch.func.grad`` keeps a graph.

    They are plain autograd's, of the parameters that move alone: neither weight gradients of the others, nor anything
    below the lowest that moves, is computed or stored. Cannot be vmapped.
    """

    def _gradient(self, problem: Problem, step: int, params: Tree) -> tuple[Tree, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        with torch.enable_grad(), replayed(problem.seed, step):
            loss = problem.inner_loss(leaves, self.meta, self.support)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads, strict=True)), loss.detach()


def bind(
    problem: Problem, meta: Tree, support: Batch, solver: InnerSolver, learned: Tree, first_order: bool = False
) -> InnerLoop:
    """The inner loop that begins at ``problem.start(meta)``; a `FirstOrderLoop` if asked."""
    kind = FirstOrderLoop if first_order else InnerLoop
    return kind(problem, meta, support, solver, learned, problem.start(meta))
