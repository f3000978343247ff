"""Going back through an inner loop without a graph: the walk that the estimators share.

For a step  params' , state' = update(params, g(params, meta), state, learned, start)  and the cotangents of its results,

    (params, g, state, learned, start cotangents)  =  pull-back of update          cheap and elementwise
    params cotangent += H (g cotangent),   meta cotangent += B (g cotangent)       one curvature product

so only the parameters before each step have to be kept, never activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop.inner import InnerLoop, InnerSolver, bind
from innerloop.meta_gradient.base import Result
from innerloop.problem import Batch, Problem, Task, Tree


class Snapshot(NamedTuple):
    """Where the inner loop stood before a step; ``grad`` may be anything of its shape if the solver does not need it."""

    params: Tree
    state: Any
    grad: Tree


class Cotangents(NamedTuple):
    """Derivatives of the outer loss in everything that an inner step reads."""

    params: Tree
    state: Any
    learned: Tree
    start: Tree
    meta: Tree


class Outer(NamedTuple):
    """The outer loss, its two partial gradients and what it returned beside its value."""

    loss: Tensor
    params: Tree
    meta: Tree
    extra: Any


def outer_gradient(problem: Problem, params: Tree, meta: Tree, query: Batch) -> Outer:
    """Partial gradients of the outer loss in the adapted parameters and in the meta-parameters."""

    def loss(params: Tree, meta: Tree) -> tuple[Tensor, Any]:
        value = problem.outer_loss(params, meta, query)
        return value if isinstance(value, tuple) else (value, None)

    (in_params, in_meta), (value, extra) = torch.func.grad_and_value(loss, argnums=(0, 1), has_aux=True)(params, meta)
    return Outer(value, in_params, in_meta, extra)


def zeros(tree: Any) -> Any:
    """Zero tensors in the shape of a tree."""
    return torch.utils._pytree.tree_map(torch.zeros_like, tree)


def add(first: Any, second: Any) -> Any:
    """The sum of two trees."""
    return torch.utils._pytree.tree_map(torch.add, first, second)


def initial(loop: InnerLoop, outer: Outer) -> Cotangents:
    """The cotangents after the last step: those of the outer loss itself."""
    return Cotangents(
        outer.params, zeros(loop.solver.init(loop.start)), zeros(loop.learned), zeros(loop.start), outer.meta
    )


def pull(
    loop: InnerLoop, steps: range, snapshot: Snapshot, cotangents: Cotangents
) -> tuple[Cotangents, Tree]:
    """Pull cotangents back through the updates of ``steps``, all of which use the snapshot's one gradient.

    Returns:
        The cotangents before the first of them, with the gradient held constant, and the cotangent of that gradient.
    """

    def updates(params: Tree, grad: Tree, state: Any, learned: Tree, start: Tree) -> tuple[Tree, Any]:
        for step in steps:
            params, state = loop.solver.update(step, params, grad, state, learned, start)
        return params, state

    _, back = torch.func.vjp(updates, snapshot.params, snapshot.grad, snapshot.state, loop.learned, loop.start)
    params, grad, state, learned, start = back((cotangents.params, cotangents.state))
    before = Cotangents(
        params, state, add(cotangents.learned, learned), add(cotangents.start, start), cotangents.meta
    )
    return before, grad


def bend(loop: InnerLoop, step: int, params: Tree, cotangents: Cotangents, grad: Tree) -> Cotangents:
    """Carry a gradient's cotangent through the gradient itself: the curvature product of a step."""
    in_params, in_meta = loop.curvature(step, params, grad)
    return cotangents._replace(params=add(cotangents.params, in_params), meta=add(cotangents.meta, in_meta))


def meta_cotangent(problem: Problem, meta: Tree, cotangents: Cotangents) -> Tree:
    """The meta-gradient once the walk is at the start: what reached meta directly, and through ``problem.start``."""
    _, back = torch.func.vjp(problem.start, meta)
    (through_start,) = back(add(cotangents.params, cotangents.start))
    return add(cotangents.meta, through_start)


def walk(
    problem: Problem,
    meta: Tree,
    task: Task,
    solver: InnerSolver,
    learned: Tree,
    *,
    horizon: int,
    second_order: bool = True,
    keep_every: int = 1,
    step_weights: Sequence[float] | None = None,
) -> Result:
    """Adapt, then differentiate through the last ``horizon`` steps.

    Args:
        problem: the bilevel problem.
        meta: the meta-parameters.
        task: support and query.
        solver: the inner solver.
        learned: its own meta-parameters.
        horizon: through how many of the last steps to go back; earlier ones count as constant, as in truncated
            back-propagation.
        second_order: False drops every curvature product.
        keep_every: keep the parameters before every n-th step only; those between are computed again on the way back.
        step_weights: as in ``MetaGradient.estimate``.
    """
    if step_weights is not None and len(step_weights) != solver.steps:
        raise ValueError(f"step_weights holds {len(step_weights)} weights for {solver.steps} inner steps: give one a step")
    loop = bind(problem, meta, task.support, solver, learned)
    first = max(0, solver.steps - horizon)
    # Without curvature and with a linear update, nothing on the way back depends on where it happens.
    needs_place = second_order or solver.needs_gradient or step_weights is not None
    kept: dict[int, Snapshot] = {}
    support_loss: list[Tensor] = []

    def keep(step: int, params: Tree, state: Any, grad: Tree, loss: Tensor) -> None:
        support_loss.append(loss)
        if needs_place and step >= first and (step - first) % keep_every == 0:
            kept[step] = Snapshot(params, state, grad if solver.needs_gradient else params)

    final = loop.run(solver.steps, keep)
    outer = outer_gradient(problem, final, meta, task.query)
    loss, cotangents = outer.loss, initial(loop, outer)
    if step_weights is not None:
        loss, cotangents = _weighted(loss, step_weights[-1]), _weighted(cotangents, step_weights[-1])
    place = Snapshot(final, solver.init(final), final)
    for step in reversed(range(first, solver.steps)):
        if needs_place:
            if step not in kept:
                _recompute(loop, kept, first + (step - first) // keep_every * keep_every, step)
            place = kept.pop(step)
        cotangents, grad = pull(loop, range(step, step + 1), place, cotangents)
        if second_order:
            cotangents = bend(loop, step, place.params, cotangents, grad)
        if step_weights is not None and step > 0 and step_weights[step - 1]:
            early = outer_gradient(problem, place.params, meta, task.query)
            loss = loss + _weighted(early.loss, step_weights[step - 1])
            weighted = _weighted(initial(loop, early), step_weights[step - 1])
            cotangents = cotangents._replace(
                params=add(cotangents.params, weighted.params), meta=add(cotangents.meta, weighted.meta)
            )
    products = (solver.steps - first) if second_order else 0
    diagnostics = {
        "support_loss": torch.stack(support_loss),
        "curvature_products": torch.as_tensor(float(products), device=loss.device),
    }
    return Result(meta_cotangent(problem, meta, cotangents), cotangents.learned, loss, final, outer.extra, diagnostics)


def _weighted(tree: Any, weight: float) -> Any:
    return torch.utils._pytree.tree_map(lambda value: weight * value, tree)


def _recompute(loop: InnerLoop, kept: dict[int, Snapshot], begin: int, end: int) -> None:
    """Fill in the snapshots after ``begin``, which is kept, up to ``end``."""
    params, state, grad = kept[begin]
    if not loop.solver.needs_gradient:
        grad, _ = loop.gradient(begin, params)
    for step in range(begin + 1, end + 1):
        params, state = loop.update(step - 1, params, grad, state)
        grad, _ = loop.gradient(step, params)
        kept[step] = Snapshot(params, state, grad)
