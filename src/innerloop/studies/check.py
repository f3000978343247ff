"""How far each estimator is from the exact meta-gradient, on a user's own model and tasks, and why.

Estimators are compared task by task with ``Unrolled`` on the inner problem that they themselves pose: ``Implicit`` adds
a proximal term and ``MemoryReduced`` an L2 term, which the exact gradient then has too, and what an estimator does not
learn is left out on both sides. The spectrum of the inner Hessian, by Lanczos on curvature products, says where an
approximation can be expected to hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from innerloop.curvature import curvature, gradient, second_order_kernels
from innerloop.inner import SGD, InnerSolver, LearnedRates, Momentum
from innerloop.learner import MetaLearner
from innerloop.meta_gradient import (
    Binomial,
    FirstOrder,
    Implicit,
    MemoryReduced,
    MetaGradient,
    Reptile,
    Truncated,
    Unrolled,
    Window,
)
from innerloop.problem import Batch, Problem, Task, Tree
from innerloop.tasks import TaskSource
from innerloop.training.choices import META_GRADIENT, make
from innerloop.training.report import BLUE, GREY, ORANGE, STYLE

ESTIMATORS = ("unrolled", "first-order", "truncated:2", "window:2", "binomial:1", "implicit", "memory-reduced")
ROUNDING, CLOSE = 1e-4, 0.1  # relative errors below which nothing, or little, is lost
LANCZOS = 20  # iterations, a curvature product each


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
        against: what it is compared with.
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
    against: str
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


@dataclass(frozen=True)
class _Measured:
    """One estimator on one task."""

    grad: Tensor
    residual: float
    products: float
    seconds: float
    memory: int | None


def check(
    learner: MetaLearner,
    tasks: TaskSource,
    estimators: Sequence[str | MetaGradient] = ESTIMATORS,
    count: int = 32,
    split: str = "train",
) -> Check:
    """Compare estimators with the exact meta-gradient of a learner as it stands, on the first tasks of a split.

    Copies of the learner are compared, without dropout; whatever its own estimator is makes no difference, but for the
    proximal or L2 term that it has put into the inner problem. ``MemoryReduced`` begins every task at the start. Tasks
    are computed one by one, so that time and memory are those of one.

    Args:
        learner: model, inner solver and subset.
        tasks: where the tasks come from.
        estimators: as in settings, such as ``"window:5"``, or objects.
        count: number of tasks.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        ValueError: ``count`` below 1, an unknown estimator or one whose arguments are out of range.
    """
    if count < 1:
        raise ValueError(f"count={count}: a check needs 1 task or more")
    chosen: dict[str, MetaGradient] = {
        str(each): make("estimator", META_GRADIENT, each) if isinstance(each, str) else each for each in estimators
    }
    variants: dict[tuple[MetaGradient, InnerSolver], MetaLearner] = {}

    def variant(estimator: MetaGradient, inner: InnerSolver) -> tuple[MetaGradient, InnerSolver]:
        if isinstance(estimator, MemoryReduced):
            estimator = replace(estimator, warm_start="none")
        built = _variant(learner, estimator, inner)
        variants.setdefault((estimator, built.inner), built)
        return estimator, built.inner

    pairs: dict[str, tuple[tuple[MetaGradient, InnerSolver], tuple[MetaGradient, InnerSolver]]] = {}
    rows: dict[str, Row] = {}
    for name, estimator in chosen.items():
        wanted: MetaGradient = estimator
        try:
            key = variant(wanted, learner.inner)
            wanted = Unrolled(learn_start=getattr(estimator, "learn_start", True))
            pairs[name] = key, variant(wanted, key[1])
        except ValueError as error:
            reason = str(error) if wanted is estimator else f"no exact meta-gradient to compare with: {error}"
            rows[name] = Row(name, "", refused=reason, sentence=f"{name} is refused here: {reason}.")
    used = {key for pair in pairs.values() for key in pair}
    found: dict[str, list[tuple[_Measured, _Measured, float]]] = {name: [] for name in pairs}
    itself, spectra = _variant(learner, learner.meta_gradient, learner.inner), []
    for index in range(count):
        batch = tasks.batch(split, index, 1)
        spectra.append(_spectrum(itself, batch))
        measured = {key: _measure(variants[key], batch) for key in used}
        for name, (key, exact) in pairs.items():
            solves = not math.isnan(measured[key].residual)
            unsolved = _unsolved(variants[key], batch) if solves else math.nan
            found[name].append((measured[key], measured[exact], unsolved))
    smallest, largest = (Spread.of(values) for values in zip(*spectra, strict=True))
    geometry = Geometry(largest, smallest, _rate(learner), learner.inner.steps)
    for name, (key, _) in pairs.items():
        row = _row(name, key[0], _against(key[0], key[1], learner.inner), found[name])
        shift = _shift(key[1]) - _shift(learner.inner)
        rows[name] = replace(row, sentence=f"{name} {_verdict(row, key[0])}{_advice(row, key[0], geometry, shift)}.")
    return Check(count, geometry, [rows[name] for name in chosen])


def _variant(learner: MetaLearner, estimator: MetaGradient, inner: InnerSolver) -> MetaLearner:
    built = MetaLearner(
        learner.model,
        adapts=learner.adapts,
        inner=inner,
        meta_gradient=estimator,
        loss=learner.loss,
        batch_norm=learner.batch_norm,
        chunk_size=1,
    )
    built.load_state_dict(learner.state_dict())  # learned rates
    return built.eval()


def _measure(learner: MetaLearner, batch: Task) -> _Measured:
    place = next(learner.parameters())
    batch, cuda = batch.to(place.device, place.dtype), place.device.type == "cuda"
    learner.zero_grad()
    if cuda:
        torch.cuda.synchronize(place.device)
        torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device) if cuda else 0
    began = time.perf_counter()
    diagnostics = learner.meta_step(batch).diagnostics
    if cuda:
        torch.cuda.synchronize(place.device)
    seconds = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated(place.device) - before if cuda else None
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]
    residual = diagnostics["residual"].item() if "residual" in diagnostics else math.nan
    products = diagnostics["curvature_products"].item()
    return _Measured(torch.cat([grad.double().reshape(-1) for grad in grads]), residual, products, seconds, memory)


def _row(name: str, estimator: MetaGradient, against: str, found: list[tuple[_Measured, _Measured, float]]) -> Row:
    cosines, errors = [], []
    for mine, exact, _ in found:
        size = exact.grad.norm()
        cosines.append((mine.grad @ exact.grad / (mine.grad.norm() * size)).item())
        errors.append(((mine.grad - exact.grad).norm() / size).item())
    return Row(
        name,
        against,
        cosine=Spread.of(cosines),
        error=None if isinstance(estimator, Reptile) else Spread.of(errors),
        failed=sum(not math.isfinite(cosine) for cosine in cosines),
        residual=Spread.of(mine.residual for mine, _, _ in found),
        unsolved=Spread.of(unsolved for _, _, unsolved in found),
        products=found[0][0].products,
        seconds=float(np.median([mine.seconds for mine, _, _ in found])),
        memory=max((mine.memory for mine, _, _ in found if mine.memory is not None), default=None),
    )


# The inner problem.


def _problem(learner: MetaLearner) -> tuple[Problem, Tree]:
    """The inner loss as a function of what is adapted, and where that starts."""
    fixed = {name: parameter.detach() for name, parameter in learner.model.named_parameters()}

    def inner_loss(params: Tree, meta: Tree, support: Batch) -> Tensor:
        inputs, targets = support
        return learner.loss(functional_call(learner.model, {**fixed, **params}, (inputs,)), targets)

    start = {name: fixed[name] for name in learner.adapted}
    return Problem(lambda meta: start, inner_loss, inner_loss), start


def _ends(learner: MetaLearner, batch: Task) -> tuple[Problem, Batch, list[Tree]]:
    """The inner problem of a batch of one task, its support set, and the parameters before and after the inner loop."""
    place = next(learner.parameters())
    moved = batch.to(place.device, place.dtype)
    inputs, targets = moved.support[0][0], moved.support[1][0]
    problem, start = _problem(learner)
    adapted = learner.adapt(inputs, targets, steps=learner.inner.steps)
    return problem, (inputs, targets), [start, {name: adapted.get_parameter(name).detach() for name in start}]


def _spectrum(learner: MetaLearner, batch: Task) -> tuple[float, float]:
    """The smallest eigenvalue and the largest absolute eigenvalue of H that are seen on one task."""
    with torch.no_grad(), _kernels(learner):
        problem, support, places = _ends(learner, batch)
        seen = torch.cat([_eigenvalues(problem, params, support) for params in places]) + _shift(learner.inner)
    return seen.min().item(), seen.abs().max().item()


def _unsolved(learner: MetaLearner, batch: Task) -> float:
    """Norm of the full inner gradient at the end over that at the beginning."""
    with torch.no_grad(), _kernels(learner):
        problem, support, places = _ends(learner, batch)
        grads = [
            learner.inner.full_gradient(params, gradient(problem, params, {}, support)[0], places[0])
            for params in places
        ]
    first, last = (torch.cat([value.reshape(-1) for value in grad.values()]).norm() for grad in grads)
    return (last / first).item()


def _kernels(learner: MetaLearner) -> AbstractContextManager[None]:
    return second_order_kernels(any(isinstance(module, nn.RNNBase) for module in learner.modules()))


def _eigenvalues(problem: Problem, params: Tree, support: Batch) -> Tensor:
    """Ritz values of the Hessian of the inner loss at a point."""
    shapes = {name: value.shape for name, value in params.items()}
    sizes = [value.numel() for value in params.values()]
    like = next(iter(params.values()))

    def product(vector: Tensor) -> Tensor:
        parts = zip(shapes.items(), vector.split(sizes), strict=True)
        direction = {name: part.view(shape) for (name, shape), part in parts}
        bent, _ = curvature(problem, params, {}, support, direction)
        return torch.cat([bent[name].reshape(-1) for name in shapes])

    first = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lanczos(product, first.to(like), min(LANCZOS, sum(sizes)))


def lanczos(product: Callable[[Tensor], Tensor], vector: Tensor, iterations: int) -> Tensor:
    """Eigenvalues of a symmetric matrix as seen in the Krylov space of a vector (Lanczos 1950), ``[iterations]``.

    The outer ones come close to those of the matrix first. Without re-orthogonalisation, which would keep every vector:
    rounding then repeats eigenvalues that are already found, and moves none out of the spectrum.

    Args:
        product: ``x -> M x``.
        vector: where to begin, ``[n]``, not 0.
        iterations: products to take; fewer where the space is exhausted.
    """
    last, vector = torch.zeros_like(vector), vector / vector.norm()
    diagonal: list[float] = []
    beside: list[float] = [0.0]
    for _ in range(iterations):
        image = product(vector) - beside[-1] * last
        diagonal.append((vector @ image).item())
        image = image - diagonal[-1] * vector
        beside.append(image.norm().item())
        if not beside[-1] > 100 * torch.finfo(vector.dtype).eps * max(map(abs, diagonal)):
            break  # also NaN
        last, vector = vector, image / beside[-1]
    small, large = torch.tensor(diagonal, dtype=torch.float64), torch.tensor(beside[1:-1], dtype=torch.float64)
    if not (small.isfinite().all() and large.isfinite().all()):
        return torch.full_like(small, math.nan)
    return torch.linalg.eigvalsh(torch.diag(small) + torch.diag(large, 1) + torch.diag(large, -1))


def _rate(learner: MetaLearner) -> float | None:
    if isinstance(learner.inner, LearnedRates):
        return max(rate.abs().max().item() for rate in learner.rates.values())
    return learner.inner.lr if isinstance(learner.inner, (SGD, Momentum)) else None


def _shift(inner: InnerSolver) -> float:
    """What the solver's own terms add to every eigenvalue of the inner Hessian."""
    return inner.weight_decay + inner.proximal


# In words.


def _against(estimator: MetaGradient, inner: InnerSolver, own: InnerSolver) -> str:
    words = "unrolled"
    if inner.proximal != own.proximal:
        words += f" with proximal {inner.proximal:g}"
    if inner.weight_decay != own.weight_decay:
        words += f" with weight decay {inner.weight_decay:g}"
    if not getattr(estimator, "learn_start", True):
        words += ", what is not adapted alone"
    if isinstance(estimator, Reptile):
        words += ", direction alone"
    return words


def _verdict(row: Row, estimator: MetaGradient) -> str:
    """How good it is, by what was measured."""
    where = "" if row.against == "unrolled" else f" (against {row.against})"
    if row.cosine is None:
        return f"is not usable here: it is not finite on any task{where}"
    lost = f"; it is not finite on {row.failed} of the tasks" if row.failed else ""
    if row.error is None:
        return f"is no gradient of the query loss; median cosine {_short(row.cosine.median)}{where}{lost}"
    numbers = f"median cosine {_short(row.cosine.median)}, relative error {_short(row.error.median)}"
    if isinstance(estimator, Unrolled):
        return f"is exact{where}{lost}"
    if row.error.median <= ROUNDING:
        return f"agrees with the exact meta-gradient here, relative error {_short(row.error.median)}{where}{lost}"
    if row.error.median <= CLOSE:
        words = "is close to the exact meta-gradient"
    elif row.cosine.median >= 0.9:
        words = "points the right way"
    elif row.cosine.median >= 0.5:
        words = "points roughly the right way"
    else:
        words = "does not follow the exact meta-gradient here"
    return f"{words}: {numbers}{where}{lost}"


def _advice(row: Row, estimator: MetaGradient, geometry: Geometry, shift: float) -> str:
    """Why it is no better, and what helps; empty where nothing is to be said."""
    far = row.cosine is None or (row.error is not None and row.error.median > CLOSE)
    steps, reach, rate = geometry.steps, geometry.reach, geometry.rate
    match estimator:
        case Window(size=size) if size > 1 and steps > 1:
            jump = min(size, steps)
            if reach is not None and rate is not None and jump * reach > 1:
                return (
                    f"; outside its safe range: {jump} * lr * |H| = {_short(jump * reach)}, and above 1 a window's "
                    f"factors change sign: use window:{max(1, int(1 / reach))} or an inner rate below "
                    f"{_short(rate / (jump * reach))}"
                )
            return f"; use window:{jump - 1} or a smaller inner rate" if far else ""
        case Binomial(order=order) if order < steps:
            if reach is not None and rate is not None and reach > 1:
                return (
                    f"; outside its safe range: lr * |H| = {_short(reach)}, and above 1 a low order can be worse than "
                    f"first-order: use unrolled, or an inner rate below {_short(rate / reach)}"
                )
            return f"; use binomial:{order + 1}, or unrolled, which takes no more curvature products" if far else ""
        case FirstOrder() if far:
            big = "" if reach is None else f" of size steps * lr * |H| = {_short(steps * reach)}"
            return f"; it leaves out terms{big}: use unrolled or truncated, or a smaller inner rate"
        case Truncated(horizon=horizon) if far and horizon < steps:
            return f"; the {steps - horizon} steps left out matter: use truncated:{horizon + 1} or unrolled"
        case Reptile():
            return "; for one that is, at no curvature product either, use first-order"
        case Implicit() | MemoryReduced() if far:
            return _solution_advice(row, estimator, geometry, shift)
    return ""


def _solution_advice(row: Row, estimator: Implicit | MemoryReduced, geometry: Geometry, shift: float) -> str:
    """Which of the three things that a solution's derivative relies on is missing.

    Args:
        row: what was measured.
        estimator: whose solution it is.
        geometry: of the learner's own inner problem.
        shift: what the estimator's own term adds to those eigenvalues.
    """
    term, weight = ("proximal", estimator.proximal) if isinstance(estimator, Implicit) else ("l2", estimator.l2)
    if geometry.largest is None or geometry.smallest is None:
        return "; its inner loop diverges: use a smaller inner rate"
    causes = []
    lowest, highest, rate = geometry.smallest.low + shift, geometry.largest.high + shift, geometry.rate
    if lowest <= 0:
        needed = weight - lowest
        slower = "" if rate is None else f" and an inner rate below {_short(1 / (highest - lowest))}"
        causes.append(
            f"its system is not positive definite, the smallest eigenvalue with {term} {weight:g} being "
            f"{_short(lowest)}: give {term} above {_short(needed)}{slower}"
        )
    if row.unsolved is not None and row.unsolved.median > CLOSE:
        overshoots = rate is not None and rate * highest > 1.5
        cure = f"a rate below {_short(1 / highest)}" if overshoots else f"a larger rate or a larger {term}"
        causes.append(
            f"the inner loop leaves {row.unsolved.median:.0%} of its gradient, and the estimate takes it for solved: "
            f"take more inner steps, {'or ' if overshoots else ''}{cure}"
        )
    if row.residual is not None and row.residual.median > CLOSE:
        causes.append(
            f"the linear solver leaves a residual of {row.residual.median:.0%}: give it more iterations, or a larger "
            f"{term}"
        )
    return "".join(f"; {cause}" for cause in causes)


def _short(value: float, digits: int = 3) -> str:
    """A few digits of a number, and one of a rounding error."""
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def table(found: Check) -> Table:
    """The rows of a check for a terminal; memory only where it was measured."""
    measured = any(row.memory is not None for row in found.rows)
    shown = Table()
    shown.add_column("estimator", overflow="fold")
    for name in ("cosine", "relative error", "residual", "products", "ms", *(["MiB"] if measured else [])):
        shown.add_column(name, justify="right", overflow="fold")
    for row in found.rows:
        if row.refused is not None:
            shown.add_row(row.name, "refused")
            continue
        shown.add_row(
            row.name,
            _cell(row.cosine, 3),
            _cell(row.error, 2),
            "-" if row.residual is None else _short(row.residual.median),
            f"{row.products:g}",
            f"{1000 * (row.seconds or 0):.1f}",
            *(["-" if row.memory is None else f"{row.memory / 2**20:.1f}"] if measured else []),
        )
    return shown


def _cell(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    return f"{_short(spread.median)}\n{_short(spread.low, digits)}..{_short(spread.high, digits)}"


def draw(path: Path, checks: Mapping[str, Check]) -> None:
    """Draw cosine and relative error of every estimator, median and the middle 80 % of the tasks.

    Args:
        path: where the PNG goes.
        checks: of one or more points, by name, of the same estimators.
    """
    names = [row.name for row in next(iter(checks.values())).rows]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.6 + 0.4 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, (label, colour) in enumerate(zip(checks, (BLUE, ORANGE), strict=False)):
            offset = 0.22 * (place - (len(checks) - 1) / 2)
            for axes, quantity in ((left, "cosine"), (right, "error")):
                spreads = [getattr(row, quantity) for row in checks[label].rows]
                shown = [(index + offset, spread) for index, spread in enumerate(spreads) if spread is not None]
                if not shown:
                    continue
                middle = np.array([spread.median for _, spread in shown])
                ends = np.array([(spread.low, spread.high) for _, spread in shown])
                axes.errorbar(
                    middle,
                    [at for at, _ in shown],
                    xerr=np.abs(ends - middle[:, None]).T,
                    fmt="o",
                    color=colour,
                    capsize=3,
                    clip_on=False,  # an error of 0 lies on the axis
                    label=label,
                )
        for index, row in enumerate(next(iter(checks.values())).rows):
            if row.refused is not None:
                left.text(0.02, index, "refused", transform=left.get_yaxis_transform(), color=GREY, va="center")
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.5, -0.5)
        left.set_xlabel("cosine with the exact meta-gradient")
        right.set_xlabel("relative error")
        right.set_xscale("symlog", linthresh=CLOSE / 10)
        right.set_xlim(0, max(right.get_xlim()[1], CLOSE))
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.savefig(path)
