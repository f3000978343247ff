"""Going back through an inner loop without a graph: the walk that the estimators share.

For a step  params', state' = update(params, g(params, meta), state, learned, start)  and the cotangents of its results,

    (params, g, state, learned, start cotangents)  =  pull-back of update          cheap and elementwise
    params cotangent += H (g cotangent),   meta cotangent += B (g cotangent)       one curvature product

so only the parameters before each step have to be kept, never activations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop.curvature import is_expanded, judged, nothing, pullback, started
from innerloop.inner import InnerLoop
from innerloop.meta_gradient._base import Result
from innerloop.problem import Batch, End, Problem, Steps, Tree
from innerloop.trees import map_tensors, tree_map


class Snapshot(NamedTuple):
    """Where the inner loop stood before a step; ``grad`` is None where it has to be taken again."""

    params: Tree
    state: Any
    grad: Tree | None


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
    value, extra, in_params, in_meta = judged(problem, params, meta, query)
    return Outer(value, in_params, in_meta, extra)


def zeros(tree: Any) -> Any:
    """Zero tensors in the shape of a tree, which take no memory."""
    return tree_map(nothing, tree)


def add(first: Any, second: Any) -> Any:
    """The sum of two trees."""
    return tree_map(partial(_each, torch.add), first, second)


def scale(tree: Any, weight: float) -> Any:
    """A tree times a number."""
    return tree if weight == 1.0 else tree_map(partial(_each, partial(operator.mul, weight)), tree)


def _each(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """An elementwise function, of one element where all are one number expanded."""
    if not all(map(is_expanded, values)):
        return function(*values)
    return function(*(value[(0,) * value.ndim] for value in values)).expand_as(values[0])


def judge(loop: InnerLoop, query: Batch, step: int, params: Tree, weight: float) -> tuple[Tensor, Cotangents, Any]:
    """The outer loss after a step times a weight, its cotangents, and what it returned beside its value.

    Args:
        loop: the inner loop.
        query: what the outer loss reads; of `Steps`, the row of the step.
        step: the task's own step, one of ``loop.steps``.
        params: the parameters after it.
        weight: what loss and cotangents are multiplied by.
    """
    outer = outer_gradient(loop.problem, params, loop.meta, loop.judged(query, step))
    state = loop.solver.init(loop.begin.params)
    cotangents = Cotangents(outer.params, zeros(state), zeros(loop.learned), zeros(loop.start), outer.meta)
    return weight * outer.loss, scale(cotangents, weight), outer.extra


def outer_weights(loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None) -> Sequence[float]:
    """The weights of the outer loss after each inner step: those given, or all on the last.

    Raises:
        ValueError: as many weights as steps are not given, or fewer batches than steps.
    """
    steps = loop.solver.steps
    for part, batch in (("support", loop.support), ("query", query)):
        if isinstance(batch, Steps):
            batch.check(part, steps, exact=True)
    if step_weights is None:
        return [0.0] * (steps - 1) + [1.0]
    if len(step_weights) != steps:
        raise ValueError(f"step_weights holds {len(step_weights)} weights for {steps} inner steps: give one a step")
    return step_weights


@dataclass
class Trail:
    """The way back: snapshots of the inner loop, given out from the last step to the first.

    With a limit on how many are held at once, those missing are computed again, by recursive binomial checkpointing
    (Griewank and Walther 2000, "revolve", ACM TOMS 26): c copies at most t runs of every step reach back
    over C(c - 1 + t, t) steps.

    Attributes:
        loop: the inner loop.
        keep: the steps to give out.
        copies: how many snapshots may be held, 2 or more, the moving one among them; None holds them all.
        offload: hold them in the CPU's memory.
    """

    loop: InnerLoop
    keep: range
    copies: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        """Plan what the first pass keeps."""
        self._kept: dict[int, Snapshot] = {}
        self._planned: set[int] = set(self.keep)
        if self.copies is not None and self.keep:
            first, last = self.keep.start, self.keep.stop
            self._planned = {first, last - 1}
            for slots in range(self.copies - 2, 0, -1):
                if last - first > 1:
                    first += _split(last - first, slots + 1)
                    self._planned.add(first)

    def adapt(self) -> tuple[End, Tensor]:
        """Take all of the solver's steps; returns where they end, and the inner loss before each, ``[steps]``."""
        losses: list[Tensor] = []

        def visit(step: int, params: Tree, state: Any, grad: Tree, loss: Tensor) -> None:
            losses.append(loss)
            if step in self._planned:
                self._kept[step] = self._stored(Snapshot(params, state, grad))

        end = self.loop.run(self.loop.solver.steps, visit)
        return end, torch.stack(losses) if losses else next(iter(end.params.values())).new_zeros(0)

    def back(self) -> Iterator[tuple[int, Snapshot]]:
        """Every step that was to be kept, from the last on, and the snapshot before it."""
        if self.copies is None:
            for step in reversed(self.keep):
                yield step, self._ready(step, self._kept.pop(step))
        elif self.keep:
            yield from self._between(self.keep.start, self._kept.pop(self.keep.start), self.keep.stop, self.copies - 2)

    def _between(self, first: int, stored: Snapshot, last: int, slots: int) -> Iterator[tuple[int, Snapshot]]:
        """Steps ``last - 1`` down to ``first``, with room for so many more copies."""
        while last - first > 1:
            if slots:
                middle = first + _split(last - first, slots + 1)
                there = self._kept.pop(middle, None) or self._stored(self._advanced(stored, first, middle))
                yield from self._between(middle, there, last, slots - 1)
                del there
                last = middle
            else:
                last -= 1
                # the first pass has left the last one
                kept = last in self._kept
                yield last, self._ready(last, self._kept.pop(last) if kept else self._advanced(stored, first, last))
        yield first, self._ready(first, stored)

    def _advanced(self, stored: Snapshot, first: int, step: int) -> Snapshot:
        """The snapshot before ``step``, from the one before ``first``."""
        params, state, _ = self._on_device(stored)
        for at in range(first, step):
            grad, _ = self.loop.gradient(at, params)
            params, state = self.loop.update(at, params, grad, state)
        return Snapshot(params, state, None)

    def _ready(self, step: int, snapshot: Snapshot) -> Snapshot:
        """With the gradient that the update is differentiated at; anything of its shape where that is linear."""
        snapshot = self._on_device(snapshot)
        if not self.loop.solver.needs_gradient:
            return snapshot._replace(grad=snapshot.params)
        return snapshot if snapshot.grad else snapshot._replace(grad=self.loop.gradient(step, snapshot.params)[0])

    def _stored(self, snapshot: Snapshot) -> Snapshot:
        # of few copies each is parameters and state alone
        if self.copies is not None or not self.loop.solver.needs_gradient:
            snapshot = snapshot._replace(grad=None)
        return self._moved(snapshot, torch.device("cpu")) if self.offload else snapshot

    def _on_device(self, snapshot: Snapshot) -> Snapshot:
        if not self.offload:
            return snapshot
        return self._moved(snapshot, next(iter(self.loop.begin.params.values())).device)

    def _moved(self, snapshot: Snapshot, device: torch.device) -> Snapshot:
        return map_tensors(lambda value: value.to(device), snapshot)


def _split(length: int, copies: int) -> int:
    """After how many of ``length`` steps the next of ``copies`` snapshots goes, the one at the beginning among them."""
    runs = 0
    while math.comb(copies + runs, copies) < length:
        runs += 1
    right = math.comb(copies - 1 + runs, copies - 1)
    return max(1, length - right, math.comb(copies + runs - 2, copies) if runs > 1 else 1)


def pull(loop: InnerLoop, steps: range, snapshot: Snapshot, cotangents: Cotangents) -> tuple[Cotangents, Tree]:
    """Pull cotangents back through the updates of ``steps``, all of which use the snapshot's one gradient.

    Args:
        loop: the inner loop.
        steps: the steps, in order.
        snapshot: parameters, state and gradient before the first of them. Where the solver's update is linear
            (``loop.solver.needs_gradient`` is False), any tree like the parameters will do for the gradient.
        cotangents: those after the last of them.

    Returns:
        The cotangents before the first of them, with the gradient held constant, and the cotangent of that gradient.
    """
    if len(steps) == 1 and not loop.solver.moves and (closed := loop.solver.pull_back(steps.start, cotangents.params)):
        params, grad, start = closed
        centre = add(cotangents.start, start) if start else cotangents.start
        return cotangents._replace(params=params, start=centre), grad

    def updates(params: Tree, grad: Tree, state: Any, learned: Tree, start: Tree) -> tuple[Tree, Any]:
        for step in steps:
            after = loop.solver.update(step, params, grad, state, learned, start)
            params, state = loop.hold(step, (params, state), after)
        return params, state

    assert snapshot.grad is not None
    back = pullback(updates, snapshot.params, snapshot.grad, snapshot.state, loop.learned, loop.start)[1]
    params, grad, state, learned, start = back((cotangents.params, cotangents.state))
    before = Cotangents(params, state, add(cotangents.learned, learned), add(cotangents.start, start), cotangents.meta)
    # what stands still has a gradient of zero, whoever reads it
    return before, {name: g if loop.moves(name, steps.start) else nothing(g) for name, g in grad.items()}


def bend(loop: InnerLoop, step: int, params: Tree, cotangents: Cotangents, grad: Tree) -> Cotangents:
    """Carry a gradient's cotangent through the gradient itself: the curvature product of a step.

    Args:
        loop: the inner loop.
        step: whose batch and random draws the inner loss has.
        params: where the gradient was taken.
        cotangents: what the product is added to.
        grad: the gradient's cotangent, as ``pull`` gave it.
    """
    in_params, in_meta = loop.curvature(step, params, grad)
    return cotangents._replace(params=add(cotangents.params, in_params), meta=add(cotangents.meta, in_meta))


def through_start(loop: InnerLoop, cotangent: Tree, *state: Any) -> Tree:
    """What reaches meta through the problem's start, from the cotangent of that and, if given, of the first state."""

    def begun(meta: Tree) -> tuple[Any, ...]:
        start = started(loop.problem, meta, loop.support)
        return (start, loop.solver.init(start)) if state else (start,)

    grad: Tree = pullback(begun, loop.meta)[1]((cotangent, *state))[0]
    return grad


def conclude(
    loop: InnerLoop,
    cotangents: Cotangents,
    loss: Tensor,
    end: End,
    extra: Any,
    support_loss: Tensor,
    products: int,
    learn_start: bool = True,
) -> Result:
    """What an estimator returns, from the cotangents where the inner loop began.

    Args:
        loop: the inner loop.
        cotangents: before its first step.
        loss: the outer loss.
        end: where the task was left.
        extra: what the outer loss returned beside its value.
        support_loss: the inner loss before each step, ``[steps]``.
        products: how many curvature products were taken.
        learn_start: whether meta is reached through the start.
    """
    diagnostics = {
        "support_loss": support_loss,
        "curvature_products": torch.as_tensor(float(products), device=loss.device),
    }
    grad = cotangents.meta
    if learn_start and not loop.resumed:
        grad = add(grad, through_start(loop, add(cotangents.params, cotangents.start), cotangents.state))
    elif learn_start and loop.solver.proximal:  # a task that is taken up is still pulled towards the start
        grad = add(grad, through_start(loop, cotangents.start))
    return Result(grad, cotangents.learned, loss, extra, diagnostics, end)


def walk(
    loop: InnerLoop,
    query: Batch,
    step_weights: Sequence[float] | None = None,
    *,
    horizon: int,
    learn_start: bool = True,
    copies: int | None = None,
    offload: bool = False,
) -> Result:
    """Adapt, then differentiate, with the curvature of the last ``horizon`` steps.

    Args:
        loop: the inner loop.
        query: what the outer loss reads.
        step_weights: as in ``MetaGradient.estimate``.
        horizon: how many of the last steps have a curvature product; the inner gradients of all others count as
            constant.
        learn_start: whether meta is reached through the start.
        copies: hold at most so many snapshots; None holds one a step.
        offload: hold them in the CPU's memory.
    """
    solver, weights = loop.solver, outer_weights(loop, query, step_weights)
    last = loop.steps.stop - 1
    bends = range(max(loop.steps.start, loop.steps.stop - horizon), loop.steps.stop)
    # Without curvature and with a linear update, nothing on the way back depends on where it happens.
    everywhere = solver.needs_gradient or any(weights[:-1])
    trail = Trail(loop, loop.steps if everywhere else bends, copies, offload)
    end, support_loss = trail.adapt()
    loss, cotangents, extra = judge(loop, query, last, end.params, weights[-1])
    anywhere = Snapshot(end.params, end.state, end.params)
    back = trail.back()
    for step in reversed(loop.steps):
        place = next(back)[1] if everywhere or step in bends else anywhere
        cotangents, grad = pull(loop, range(step, step + 1), place, cotangents)
        if step in bends:
            cotangents = bend(loop, step, place.params, cotangents, grad)
        if step > loop.steps.start and (weight := weights[step - 1 - loop.steps.start]):
            early, more, _ = judge(loop, query, step - 1, place.params, weight)
            loss, cotangents = loss + early, add(cotangents, more)
        del place  # before the next one is made
    return conclude(loop, cotangents, loss, end, extra, support_loss, len(bends), learn_start)
