"""Whether adaptation works at all: what its rate meets, what it makes of its own loss, and what guessing reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from innerloop.bilevel import Bilevel
from innerloop.curvature import second_order_kernels
from innerloop.inner import InnerLoop
from innerloop.problem import Task, Tree
from innerloop.training.evaluation import Scores, Source, draw, evaluation_mode
from innerloop.trees import tree_map

FITTED = 1e-3  # a loss from which inner steps change next to nothing
TASKS = 4  # looked at; more change little
LANCZOS = 20  # iterations, a curvature product each
ABOVE, FAR = 3.0, 10.0  # times the loss of guessing: worth a warning, and at chance beyond hope
PATIENCE = 3  # validations in a row without hope, after which training stops
LOWER = "Lower the inner rate (--inner-lr; auto measures one), or hold the inner loop back (--proximal 2)"


def single(learner: Bilevel, tasks: Source, split: str, index: int) -> Task:
    """One task of a split, without a task dimension."""
    batch = draw(tasks, learner, split, index, 1)
    if not isinstance(batch, Task):
        return batch[0]
    task: Task = tree_map(lambda value: value[0], batch) if learner.stacked else batch
    return task


def _loops(learner: Bilevel, tasks: Source, split: str, count: int = TASKS) -> Iterator[InnerLoop]:
    """The inner loops of the first tasks of a split."""
    with evaluation_mode(learner), torch.no_grad(), second_order_kernels(learner.recurrent, learner.engine):
        for index in range(min(count, TASKS)):
            yield learner.loop(single(learner, tasks, split, index))[0]


def inner_losses(learner: Bilevel, tasks: Source, split: str = "train", count: int = TASKS) -> list[float]:
    """What the inner loop lowers, before it and after each training step: medians over the first tasks of a split.

    At most ``count`` tasks are drawn. Where every step reads a batch of its own, all are judged on the first.
    """
    found = torch.stack([_descent(loop) for loop in _loops(learner, tasks, split, count)])
    medians: list[float] = found.median(0).values.tolist()
    return medians


def _descent(loop: InnerLoop) -> Tensor:
    values: list[Tensor] = []
    end = loop.run(loop.solver.steps, lambda step, params, *_: values.append(_objective(loop, params)))
    return torch.stack([*values, _objective(loop, end.params)])


def _objective(loop: InnerLoop, params: Tree) -> Tensor:
    """The inner loss with the two terms of the solver."""
    decay = 0.0 if loop.solver.decoupled else loop.solver.weight_decay
    value = loop.value(loop.begin.step, params)
    for name, param in params.items():
        value = value + decay / 2 * param.square().sum()
        value = value + loop.solver.proximal / 2 * (param - loop.start[name]).square().sum()
    return value


def curvature(learner: Bilevel, tasks: Source) -> float:
    """The largest curvature of what the inner loop lowers, where it begins, over the first training tasks."""
    found = [eigenvalues(loop, loop.begin.params).abs().max() for loop in _loops(learner, tasks, "train")]
    return torch.stack(found).max().item()


def fitting_rate(learner: Bilevel, tasks: Source) -> float:
    """The inner rate whose product with the `curvature` is 1, to two digits.

    Raises:
        ValueError: an inner solver whose steps are no rate times a gradient, or a curvature that has no inverse.
    """
    if learner.inner.largest_rate(learner.learned()) is None:
        raise ValueError(
            f"inner-lr auto measures a rate for plain gradient steps, and {type(learner.inner).__name__} scales its "
            "steps itself: give --inner-lr a number, such as 0.001"
        )
    found = curvature(learner, tasks)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"the curvature of the inner loss is {found:.3g} on the first tasks: give --inner-lr a number")
    return float(f"{1 / found:.2g}")


def opening(learner: Bilevel, tasks: Source) -> tuple[str, str]:
    """How the inner loop does with the first weights, in words, and a warning where it overshoots; else empty."""
    if not learner.inner.steps:
        return "", ""
    losses, rate = inner_losses(learner, tasks), learner.inner.largest_rate(learner.learned())
    words = f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses) - 1} steps, on the first {TASKS} tasks"
    if losses[0] < FITTED:  # as where a class has one example, which is its mean
        words += "; it starts out fitted, so the inner steps have next to nothing to change"
    if rate is None:
        return f"inner loop with fresh weights: {words}", ""
    steepest = curvature(learner, tasks)
    product = f"rate {rate:.2g} times curvature {steepest:.2g} is {rate * steepest:.2g}"
    words = f"inner loop with fresh weights: {product}; {words}"
    # Cross-entropy flattens as it falls: far above 2 a step may still lower it, and then all is well.
    if rate * steepest <= 2 or losses[1] <= losses[0]:
        return words, ""
    cure = f"Give --inner-lr {1 / steepest:.2g}, which is what --inner-lr auto measures"
    return (
        words,
        f"the inner rate {rate:.2g} overshoots: {product}, above 2, and the first step raises the loss. {cure}",
    )


def at_chance(scores: Scores, ways: int | None) -> bool:
    """Whether the accuracy is not above that of guessing by more than its interval."""
    if ways is None or scores.accuracy is None:
        return False
    return scores.accuracy.mean - scores.accuracy.interval <= 1 / ways + 1e-6  # a fifth in float32 is above a fifth


def hopeless(scores: Scores, ways: int | None) -> bool:
    """Whether scores are at chance with a loss far above that of guessing."""
    return at_chance(scores, ways) and not scores.loss.mean <= FAR * math.log(ways or 1)


def ailment(scores: Scores, ways: int | None, losses: Sequence[float]) -> str:
    """What is wrong with adaptation, and the cure; empty where nothing is.

    Args:
        scores: of the tasks of a split.
        ways: their classes, each as frequent as the others; None for regression.
        losses: as `inner_losses` gives them.
    """
    found, cure = [], LOWER
    if at_chance(scores, ways) and scores.accuracy and ways:
        mean, interval = (100 * value for value in scores.accuracy)
        found.append(f"the accuracy, {mean:.1f} % ± {interval:.1f}, is that of guessing, {100 / ways:.1f} %")
    if ways and scores.accuracy and not scores.loss.mean <= ABOVE * math.log(ways):
        found.append(f"the loss is {scores.loss.mean:.3g}, and that of guessing {math.log(ways):.3g}")
    elif found:
        cure = "Train longer, or change the outer rate (--outer-lr)"
    if not losses[-1] <= losses[0]:
        found.append(f"adaptation raises its own loss, {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses) - 1} steps")
        cure = LOWER
    return f"{'; '.join(found)}. {cure}" if found else ""


def eigenvalues(loop: InnerLoop, params: Tree) -> Tensor:
    """Ritz values, at a point, of the Hessian of what the inner loop lowers."""
    sizes = [value.numel() for value in params.values()]
    like = next(iter(params.values()))
    hessian = loop.hessian(loop.begin.step, params)

    def product(vector: Tensor) -> Tensor:
        parts = zip(params.items(), vector.split(sizes), strict=True)
        bent = hessian({name: part.view_as(value) for (name, value), part in parts})
        return torch.cat([bent[name].reshape(-1) for name in params])

    first = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = (0.0 if loop.solver.decoupled else loop.solver.weight_decay) + loop.solver.proximal
    return lanczos(product, first.to(like), min(LANCZOS, sum(sizes))) + shift


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
