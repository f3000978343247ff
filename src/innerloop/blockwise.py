"""Derivatives of a loss that is a chain of stages, one stage's graph at a time: deep models at a block's memory.

Stage i maps ``h_i`` to ``h_{i+1}`` and reads parameters ``p_i`` and meta-parameters ``m_i``. A product goes up and
down:

    up      t_{i+1}  =  d h_{i+1} / d (p_i, h_i)  (w_i, t_i)                            what the direction moves
    down    s_i      =  <c_{i+1}, t_{i+1}> + <a_{i+1}, h_{i+1}>,    c_i = d <c_{i+1}, h_{i+1}> / d h_i
            a_i, (H w)_i, (B w)_i  =  d s_i / d h_i, d p_i, d m_i                        with c_{i+1} held fixed

from ``c = 1`` and ``a = 0`` behind the loss. Only ``h`` and ``t`` between the stages are kept. All derivatives are
reverse-mode ones (t_{i+1} is the derivative of a pull-back in its cotangent), so that every layer with a second
derivative will do, the numbers are those of plain autograd, and nothing rests on the forward-mode rules of torch.

Gradients are taken the same way down, each stage computed again: checkpointing, which torch's own cannot do here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.curvature import (
    OUTER,
    gradient,
    in_transform,
    judged,
    linearised,
    nothing,
    parted,
    random_states,
    replayed,
)
from innerloop.problem import Batch, Chain, Engine, Problem, Stage, Tree
from innerloop.trees import map_tensors, tree_leaves

Cotangents = list[Tensor | None]


@dataclass(frozen=True)
class Blockwise(Engine):
    """Products and gradients block by block; under a transform of ``torch.func`` they are plain autograd's."""

    def check(self, problem: Problem) -> None:
        if problem.inner_chain is None:
            raise ValueError(
                "products='blocks' needs to know the model's parts: use an nn.Sequential, or give the model a list of "
                "modules, blocks, that one after the other are its forward pass, hold all its parameters and change no "
                "input in place; of an il.Bilevel, give Problem(inner_chain=...); or use products='autograd'"
            )

    def gradient(self, problem: Problem, params: Tree, meta: Tree, support: Batch, step: int) -> tuple[Tree, Tensor]:
        if in_transform():
            return gradient(replace(problem, engine=None), params, meta, support, step)
        with replayed(problem.seed, step, params):
            run = _checked(problem, _Run(problem.inner_chain, params, meta, support, mixed=False), support)
            run.up()
            (grad, _), loss = run.down()
        return grad, loss

    def judge(self, problem: Problem, params: Tree, meta: Tree, query: Batch) -> tuple[Tensor, Any, Tree, Tree]:
        if in_transform() or problem.outer_chain is None:
            return judged(replace(problem, engine=None), params, meta, query)
        with replayed(problem.seed, OUTER, params):
            run = _Run(problem.outer_chain, params, meta, query, mixed=True)
            run.up()
            (in_params, in_meta), value = run.down()
        loss, extra = parted(value)
        return loss, extra, in_params, in_meta

    def products(
        self, problem: Problem, params: Tree, meta: Tree, support: Batch, step: int, *, mixed: bool, keep: bool
    ) -> Callable[[Tree], tuple[Tree, Tree]]:
        if in_transform():
            return linearised(replace(problem, engine=None), params, meta, support, step, mixed=mixed, keep=keep)

        def product(direction: Tree) -> tuple[Tree, Tree]:
            with replayed(problem.seed, step, params):
                run = _checked(problem, _Run(problem.inner_chain, params, meta, support, mixed), support)
                run.up(direction)
                (in_params, in_meta), _ = run.down(direction)
            return in_params, in_meta if mixed else {}

        return product


@dataclass
class _Mark:
    """What is kept before a stage: the value that enters it, how the direction moves that, and the random draws."""

    value: Any
    tangents: Cotangents
    states: list[tuple[torch.Generator, Tensor]]


class _Opened:
    """A stage under autograd: leaves for all that it reads, and what it gives."""

    def __init__(self, stage: Stage, params: Tree, meta: Tree, mark: _Mark, mixed: bool, live: list[bool]) -> None:
        self.params = {name: value.detach().requires_grad_() for name, value in _named(stage, params).items()}
        self.meta = {name: value.detach().requires_grad_(mixed) for name, value in _named(stage, meta).items()}
        flat, shape = pytree.tree_flatten(mark.value)
        places = [place for place, value in enumerate(flat) if _continuous(value)]
        self.entering = [flat[place].detach().requires_grad_(each) for place, each in zip(places, live, strict=True)]
        for place, value in zip(places, self.entering, strict=True):
            flat[place] = value
        _draw_from(mark.states)
        with torch.enable_grad():
            self.value = stage.run(self.params, self.meta, pytree.tree_unflatten(flat, shape))
        self.leaving = [value for value in tree_leaves(self.value) if _continuous(value)]


class _Run:
    """One way up and down the stages.

    Args:
        chain: the loss.
        params: where to differentiate.
        meta: the meta-parameters.
        batch: what the loss reads.
        mixed: differentiate in those too.
    """

    def __init__(self, chain: Chain | None, params: Tree, meta: Tree, batch: Batch, mixed: bool) -> None:
        assert chain is not None
        self.stages: Sequence[Stage] = chain(meta, batch)
        self.params, self.meta, self.mixed = params, meta, mixed
        self.marks: list[_Mark] = []
        moving = [any(name in params for name in stage.reads) for stage in self.stages]
        read = [mixed and any(name in meta for name in stage.reads) for stage in self.stages]
        # whether anything is differentiated below a stage: parameters, and anything at all
        self.moving = [any(moving[:place]) for place in range(len(self.stages) + 1)]
        self.live = [any(moving[:place]) or any(read[:place]) for place in range(len(self.stages) + 1)]

    def up(self, direction: Tree | None = None) -> None:
        """Leave a mark before every stage; the last one is run on the way down."""
        value: Any = None
        tangents: Cotangents = []
        for place, stage in enumerate(self.stages):
            mark = _Mark(value, tangents, random_states(self.params))
            self.marks.append(mark)
            if place == len(self.stages) - 1:
                break
            if direction is not None and self.moving[place + 1]:
                value, tangents = self._moved(stage, mark, direction)
                continue
            own, given = _named(stage, self.params), _named(stage, self.meta)
            with torch.no_grad():
                value = map_tensors(Tensor.detach, stage.run(own, given, value))
            tangents = [None] * len([leaf for leaf in tree_leaves(value) if _continuous(leaf)])

    def _moved(self, stage: Stage, mark: _Mark, direction: Tree) -> tuple[Any, Cotangents]:
        """What a stage gives, and how the direction moves that: the derivative of the pull-back in its cotangent."""
        opened = _Opened(stage, self.params, self.meta, mark, False, [move is not None for move in mark.tangents])
        value = map_tensors(Tensor.detach, opened.value)
        with torch.enable_grad():
            dummies = [torch.zeros_like(out).requires_grad_() if out.requires_grad else None for out in opened.leaving]
            inputs = [*opened.params.values(), *opened.entering]
            pulled = _pull(opened.leaving, inputs, dummies, graph=True)
        moves = [*(direction[name] for name in opened.params), *mark.tangents]
        del opened
        return value, _pull(pulled, dummies, moves)

    def down(self, direction: Tree | None = None) -> tuple[tuple[Tree, Tree], Any]:
        """Gradients in both trees, with a direction those of the gradient's product with it; and what came last."""
        found: tuple[Tree, Tree] = ({}, {})
        first: Cotangents = []  # cotangents of what leaves a stage: of the loss,
        second: Cotangents = []  # and of the product
        last: Any = None
        after: list[tuple[torch.Generator, Tensor]] = []
        for place in reversed(range(len(self.stages))):
            mark = self.marks.pop()
            if place + 1 < len(self.stages) and not self.live[place + 1]:
                break
            live = [self.live[place]] * len(mark.tangents)
            opened = _Opened(self.stages[place], self.params, self.meta, mark, self.mixed, live)
            if place + 1 == len(self.stages):
                last = map_tensors(Tensor.detach, opened.value)
                first = [torch.ones_like(opened.leaving[0]), *[None] * (len(opened.leaving) - 1)]
                second = [None] * len(first)
                after = random_states(self.params)
            out, opened.leaving, opened.value = opened.leaving, [], None
            if direction is None:
                inputs = [*opened.params.values(), *opened.meta.values(), *opened.entering]
                grads = _pull(out, inputs, first)
            else:
                grads, first = self._bent(opened, out, first, second, direction, mark, self.moving[place])
            del out
            for tree, leaves in zip(found, (opened.params, opened.meta), strict=True):
                for name in leaves:
                    if (grad := grads.pop(0)) is not None:
                        tree[name] = tree[name] + grad if name in tree else grad
            if direction is None:
                first = grads
            else:
                second = grads
            del opened
        _draw_from(after)
        return (_filled(found[0], self.params), _filled(found[1], self.meta if self.mixed else {})), last

    def _bent(
        self,
        opened: _Opened,
        out: list[Tensor],
        first: Cotangents,
        second: Cotangents,
        direction: Tree,
        mark: _Mark,
        below: bool,
    ) -> tuple[Cotangents, Cotangents]:
        """The second derivatives of a stage, and the cotangents of what enters it."""
        entering = opened.entering if below else []
        with torch.enable_grad():
            pulled = _pull(out, [*opened.params.values(), *entering], first, graph=True)
        moves = [*(direction[name] for name in opened.params), *(mark.tangents if entering else ())]
        inputs = [*opened.params.values(), *opened.meta.values(), *opened.entering]
        grads = _pull([*out, *pulled], inputs, [*second, *moves])
        through = pulled[len(opened.params) :] if below else [None] * len(opened.entering)
        return grads, [None if each is None else each.detach() for each in through]


def _pull(
    outs: Sequence[Tensor | None], inputs: Sequence[Tensor | None], given: Sequence[Tensor | None], graph: bool = False
) -> Cotangents:
    """``torch.autograd.grad`` that takes and gives None for zero, wherever nothing is reached."""
    pairs = [
        (out, each)
        for out, each in zip(outs, given, strict=True)
        if out is not None and each is not None and out.requires_grad
    ]
    wanted = [leaf for leaf in inputs if leaf is not None and leaf.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    ends, cotangents = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(ends, wanted, cotangents, create_graph=graph, allow_unused=True))
    return [next(grads) if leaf is not None and leaf.requires_grad else None for leaf in inputs]


def _named(stage: Stage, tree: Tree) -> Tree:
    return {name: tree[name] for name in stage.reads if name in tree}


def _filled(found: Tree, like: Tree) -> Tree:
    """A tree like another, with zeros, which take no memory, for what was not reached."""
    return {name: found[name] if name in found else nothing(value) for name, value in like.items()}


def _continuous(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _draw_from(states: list[tuple[torch.Generator, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


def _checked(problem: Problem, run: _Run, support: Batch) -> _Run:
    """See once that the stages give the inner loss."""
    if not problem.known.chained:
        with torch.no_grad():
            states = random_states(run.params)
            loss = problem.inner_loss(run.params, run.meta, support)
            _draw_from(states)
            value: Any = None
            for stage in run.stages:
                value = stage.run(run.params, run.meta, value)
            _draw_from(states)
        if not torch.allclose(loss, value, rtol=1e-3, equal_nan=True):
            raise ValueError(
                f"inner_chain gives a loss of {float(value):.6g} where inner_loss gives {float(loss):.6g}: make both "
                "the same function, or use products='autograd'"
            )
        problem.known.chained = True
    return run
