"""Going back through an inner loop without a graph: the walk that the estimators share.

For a step  params', state' = update(params, g(params, meta), state, learned, start)  and the cotangents of its results,

    (params, g, state, learned, start cotangents)  =  pull-back of update          cheap and elementwise
    params cotangent += H (g cotangent),   meta cotangent += B (g cotangent)       one curvature product

so only the parameters before each step have to be kept, never activations.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop.inner import InnerLoop, InnerSolver, bind
from innerloop.meta_gradient.base import Result
from innerloop.problem import Batch, Problem, Task, Tree


class Snapshot(NamedTuple):
    """Where the inner loop stood before a step; ``grad`` may be anything of its shape where the solver needs none."""

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


def refuse_undifferentiable(estimator: object, solver: InnerSolver) -> None:
    """Refuse solvers whose steps are no ``update`` that could be differentiated.

    Raises:
        ValueError: such a solver.
    """
    if not solver.differentiable:
        raise ValueError(
            f"{type(estimator).__name__} goes through inner steps, but {type(solver).__name__}'s have no derivative: "
            "use Implicit() or MemoryReduced(), which differentiate the solution, or SGD, Momentum or Adam"
        )


def outer_gradient(problem: Problem, params: Tree, meta: Tree, query: Batch) -> Outer:
    """Partial gradients of the outer loss in the adapted parameters and in the meta-parameters."""

    def loss(params: Tree, meta: Tree) -> tuple[Tensor, Any]:
        value = problem.outer_loss(params, meta, query)
        # torch.func takes no None beside a value
        return value if isinstance(value, tuple) else (value, ())

    (in_params, in_meta), (value, extra) = torch.func.grad_and_value(loss, argnums=(0, 1), has_aux=True)(params, meta)
    return Outer(value, in_params, in_meta, None if isinstance(extra, tuple) and not extra else extra)


def zeros(tree: Any) -> Any:
    """Zero tensors in the shape of a tree."""
    return torch.utils._pytree.tree_map(torch.zeros_like, tree)


def add(first: Any, second: Any) -> Any:
    """The sum of two trees."""
    return torch.utils._pytree.tree_map(torch.add, first, second)


def scale(tree: Any, weight: float) -> Any:
    """A tree times a number."""
    return torch.utils._pytree.tree_map(lambda value: weight * value, tree)


def initial(loop: InnerLoop, outer: Outer) -> Cotangents:
    """The cotangents after the last step: those of the outer loss itself."""
    return Cotangents(
        outer.params, zeros(loop.solver.init(loop.start)), zeros(loop.learned), zeros(loop.start), outer.meta
    )


def judge(loop: InnerLoop, query: Batch, params: Tree, weight: float) -> tuple[Tensor, Cotangents, Any]:
    """The outer loss at ``params`` times a weight, its cotangents, and what it returned beside its value."""
    outer = outer_gradient(loop.problem, params, loop.meta, query)
    return weight * outer.loss, scale(initial(loop, outer), weight), outer.extra


def outer_weights(solver: InnerSolver, step_weights: Sequence[float] | None) -> Sequence[float]:
    """The weights of the outer loss after each inner step: those given, or all on the last.

    Raises:
        ValueError: as many weights as steps are not given.
    """
    if step_weights is None:
        return [0.0] * (solver.steps - 1) + [1.0]
    if len(step_weights) != solver.steps:
        raise ValueError(
            f"step_weights holds {len(step_weights)} weights for {solver.steps} inner steps: give one a step"
        )
    return step_weights


def adapt(loop: InnerLoop, keep: Container[int]) -> tuple[Tree, dict[int, Snapshot], Tensor]:
    """Take all of the solver's steps.

    Args:
        loop: the inner loop.
        keep: before which steps to keep a snapshot.

    Returns:
        The adapted parameters, the snapshots by step, and the inner loss before each step, ``[steps]``.
    """
    kept: dict[int, Snapshot] = {}
    losses: list[Tensor] = []

    def visit(step: int, params: Tree, state: Any, grad: Tree, loss: Tensor) -> None:
        losses.append(loss)
        if step in keep:
            kept[step] = Snapshot(params, state, grad if loop.solver.needs_gradient else params)

    final = loop.run(loop.solver.steps, visit)
    return final, kept, torch.stack(losses)


def pull(loop: InnerLoop, steps: range, snapshot: Snapshot, cotangents: Cotangents) -> tuple[Cotangents, Tree]:
    """Pull cotangents back through the updates of ``steps``, all of which use the snapshot's one gradient.

    Returns:
        The cotangents before the first of them, with the gradient held constant, and the cotangent of that gradient.
    """

    def updates(params: Tree, grad: Tree, state: Any, learned: Tree, start: Tree) -> tuple[Tree, Any]:
        for step in steps:
            after = loop.solver.update(step, params, grad, state, learned, start)
            params, state = loop.hold(step, (params, state), after)
        return params, state

    back = torch.func.vjp(updates, snapshot.params, snapshot.grad, snapshot.state, loop.learned, loop.start)[1]
    params, grad, state, learned, start = back((cotangents.params, cotangents.state))
    before = Cotangents(params, state, add(cotangents.learned, learned), add(cotangents.start, start), cotangents.meta)
    return before, grad


def bend(loop: InnerLoop, step: int, params: Tree, cotangents: Cotangents, grad: Tree) -> Cotangents:
    """Carry a gradient's cotangent through the gradient itself: the curvature product of a step."""
    in_params, in_meta = loop.curvature(step, params, grad)
    return cotangents._replace(params=add(cotangents.params, in_params), meta=add(cotangents.meta, in_meta))


def meta_cotangent(problem: Problem, meta: Tree, cotangents: Cotangents) -> Tree:
    """The meta-gradient once the walk is at the start: what reached meta directly, and through ``problem.start``."""
    back = torch.func.vjp(problem.start, meta)[1]
    (through_start,) = back(add(cotangents.params, cotangents.start))
    return add(cotangents.meta, through_start)


def conclude(
    loop: InnerLoop, cotangents: Cotangents, loss: Tensor, params: Tree, extra: Any, support_loss: Tensor, products: int
) -> Result:
    """What an estimator returns, from the cotangents at the start of the inner loop."""
    diagnostics = {
        "support_loss": support_loss,
        "curvature_products": torch.as_tensor(float(products), device=loss.device),
    }
    grad = meta_cotangent(loop.problem, loop.meta, cotangents)
    return Result(grad, cotangents.learned, loss, params, extra, diagnostics)


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
    loop = bind(problem, meta, task.support, solver, learned)
    weights = outer_weights(solver, step_weights)
    first = max(0, solver.steps - horizon)
    # Without curvature and with a linear update, nothing on the way back depends on where it happens.
    needs_place = second_order or solver.needs_gradient or any(weights[:-1])
    final, kept, support_loss = adapt(loop, range(first, solver.steps, keep_every) if needs_place else ())
    loss, cotangents, extra = judge(loop, task.query, final, weights[-1])
    place = Snapshot(final, solver.init(final), final)
    for step in reversed(range(first, solver.steps)):
        if needs_place:
            if step not in kept:
                _recompute(loop, kept, first + (step - first) // keep_every * keep_every, step)
            place = kept.pop(step)
        cotangents, grad = pull(loop, range(step, step + 1), place, cotangents)
        if second_order:
            cotangents = bend(loop, step, place.params, cotangents, grad)
        if step > 0 and weights[step - 1]:
            early, more, _ = judge(loop, task.query, place.params, weights[step - 1])
            loss, cotangents = loss + early, add(cotangents, more)
    products = (solver.steps - first) if second_order else 0
    return conclude(loop, cotangents, loss, final, extra, support_loss, products)


def _recompute(loop: InnerLoop, kept: dict[int, Snapshot], begin: int, end: int) -> None:
    """Fill in the snapshots after ``begin``, which is kept, up to ``end``."""
    params, state, grad = kept[begin]
    if not loop.solver.needs_gradient:
        grad, _ = loop.gradient(begin, params)
    for step in range(begin + 1, end + 1):
        params, state = loop.update(step - 1, params, grad, state)
        grad, _ = loop.gradient(step, params)
        kept[step] = Snapshot(params, state, grad)
