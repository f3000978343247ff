"""How far each estimator is from the exact meta-gradient, on a user's own model and tasks, and why.

All estimators are compared on one problem, the learner's own, task by task with ``Unrolled``. The spectrum of the inner
Hessian, by Lanczos on curvature products, says where an approximation can be expected to hold.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Column, Table

from innerloop.bilevel import Bilevel
from innerloop.choices import choice
from innerloop.curvature import second_order_kernels
from innerloop.inner import InnerLoop
from innerloop.meta_gradient import MetaGradient, Seen, Unrolled, finite
from innerloop.problem import Task, Tree
from innerloop.training.evaluation import Source, evaluation_mode, key_of
from innerloop.training.health import eigenvalues, single
from innerloop.training.store import resumable

ESTIMATORS = ("unrolled", "first-order", "truncated:2", "window:2", "binomial:1", "implicit", "memory-reduced")
NO_STEP = "the learner takes no inner step, so that every estimator is exact: check it with 1 inner step or more"
_Measured = tuple[Tree, float, float, float, float, float]
SPECTRUM = "the spectrum of H"
ROUNDING, CLOSE = 1e-4, 0.1  # relative errors below which nothing, or little, is lost


@dataclass(frozen=True)
class Spread:
    """Median over the tasks, and what a tenth of them lies below and above."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread | None:
        """The spread of the finite ones among the values; None if there are none."""
        finite = [value for value in values if math.isfinite(value)]
        return Spread(*map(float, np.quantile(finite, (0.5, 0.1, 0.9)))) if finite else None

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} .. {_short(self.high)})"


@dataclass(frozen=True)
class Geometry:
    """The inner problem, at the start and at the end of the inner loop, as the learner poses it.

    H is the Hessian of all that the inner loop lowers, weight decay and proximal term included.

    Attributes:
        largest: of each task, the largest absolute eigenvalue of H seen.
        smallest: the smallest eigenvalue seen; where it is below 0 the inner problem is not convex. Lanczos approaches
            both from inside the spectrum.
        rate: of the inner solver, the largest of learned ones; None where steps are no rate times a gradient (Adam).
        steps: inner steps.
    """

    largest: Spread | None
    smallest: Spread | None
    rate: float | None
    steps: int

    @property
    def reach(self) -> float | None:
        """Rate times largest curvature, which nine tasks in ten stay below; None where there is no rate."""
        return None if self.rate is None or self.largest is None else self.rate * self.largest.high

    def __str__(self) -> str:
        if self.largest is None or self.smallest is None:
            return "the curvature of the inner loss is not finite"
        convex = self.smallest.low >= -1e-3 * self.largest.high
        words = f"smallest eigenvalue of H {self.smallest}: the inner problem is {'' if convex else 'not '}convex here"
        if self.rate is None:
            return f"|H| = {self.largest}, {words}"
        scaled = Spread(*(self.rate * value for value in (self.largest.median, self.largest.low, self.largest.high)))
        over = "; above 2, plain gradient steps overshoot" if scaled.high > 2 else ""
        return f"lr * |H| = {scaled}{over}; {words}"


@dataclass(frozen=True)
class Row:
    """An estimator beside the exact meta-gradient.

    Attributes:
        name: the estimator.
        refused: why it does not work here, with what does; then all that follows is None.
        cosine: between the two meta-gradients of a task.
        error: norm of their difference over that of the exact one; None for Reptile, whose length means nothing.
        failed: tasks without a finite cosine.
        residual: relative residual of the linear system, where one is solved.
        unsolved: norm of the inner gradient where the inner loop ends over that where it begins, for estimators that
            take the inner problem for solved.
        products: curvature products a task.
        seconds: median time of a task computed alone.
        memory: peak bytes of a task above model and data; None on the CPU, which takes a fresh process for each:
            `innerloop check` does that.
        sentence: what it comes to, in words, and what helps.
    """

    name: str
    refused: str | None = None
    cosine: Spread | None = None
    error: Spread | None = None
    failed: int = 0
    residual: Spread | None = None
    unsolved: Spread | None = None
    products: float | None = None
    seconds: float | None = None
    memory: int | None = None
    sentence: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` finds: how many tasks, the inner problem, and an estimator a row."""

    tasks: int
    geometry: Geometry
    rows: list[Row]


def check(
    learner: Bilevel,
    tasks: Source,
    estimators: Sequence[str | MetaGradient] = ESTIMATORS,
    count: int = 32,
    split: str = "train",
    kept: Path | None = None,
) -> Check:
    """Compare estimators with the exact meta-gradient of a learner as it stands, on the first tasks of a split.

    All of them see the learner's own problem, without dropout and with the same random draws; its own estimator makes
    no difference. Those that do not learn the start of a `MetaLearner` are compared in what they learn. Tasks are
    computed one by one, each from the start, so that time and memory are those of one.

    Args:
        learner: a `MetaLearner` or any `Bilevel`; it stays as it is.
        tasks: where the tasks come from: any object with ``batch(split, start, count)``, as in `innerloop.fit`.
        estimators: as in settings, such as ``"window:5"``, or objects.
        count: number of tasks.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        kept: file to which the numbers of each task are appended, and from which those of the same check, interrupted
            before, are taken.

    Raises:
        ValueError: ``count`` below 1, an unknown estimator or one whose arguments are out of range.

    Example:
        >>> for row in il.check(learner, tasks, ["first-order", "window:2", il.Truncated(2)], count=8).rows:
        ...     print(row.sentence)
    """
    if count < 1:
        raise ValueError(f"count={count}: a check needs 1 task or more")
    if not learner.inner.steps:
        raise ValueError(NO_STEP)
    chosen: dict[str, MetaGradient] = {str(each): choice(each, "meta_gradient") for each in estimators}
    refused = {name: reason for name, each in chosen.items() if (reason := _refused(learner, each))}
    exact = Unrolled()
    if reason := _refused(learner, exact):
        refused = dict.fromkeys(chosen, f"no exact meta-gradient to compare with: {reason}")
    left = [name for name in chosen if name not in refused]
    key = key_of(learner, tasks, (split, list(chosen), torch.get_num_threads()))
    with (
        resumable(kept, key) as (done, keep),
        evaluation_mode(learner),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        # what follows from that is measured here
        warnings.filterwarnings("ignore", message=".* without weight_decay or proximal in the inner solver")
        for index in range(count):
            if index in done and done[index].keys() >= set(left):
                continue
            task = single(learner, tasks, split, index)
            torch.default_generator.manual_seed(index)  # the CPU's, from which every seed is drawn
            with torch.no_grad():
                loop, _ = learner.loop(task)
            done[index] = {SPECTRUM: torch.tensor(_spectrum(learner, loop), dtype=torch.float64)}
            truth: _Measured | None = None
            for name in list(left):
                try:
                    truth = truth or _measure(learner, loop, task, exact, index)
                    mine = truth if chosen[name] == exact else _measure(learner, loop, task, chosen[name], index)
                except ValueError as error:  # what an estimator refuses in the task: a batch for every step
                    refused[name] = str(error)
                    left.remove(name)
                    continue
                alike = _alike(chosen[name], learner.adapted, mine[0], truth[0])
                done[index][name] = torch.tensor([*alike, *mine[1:]], dtype=torch.float64)
            keep(index, done[index])

    def columns(name: str) -> list[list[float]]:
        return torch.stack([done[index][name] for index in range(count)]).T.tolist()

    smallest, largest = map(Spread.of, columns(SPECTRUM))
    geometry = Geometry(largest, smallest, learner.inner.largest_rate(learner.learned()), learner.inner.steps)
    rows = []
    for name, estimator in chosen.items():
        if name in refused:
            rows.append(Row(name, refused=refused[name], sentence=f"{name} is refused here: {refused[name]}."))
            continue
        row = _row(name, estimator, columns(name))
        far = row.cosine is None or (row.error is not None and row.error.median > CLOSE)
        seen = Seen(
            far,
            learner.inner,
            geometry.rate,
            smallest.low if smallest else None,
            largest.high if largest else None,
            row.residual.median if row.residual else None,
            row.unsolved.median if row.unsolved else None,
        )
        advice = estimator.advice(seen)
        verdict = _verdict(row, estimator)
        rows.append(replace(row, sentence=f"{name} {verdict}{advice and '; ' + advice}."))
    return Check(count, geometry, rows)


def _refused(learner: Bilevel, estimator: MetaGradient) -> str | None:
    """Why an estimator does not work on the learner's problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            learner.accepts(estimator)
        except ValueError as error:
            return str(error)
    return None


def _measure(learner: Bilevel, loop: InnerLoop, task: Task, estimator: MetaGradient, seed: int) -> _Measured:
    """The meta-gradient of a task, residual, what is unsolved, products, seconds and memory; NaN where unknown."""
    place = next(learner.parameters()).device
    cuda = place.type == "cuda"
    if cuda:
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
    before = torch.cuda.memory_allocated(place) if cuda else 0
    torch.default_generator.manual_seed(seed)
    began = time.perf_counter()
    result = learner.estimate(task, estimator)
    if cuda:
        torch.cuda.synchronize(place)
    seconds = time.perf_counter() - began
    solves = "residual" in result.diagnostics
    return (
        {**result.grad, **{f"rate of {name}": value for name, value in result.learned_grad.items()}},
        result.diagnostics["residual"].item() if solves else math.nan,
        _unsolved(learner, loop, result.params) if solves else math.nan,
        result.diagnostics["curvature_products"].item(),
        seconds,
        torch.cuda.max_memory_allocated(place) - before if cuda else math.nan,
    )


def _alike(estimator: MetaGradient, adapted: Sequence[str], mine: Tree, exact: Tree) -> tuple[float, float]:
    """Cosine and relative error of a meta-gradient in what the estimator learns."""
    names = [each for each in exact if estimator.learn_start or each not in adapted]
    wanted = torch.cat([exact[each].double().reshape(-1) for each in names])
    # an estimator that learns no rates is refused where there are some, or leaves them out
    own = [mine.get(each, torch.zeros_like(exact[each])) for each in names]
    grad = torch.cat([value.double().reshape(-1) for value in own])
    size = wanted.norm()
    return (grad @ wanted / (grad.norm() * size)).item(), ((grad - wanted).norm() / size).item()


def _row(name: str, estimator: MetaGradient, columns: Sequence[Sequence[float]]) -> Row:
    cosine, error, residual, unsolved, products, seconds, memory = columns
    return Row(
        name,
        cosine=Spread.of(cosine),
        error=Spread.of(error) if estimator.is_gradient else None,
        failed=sum(not math.isfinite(value) for value in cosine),
        residual=Spread.of(residual),
        unsolved=Spread.of(unsolved),
        products=products[0],
        seconds=float(np.median(seconds)),
        memory=None if math.isnan(memory[0]) else int(max(memory)),
    )


# The inner problem.


def _spectrum(learner: Bilevel, loop: InnerLoop) -> tuple[float, float]:
    """The smallest eigenvalue and the largest absolute eigenvalue of H that are seen on one task."""
    with torch.no_grad(), second_order_kernels(learner.recurrent, learner.engine):
        places = loop.begin.params, loop.run(learner.inner.steps).params
        if not finite(places):
            return math.nan, math.nan
        seen = torch.cat([eigenvalues(loop, params) for params in places])
    return seen.min().item(), seen.abs().max().item()


def _unsolved(learner: Bilevel, loop: InnerLoop, solved: Tree) -> float:
    """Norm of the full inner gradient at the end over that at the beginning."""
    with torch.no_grad(), second_order_kernels(learner.recurrent, learner.engine):
        last, first = (
            learner.inner.full_gradient(params, loop.gradient(loop.steps.stop, params)[0], loop.start)
            for params in (solved, loop.begin.params)
        )
    sizes = [torch.cat([value.reshape(-1) for value in grad.values()]).norm() for grad in (last, first)]
    return (sizes[0] / sizes[1]).item()


# In words.


def _verdict(row: Row, estimator: MetaGradient) -> str:
    """How good it is, by what was measured."""
    where = "" if estimator.learn_start else " (in what is not adapted, all that it learns)"
    if row.cosine is None:
        return f"is not usable here: it is not finite on any task{where}"
    lost = f"; it is not finite on {row.failed} of the tasks" if row.failed else ""
    if row.error is None:
        return f"is no gradient of the query loss; median cosine {_short(row.cosine.median)}{where}{lost}"
    if row.error.high == 0:
        return f"is exact{where}{lost}"
    if row.error.median <= ROUNDING:
        words = "agrees with the exact meta-gradient here"
    elif row.error.median <= CLOSE:
        words = "is close to the exact meta-gradient"
    elif row.cosine.median >= 0.9:
        words = "points the right way"
    elif row.cosine.median >= 0.5:
        words = "points roughly the right way"
    else:
        words = "does not follow the exact meta-gradient here"
    numbers = f"median cosine {_short(row.cosine.median)}, relative error {_short(row.error.median)}"
    return f"{words}: {numbers}{where}{lost}"


def _short(value: float) -> str:
    """A few digits of a number, and one of a rounding error."""
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def table(found: Check) -> Table:
    """The rows of a check for a terminal: median and the middle 80 % of the tasks."""
    names = "estimator", "cosine", "relative error", "residual", "products", "ms", "MiB"
    shown = Table(*(Column(name, overflow="fold") for name in names))
    for row in found.rows:
        if row.refused:
            shown.add_row(row.name, "refused")
            continue
        shown.add_row(
            row.name,
            *(str(spread or "-") for spread in (row.cosine, row.error, row.residual)),
            f"{row.products:g}",
            f"{1000 * (row.seconds or 0):.1f}",
            "-" if row.memory is None else f"{row.memory / 2**20:.1f}",
        )
    return shown
