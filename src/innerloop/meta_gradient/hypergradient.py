"""The estimators for any bilevel problem, few-shot learner or not."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from innerloop.curvature import second_order_kernels
from innerloop.inner import InnerSolver
from innerloop.meta_gradient.base import MetaGradient, Result
from innerloop.meta_gradient.unrolled import Unrolled
from innerloop.problem import Problem, Task, Tree


def hypergradient(
    problem: Problem,
    meta: Tree,
    task: Task,
    inner: InnerSolver,
    estimator: MetaGradient | None = None,
    learned: Tree | None = None,
) -> Result:
    """Solve the inner problem and estimate the gradient of the outer loss in the meta-parameters.

    Args:
        problem: start, inner loss and outer loss.
        meta: the meta-parameters, tensors by name; they are not changed and need no ``requires_grad``.
        task: what the two losses read: ``task.support`` for the inner, ``task.query`` for the outer.
        inner: the inner solver.
        estimator: how the gradient is found; None is the exact ``Unrolled()``.
        learned: the solver's own meta-parameters (learned rates); None starts them as ``inner.learned`` says.

    Returns:
        ``grad`` (a tree like ``meta``), ``loss``, ``params``, ``diagnostics`` and more: see ``Result``.

    Raises:
        ValueError: the estimator refuses the solver, or the problem's ``moves``.
    """
    estimator = estimator if estimator is not None else Unrolled()
    refuse_moves(estimator, inner, problem.moves)
    inner = estimator.prepare(inner, partial=None)
    with torch.no_grad(), second_order_kernels():
        if learned is None:
            learned = inner.learned(problem.start(meta))
        return estimator.estimate(problem, meta, task, inner, learned)


def refuse_moves(estimator: MetaGradient, solver: InnerSolver, moves: Sequence[Container[str]]) -> None:
    """Refuse what cannot follow steps in which different parameters move.

    Raises:
        ValueError: an estimator that does not go back step by step, or a solver that looks beyond the gradient of what
            moves, and ``moves`` that are not empty.
    """
    if moves and estimator.stepless:
        raise ValueError(
            f"{type(estimator).__name__} {estimator.stepless}, so it cannot follow a table in which other parameters "
            "move in other steps: use Unrolled(), Truncated() or FirstOrder(), or one pattern for all steps, such as "
            "Blocks('00011')"
        )
    if moves and not solver.differentiable:
        raise ValueError(
            f"{type(solver).__name__} chooses its direction for all parameters together, so it cannot follow a table "
            "in which other parameters move in other steps: use SGD, Momentum or Adam, or one pattern for all steps, "
            "such as Blocks('00011')"
        )
