"""What went wrong in a task whose meta-gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop.curvature import observed
from innerloop.meta_gradient._base import Result
from innerloop.problem import Task, Tree
from innerloop.trees import tensors, tree_leaves


class _Product(NamedTuple):
    """A curvature product that was taken: at which inner step, norm of its direction, whether its result is finite."""

    step: int
    norm: float
    finite: bool


def finite(tree: Any) -> Tensor:
    """Whether all numbers in a tree are finite, a scalar; what is no tensor counts as such."""
    flags = [value.isfinite().all() for value in tensors(tree)]
    return torch.stack(flags).all() if flags else torch.tensor(True)


def fault(estimate: Callable[[], Result], task: Task, steps: int) -> str | None:
    """What is the first in an estimate not to be finite, in words.

    Args:
        estimate: computes it, outside vmap.
        task: what it is computed on.
        steps: inner steps.

    Returns:
        A clause such as ``"the support loss is inf before inner step 4 of 5"``; None where all is finite.
    """
    products: list[_Product] = []

    def observe(step: int, direction: Tree, found: tuple[Tree, Tree]) -> None:
        values = [torch.func.debug_unwrap(value) for value in direction.values()]
        norm = torch.nn.utils.get_total_norm(values).item()
        products.append(_Product(step, norm, all(bool(finite(torch.func.debug_unwrap(x))) for x in tree_leaves(found))))

    with observed(observe):
        result = estimate()
    if finite((result.grad, result.learned_grad, result.loss)):
        return None
    for part, batch in task._asdict().items():  # after the estimate, which may take infinities, as in masks
        if not finite(batch):
            return f"the {part} set holds numbers that are not finite"
    return (
        _in_the_inner_loop(result, steps)
        or (None if finite(result.loss) else f"the query loss is {result.loss.item():.4g} after finite inner steps")
        or _in_a_product(products, "residual" in result.diagnostics)
        or _in_the_gradient(result)
    )


def _in_the_inner_loop(result: Result, steps: int) -> str | None:
    losses = result.diagnostics["support_loss"].tolist()
    unit = "inner step" if len(losses) == steps else "window"
    bad = next((place for place, loss in enumerate(losses) if not torch.tensor(loss).isfinite()), None)
    if bad == 0:
        return f"the support loss is {losses[0]:.4g} before the first inner step: look at the task, or at the loss"
    if bad is not None:
        path = ", ".join(f"{loss:.4g}" for loss in losses[max(0, bad - 3) : bad + 1])
        return f"the support loss is {losses[bad]:.4g} before {unit} {bad + 1} of {len(losses)} (it goes {path})"
    names = [name for name, value in result.params.items() if not finite(value)]
    return f"the {f'last {unit}' if steps else 'start'} makes {_list(names)} not finite" if names else None


def _in_a_product(products: list[_Product], solve: bool) -> str | None:
    bad = next((place for place, product in enumerate(products) if not product.finite), None)
    if bad is None:
        return None
    step, norm, _ = products[bad]
    whole = len(products) - solve  # a solve is followed by one product with its solution
    if solve and bad == whole:
        name = "the product of the mixed derivative with the linear system's solution"
    elif solve:
        name = f"curvature product {bad + 1} of {whole} in the linear solve"
    else:
        name = f"curvature product {bad + 1} of {whole} on the way back, at inner step {step + 1},"
    if torch.tensor(norm).isfinite():
        return f"{name} is not finite, though its direction is (norm {norm:.4g})"
    if bad == 0:
        return f"the query loss is finite but its gradient is not, and so {name} is not"
    return f"{name} is not finite because its direction is not: what was finite before it grew too large"


def _in_the_gradient(result: Result) -> str:
    names = [name for name, value in (result.grad | result.learned_grad).items() if not finite(value)]
    return f"the query loss is {result.loss.item():.4g}, but its gradient is not finite in {_list(names)}"


CURES = (
    ("the learner's own", "resume from a checkpoint, with a lower outer rate or a clipped gradient"),
    ("holds numbers that are not finite", "repair that data, or leave such batches out with on-nonfinite skip"),
    ("before the first inner step", "look at the scale of that task's data, or leave such batches out with "
     "on-nonfinite skip"),
    ("the support loss is", "lower the inner rate, take fewer inner steps, or clip the inner gradient"),
    ("though its direction is", "give a loss that is twice differentiable there, or take first-order"),
    ("the query loss is finite but its gradient", "give a loss that is differentiable there"),
    ("but its gradient is not finite", "give a loss that is differentiable there"),
    ("the query loss is", "look at the scale of that task's queries, then lower the inner rate"),
)  # fmt: skip


def cure(reason: str | None) -> str:
    """What helps against a fault, as `fault` or a learner's own check words it; None where no task has one."""
    found = (cure for words, cure in CURES if words in (reason or ""))
    return next(found, "lower the inner rate, then the outer one, or clip the gradient")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
