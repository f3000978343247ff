"""The bilevel statement that every method of the library differentiates, and nothing else.

minimise over meta   mean over tasks i of  outer_loss(params_i, meta, query_i)
where params_i is what an inner solver makes of  inner_loss(params, meta, support_i),  started at start(meta)

What the inner solver lowers is ``inner_loss`` and the two terms that it names itself, weight decay and proximal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cached_property, wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.trees import map_tensors, tensors

Tree = dict[str, Tensor]
"""Parameters by name. Estimators and solvers map trees to trees and never look at the names."""

Batch = Any
"""What a loss reads besides parameters; for few-shot learning a pair (inputs, targets)."""


def short_repr(choice: Any) -> str:
    """A dataclass as it would be typed: what differs from the defaults."""
    shown = []
    for each in fields(choice) if is_dataclass(choice) else ():
        value = getattr(choice, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if value != default:
            if isinstance(value, tuple) and all(isinstance(part, frozenset) for part in value):
                value = list(map(sorted, value))  # the order of a set is another in every process
            shown.append(f"{each.name}={value!r}")
    return f"{type(choice).__name__}({', '.join(shown)})"


def refuse_kinds(choice: type) -> None:
    """Let a dataclass's own check refuse values of a kind that it does not expect, None say, by ValueError too."""
    check = vars(choice).get("__post_init__")
    if check is None:
        return

    @wraps(check)
    def checked(self: Any) -> None:
        try:
            check(self)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{short_repr(self)}: a value is of a kind that it cannot take; see its docstring"
            ) from error

    choice.__post_init__ = checked  # type: ignore[attr-defined]


def refuse_other(tree: Any, what: str) -> None:
    """Refuse what is no flat dict of floating tensors.

    Raises:
        ValueError: so, by name.
    """
    leaves = tree if isinstance(tree, Mapping) else {type(tree).__name__: None}
    if odd := [name for name, leaf in leaves.items() if not (isinstance(leaf, Tensor) and leaf.is_floating_point())]:
        raise ValueError(
            f"{what}: {', '.join(map(repr, odd))} is no floating tensor: give a flat dict of floating tensors by "
            "names of your own, and let the losses read all else from outside"
        )


class Task(NamedTuple):
    """One task, or a batch of them: then every tensor has a leading task dimension.

    Attributes:
        support: what the inner loop learns from; for few-shot learning inputs ``[ways * shots, ...]`` and targets
            ``[ways * shots]`` (integers below ``ways``, or values to regress), each any tree of tensors.
        query: the same for the examples that judge the adapted parameters.

    Either may be `Steps`, a batch of its own for every inner step.
    """

    support: Any
    query: Any

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """Move every tensor to ``device`` and the floating ones to ``dtype``."""

        def move(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            if tensor.is_inference():  # autograd keeps no tensor that was made in inference mode
                tensor = tensor.clone()
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=True)

        def moved(part: Any) -> Any:
            if isinstance(part, Steps) and callable(part.rows):
                return Steps(lambda step: pytree.tree_map(move, part.rows(step)))
            return pytree.tree_map(move, part)

        with torch.inference_mode(False):
            return Task(*map(moved, self))


class Steps:
    """A batch for every inner step, in place of one for all: ``il.Task(support=il.Steps(batches), query=held_out)``.

    As support, step k reads row k. As query, row k judges the parameters after step k, as ``step_weights`` says;
    without them the last row judges the last.

    Args:
        rows: a tree of tensors whose leading dimension is the inner step (behind the task's, in a batch of tasks); or a
            function ``step -> batch``, for streams that do not fit in memory. Rows are counted from 0 in every call.
            The function is given the task's own step, which goes on where a task is taken up with ``begin=``. It must
            give the same batch whenever it is asked for the same step.

    Raises:
        ValueError: in use, fewer rows than inner steps, or tensors without a leading dimension.

    Example:
        >>> task = il.Task(support=il.Steps((inputs, targets)), query=held_out)  # inputs ``[steps, examples, ...]``
        >>> task = il.Task(support=il.Steps(lambda step: batches[step % len(batches)]), query=held_out)
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        return f"Steps({self.rows!r})"

    def check(self, part: str, steps: int, exact: bool = False) -> None:
        """Refuse fewer rows than inner steps, and with ``exact`` more.

        Raises:
            ValueError: so; no tensor at all; or tensors of unequal lengths.
        """
        if callable(self.rows):
            return
        leaves = tensors(self.rows)
        if not leaves or min(leaf.ndim for leaf in leaves) == 0:
            raise ValueError(f"Steps as {part} needs tensors with a leading dimension for the inner step")
        rows = sorted({len(leaf) for leaf in leaves})
        cure = ""
        if isinstance(self.rows, list):
            cure = "; of a list of batches stack the tensors, or give il.Steps(lambda step: batches[step])"
        if len(rows) > 1:
            raise ValueError(
                f"Steps as {part} holds tensors of {rows} rows: all have one row for every inner step{cure}"
            )
        if rows[0] < steps or (exact and rows[0] > steps):
            raise ValueError(
                f"Steps as {part} holds {rows[0]} rows for {steps} inner steps: give a row for every step"
                + (" and no more; in a batch of tasks the task's dimension comes first" if rows[0] > steps else "")
                + cure
            )

    def row(self, place: int, step: int) -> Batch:
        """The batch of the ``place``-th step of this call, which is the task's own step ``step``."""
        if not callable(self.rows):
            return map_tensors(lambda leaf: leaf[place], self.rows)
        try:
            return self.rows(step)
        except (StopIteration, IndexError) as error:
            raise ValueError(
                f"Steps found no batch for step {step}: let its function give one for every step, whenever it is asked"
            ) from error


# A function is no tree of tensors: it travels in the structure.
pytree.register_pytree_node(
    Steps,
    lambda steps: ([], steps.rows) if callable(steps.rows) else ([steps.rows], None),
    lambda children, function: Steps(*children) if function is None else Steps(function),
)


class End(NamedTuple):
    """Where a task was left: what ``begin=`` takes to go on from there.

    Attributes:
        params: the parameters, a tree.
        state: what the inner solver carries from step to step.
        step: inner steps taken so far, those of earlier calls included.
        solution: what the estimator carries from call to call, a tree: the solution of its linear system, or its
            particles; empty for most.
    """

    params: Tree
    state: Any
    step: int
    solution: dict[str, Any] = {}  # noqa: RUF012  # never changed


@dataclass
class Known:
    """What was found out about a problem while computing with it; shared by all its copies.

    Attributes:
        warned: of meta-gradients that are exactly zero.
        chained: its chains were seen to be its losses.
        differences: products that were taken by differences.
        error: the last estimate of their relative error; None before the first.
    """

    warned: bool = False
    chained: bool = False
    differences: int = 0
    error: float | None = None


class Stage(NamedTuple):
    """One part of a loss that is a chain: it reads some parameters, and what the stage before it gave.

    Attributes:
        reads: the names that it reads, in either tree; it is given no others.
        run: ``run(params, meta, value) -> value``; the first is given None, and the last gives the loss (of an outer
            loss, or the pair that it returns). A value is any tree of tensors, and is not changed in place.
    """

    reads: Collection[str]
    run: Callable[[Tree, Tree, Any], Any]


Chain = Callable[[Tree, Batch], Sequence[Stage]]
"""The stages of a loss, for these meta-parameters and this batch."""


class Engine:
    """How the derivatives of a problem's losses are computed. It never shows in a result beyond what it states."""

    second_order: ClassVar[bool] = True
    """Whether it needs kernels that have second derivatives."""

    def check(self, problem: Problem) -> None:
        """Refuse a problem that it cannot take.

        Raises:
            ValueError: so; the message says what helps.
        """

    def gradient(self, problem: Problem, params: Tree, meta: Tree, support: Batch, step: int) -> tuple[Tree, Tensor]:
        """Gradient of the inner loss in the parameters, and the loss; see `innerloop.curvature.gradient`."""
        raise NotImplementedError

    def products(
        self, problem: Problem, params: Tree, meta: Tree, support: Batch, step: int, *, mixed: bool, keep: bool
    ) -> Callable[[Tree], tuple[Tree, Tree]]:
        """``w -> (H w, B w)`` at one point; see `innerloop.curvature.linearised`."""
        raise NotImplementedError

    def judge(self, problem: Problem, params: Tree, meta: Tree, query: Batch) -> tuple[Tensor, Any, Tree, Tree]:
        """The outer loss, what it returned beside it, and its gradients in both trees."""
        raise NotImplementedError


@dataclass(frozen=True)
class Problem:
    """A bilevel problem for one task, as three pure functions over trees.

    Attributes:
        start: ``start(meta) -> params``, where the inner solver begins; or ``start(meta, support) -> params``, where
            that depends on the task.
        inner_loss: ``inner_loss(params, meta, support) -> scalar``, what the inner solver lowers.
        outer_loss: ``outer_loss(params, meta, query) -> scalar``, what the meta-parameters are judged by. It may return
            ``(scalar, extra)`` instead; ``extra``, any tree of tensors, then comes back in the result.
        seed: fixes what start and losses draw at random (dropout). Step ``k`` seeds torch by
            `innerloop.curvature.seed_of` of this and ``k``, so that a step recomputed is the same step; the outer loss
            has draws of its own. None takes a seed from torch's global generator for every estimate. Minibatches and
            random estimators draw from it too in `hypergradient`, and anew in every step of a learner.
        inner_chain: the inner loss as stages, one after the other, where it is a chain: ``inner_chain(meta, support)``
            gives a list of `Stage`. With it products can be computed block by block.
        outer_chain: the same of the outer loss.
        engine: how derivatives are computed; None is plain autograd.

    Example:
        >>> problem = il.Problem(lambda meta: {"w": meta["w"]}, inner_loss, outer_loss)
        >>> il.hypergradient(problem, meta, task, inner=il.SGD(lr=0.1, steps=5)).grad
    """

    start: Callable[..., Tree]
    inner_loss: Callable[[Tree, Tree, Batch], Tensor]
    outer_loss: Callable[[Tree, Tree, Batch], Any]
    seed: int | None = None
    known: Known = field(default_factory=Known, repr=False, compare=False)
    inner_chain: Chain | None = field(default=None, repr=False)
    outer_chain: Chain | None = field(default=None, repr=False)
    engine: Engine | None = field(default=None, repr=False)

    @cached_property
    def reads_support(self) -> bool:
        """Whether ``start`` takes the support set as well."""
        start = self.start.forward if isinstance(self.start, torch.nn.Module) else self.start
        try:
            parameters = inspect.signature(start).parameters.values()
        except (TypeError, ValueError):
            return False
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = [each for each in parameters if each.kind in places and each.default is each.empty]
        return len(required) > 1 or any(each.name == "support" for each in parameters)

    def begin(self, meta: Tree, support: Batch) -> Tree:
        """Where the inner solver begins."""
        return self.start(meta, support) if self.reads_support else self.start(meta)

    def holding(self, params: Tree) -> Problem:
        """The problem in which some parameters stand still: its inner loss takes the others, and puts them in place."""

        def inner_loss(moving: Tree, meta: Tree, support: Batch) -> Tensor:
            return self.inner_loss({**params, **moving}, meta, support)

        def held(stage: Stage) -> Stage:
            own = {name: params[name] for name in stage.reads if name in params}
            return Stage(stage.reads, lambda moving, meta, value: stage.run({**own, **moving}, meta, value))

        def chain(meta: Tree, support: Batch) -> Sequence[Stage]:
            assert self.inner_chain is not None
            return [held(stage) for stage in self.inner_chain(meta, support)]

        return replace(self, inner_loss=inner_loss, inner_chain=None if self.inner_chain is None else chain)
