"""The inner loop of one task: the solver bound to a problem, a support set and the current meta-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.curvature import (
    ROWS,
    curvature,
    fresh_seed,
    gradient,
    in_transform,
    linearised,
    replayed,
    seed_of,
    started,
)
from innerloop.inner._base import InnerSolver, Probe, State
from innerloop.problem import Batch, End, Problem, Steps, Tree, refuse_other
from innerloop.trees import tree_leaves, tree_map


@dataclass(frozen=True)
class InnerLoop:
    """Everything that stays fixed while a task is adapted to; no method records a graph.

    Steps are the task's own: they go on from ``begin.step``, and the loop's own first step is that one.

    Attributes:
        start: the centre of the proximal term; where the loop begins too, unless the task is taken up.
        begin: where the loop begins.
        rows: for minibatches, which support examples each step sees, ``[steps, minibatch]``.
        resumed: whether the task is taken up where it was left.
        record: keep the graphs of gradients, so that autograd can go back through them.
        keep_graphs: whether there is memory for the graphs of all steps; the estimator decides what for.
        seed: of what the estimator itself draws; the losses draw from ``problem.seed``.
    """

    problem: Problem
    meta: Tree
    support: Batch
    solver: InnerSolver
    learned: Tree
    start: Tree
    begin: End
    rows: Tensor | None = None
    resumed: bool = False
    record: bool = False
    keep_graphs: bool = False
    seed: int = 0

    @property
    def steps(self) -> range:
        """The steps of meta-training."""
        return range(self.begin.step, self.begin.step + self.solver.steps)

    def batch(self, step: int) -> Batch:
        """What the inner loss reads in a step."""
        place = step - self.begin.step
        if isinstance(self.support, Steps):
            return self.support.row(place, step)
        if self.rows is None or place >= len(self.rows):  # beyond the last step lies the solution, of all examples
            return self.support
        return tree_map(lambda value, rows=self.rows[place]: value[rows], self.support)

    def judged(self, query: Batch, step: int) -> Batch:
        """What the outer loss reads after a step."""
        return query.row(step - self.begin.step, step) if isinstance(query, Steps) else query

    def gradient(self, step: int, params: Tree) -> tuple[Tree, Tensor]:
        """Gradient of the inner loss and the loss, with the random draws of ``step``; 0 for what stands still in it."""
        moving = {name: value for name, value in params.items() if self.moves(name, step)}
        problem, batch = self.problem, self.batch(step)
        if len(moving) < len(params):
            problem = problem.holding(params)
        grad, loss = gradient(problem, moving, self.meta, batch, step, self.record)
        return {name: grad[name] if name in grad else torch.zeros_like(p) for name, p in params.items()}, loss

    def curvature(self, step: int, params: Tree, direction: Tree) -> tuple[Tree, Tree]:
        """``(H w, B w)`` with the batch and the random draws of ``step``."""
        return curvature(self.problem, params, self.meta, self.batch(step), direction, step)

    def products(self, step: int, params: Tree) -> Callable[[Tree], tuple[Tree, Tree]]:
        """``w -> (H w, B w)``, for several products at one point."""
        return linearised(self.problem, params, self.meta, self.batch(step), step)

    def parts(self, step: int, params: Tree) -> tuple[Callable[[Tree], Tree], Callable[[Tree], Tree]]:
        """``w -> H w`` for many products, and ``w -> B w`` for one; by autograd one graph serves both."""
        if self.problem.engine is not None or in_transform():
            return self.hessian(step, params), lambda direction: self.curvature(step, params, direction)[1]
        product = linearised(self.problem, params, self.meta, self.batch(step), step)
        return lambda direction: product(direction, only=0)[0], lambda direction: product(direction, only=1)[1]

    def hessian(self, step: int, params: Tree) -> Callable[[Tree], Tree]:
        """``w -> H w`` alone, which spares the way back to the meta-parameters."""
        product = linearised(self.problem, params, self.meta, self.batch(step), step, mixed=False)
        return lambda direction: product(direction)[0]

    def value(self, step: int, params: Tree) -> Tensor:
        """The inner loss, with the batch and the random draws of ``step``."""
        with replayed(self.problem.seed, step, params):
            return self.problem.inner_loss(params, self.meta, self.batch(step))

    def update(self, step: int, params: Tree, grad: Tree, state: State) -> tuple[Tree, State]:
        """One update of the solver."""
        probe = Probe(partial(self.value, step), partial(self.hessian, step))
        after = self.solver.advance(step, params, grad, state, self.learned, self.start, probe)
        return self.hold(step, (params, state), after)

    def hold(self, step: int, before: tuple[Tree, State], after: tuple[Tree, State]) -> tuple[Tree, State]:
        """Parameters and state after ``step``, in which what does not move is as before."""
        if not self.solver.moves:
            return after

        def by_name(tree: Any) -> bool:
            return isinstance(tree, dict) and tree.keys() == self.begin.params.keys()

        def merge(new: Any, old: Any) -> Any:
            if not by_name(new):
                return new
            return {name: value if self.moves(name, step) else old[name] for name, value in new.items()}

        held: tuple[Tree, State] = pytree.tree_map(merge, after, before, is_leaf=by_name)
        return held

    def run(self, steps: int, visit: Callable[[int, Tree, State, Tree, Tensor], None] | None = None) -> End:
        """Take ``steps`` steps.

        Args:
            steps: how many.
            visit: called before every update with (step, parameters, state, gradient, loss).
        """
        if isinstance(self.support, Steps):
            self.support.check("support", steps)
        params, state, first, _ = self.begin
        for step in range(first, first + steps):
            grad, loss = self.gradient(step, params)
            if visit is not None:
                visit(step, params, state, grad, loss)
            params, state = self.update(step, params, grad, state)
        return End(params, state, first + steps)

    def moves(self, name: str, step: int) -> bool:
        """Whether a parameter moves in a step."""
        rows = self.solver.moves
        return not rows or name in rows[min(step, len(rows) - 1)]


def bind(
    problem: Problem,
    meta: Tree,
    support: Batch,
    solver: InnerSolver,
    learned: Tree,
    begin: End | None = None,
    rows: Tensor | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> InnerLoop:
    """The inner loop of a task.

    Args:
        problem: the bilevel problem; without a seed of its own it gets a fresh one.
        meta: the meta-parameters.
        support: what the inner loss reads.
        solver: the inner solver.
        learned: its own meta-parameters.
        begin: where the task was left; None begins at the problem's start.
        rows: which examples each step sees; None draws them where the solver takes minibatches.
        steps: how many will be taken; None takes those of meta-training.
        seed: of minibatches, of what the estimator draws, and of the losses where the problem has none; None takes the
            problem's.

    Raises:
        ValueError: ``begin`` is of other parameters or of another solver, ``moves`` names none of the parameters, or
            minibatches are asked of a stream.
    """
    if seed is None:
        seed = fresh_seed() if problem.seed is None else problem.seed
    if problem.seed is None:
        problem = replace(problem, seed=seed)
    if begin is None:
        start = started(problem, meta, support)
        refuse_other(start, "start(meta)")
        at = End(start, solver.init(start), 0)
    else:
        # Without a proximal term nothing reads the start.
        start = started(problem, meta, support) if solver.proximal else begin.params
        at = _checked_begin(solver, start, begin)
    solver.check_names(at.params)
    if solver.minibatch is not None and rows is None:
        rows = minibatches(solver, support, [seed], steps or solver.steps, at.step)[0]
    return InnerLoop(problem, meta, support, solver, learned, start, at, rows, begin is not None, seed=seed)


def minibatches(solver: InnerSolver, support: Batch, seeds: list[int], steps: int, first: int = 0) -> Tensor:
    """Which support examples each step of each task sees, ``[tasks, steps, minibatch]``, on the CPU.

    Examples come in random order, all of them before any comes again (Reptile's authors' sampling, arXiv 1803.02999).
    A support set of no more examples than a minibatch is seen whole and in order in each step, as it is without.

    Args:
        solver: the inner solver.
        support: of one task.
        seeds: one a task.
        steps: how many.
        first: the first step's number, which changes the draw.

    Raises:
        ValueError: the support set is a stream, or holds more than examples.
    """
    if isinstance(support, Steps):
        raise ValueError("minibatch= draws from one support set, and Steps is a batch for every step: leave one out")
    sizes = sorted({len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else 0 for leaf in tree_leaves(support)})
    if len(sizes) != 1 or sizes == [0]:
        raise ValueError(
            "minibatch= draws examples, and needs them in the first dimension of every tensor of the support set, but "
            f"those have {sizes}: let the losses read all else from outside, or give batches by Steps and no minibatch="
        )
    (examples,) = sizes
    size = min(solver.minibatch or 0, examples)
    if size == examples:
        return torch.arange(examples).expand(len(seeds), steps, examples)
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_of(seed, ROWS + first))
        rounds = [torch.randperm(examples, generator=generator) for _ in range(1 + steps * size // examples)]
        drawn.append(torch.cat(rounds)[: steps * size].view(steps, size))
    return torch.stack(drawn)


def _checked_begin(solver: InnerSolver, start: Tree, begin: End) -> End:
    """Where a task was left, its solver's state in the solver's own classes: files keep a NamedTuple as a tuple."""
    if begin.params.keys() != start.keys():
        raise ValueError(f"begin holds {', '.join(begin.params)}, but the inner problem has {', '.join(start)}")
    shapes = {name: (tuple(begin.params[name].shape), tuple(value.shape)) for name, value in start.items()}
    if odd := [f"{name}: {was} for {now}" for name, (was, now) in shapes.items() if was != now]:
        raise ValueError(f"begin holds parameters of other shapes than the inner problem: {', '.join(odd)}")
    own = solver.init(begin.params)
    if pytree.tree_structure(_plain(own)) != pytree.tree_structure(_plain(begin.state)):
        raise ValueError(f"begin was left by another solver than {type(solver).__name__}: go on with the same one")
    return begin._replace(state=pytree.tree_unflatten(pytree.tree_leaves(begin.state), pytree.tree_structure(own)))


def _plain(tree: Any) -> Any:
    """A tree of plain containers."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return (
        type(tree)(map(_plain, tree))
        if type(tree) is list
        else tuple(map(_plain, tree))
        if isinstance(tree, tuple)
        else tree
    )
