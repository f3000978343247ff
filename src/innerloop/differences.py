"""Products by central differences of plain gradients: for models that have no second derivative.

    H w  ~  (g(p + e w) - g(p - e w)) / 2e,      B w  ~  (g_meta(p + e w) - g_meta(p - e w)) / 2e

with g and g_meta the gradients of the inner loss in its parameters p and in the meta-parameters. Two gradients a
product, at the memory of one. The step is the largest that moves no tensor by more than a share h of its length:

    e = h / max_t |w_t| / max(|p_t|, sqrt(n_t) r),      r the root mean square of all p,   n_t the entries of tensor t

with r = 1 where all p are 0.

The error is of order h^2 (of the third derivatives) and of order epsilon / h (of rounding), so h = epsilon^(1/3) by
default: 5e-3 in float32 and 6e-6 in float64. On transformers and smooth networks that leaves relative errors of 3e-5 to
2e-4, and 1e-10 to 1e-7. Where the loss is not smooth, with ReLU or max-pool, differences see the kinks and products do
not: no step will do.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop.curvature import gradient, in_transform, judged, replayed
from innerloop.problem import Batch, Engine, Problem, Tree

EVERY = 100  # products between two estimates of the error
LARGE = 1e-2  # an estimated error from which a warning is due

_log = logging.getLogger("innerloop")


@dataclass(frozen=True, kw_only=True)
class Differences(Engine):
    """Products without second derivatives: fused attention, models that checkpoint themselves or are compiled.

    Not exact. The first product of a problem, and every hundredth, is taken with the double step too; by how much the
    two differ, relative to the product, is an estimate of the error, and errs on the large side. It is logged, left in
    ``problem.known.error``, and warned of where it is above 1 %.

    Attributes:
        step: h above, the share of a tensor's length that it moves by at most; None takes the cube root of the
            precision, of autocast's where that is on.

    Raises:
        ValueError: ``step`` that is not above 0.

    Example:
        >>> learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=5), products="differences")
        >>> learner.meta_step(batch), learner.problem.known.error
    """

    step: float | None = None

    second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range."""
        if self.step is not None and not self.step > 0:
            raise ValueError(f"Differences(step={self.step}): give a share above 0, or None")

    def gradient(self, problem: Problem, params: Tree, meta: Tree, support: Batch, step: int) -> tuple[Tree, Tensor]:
        return gradient(replace(problem, engine=None), params, meta, support, step)

    def judge(self, problem: Problem, params: Tree, meta: Tree, query: Batch) -> tuple[Tensor, Any, Tree, Tree]:
        return judged(replace(problem, engine=None), params, meta, query)

    def products(
        self, problem: Problem, params: Tree, meta: Tree, support: Batch, step: int, *, mixed: bool, keep: bool
    ) -> Callable[[Tree], tuple[Tree, Tree]]:
        def both(at: Tree) -> list[Tensor]:
            with replayed(problem.seed, step, params):
                return _gradients(problem, at, meta, support, mixed)

        def difference(direction: Tree, size: Tensor) -> list[Tensor]:
            found = both({name: value + size * direction[name] for name, value in params.items()})
            other = both({name: value - size * direction[name] for name, value in params.items()})
            return [(ahead - behind) / (2 * size) for ahead, behind in zip(found, other, strict=True)]

        def product(direction: Tree) -> tuple[Tree, Tree]:
            size = self._size(params, direction)
            found = difference(direction, size)
            if not in_transform():
                if problem.known.differences % EVERY == 0:
                    _estimate(problem, found, difference(direction, 2 * size))
                problem.known.differences += 1
            in_params = dict(zip(params, found, strict=False))
            return in_params, dict(zip(meta, found[len(params) :], strict=True)) if mixed else {}

        return product

    def _size(self, params: Tree, direction: Tree) -> Tensor:
        """The e of a direction."""
        first = next(iter(params.values()))
        share = self.step
        if share is None:
            lower = torch.is_autocast_enabled(first.device.type)
            dtype = torch.get_autocast_dtype(first.device.type) if lower else first.dtype
            share = torch.finfo(dtype).eps ** (1 / 3)
        entries = sum(value.numel() for value in params.values())
        typical = torch.stack([value.square().sum() for value in params.values()]).sum().div(entries).sqrt()
        typical = torch.where(typical > 0, typical, 1.0)
        moved = [
            direction[name].norm() / torch.maximum(value.norm(), value.numel() ** 0.5 * typical)
            for name, value in params.items()
        ]
        tiny = torch.finfo(first.dtype).tiny ** 0.5
        return share / torch.stack(moved).nan_to_num(tiny).amax().clamp(min=tiny)


def _gradients(problem: Problem, params: Tree, meta: Tree, support: Batch, mixed: bool) -> list[Tensor]:
    """Those of the inner loss in the parameters, and then in the meta-parameters."""
    if in_transform():
        grads = torch.func.grad(problem.inner_loss, argnums=(0, 1))(params, meta, support)
        return [*grads[0].values(), *(grads[1].values() if mixed else ())]
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    given = {name: value.detach().requires_grad_() for name, value in meta.items()} if mixed else meta
    with torch.enable_grad():
        loss = problem.inner_loss(leaves, given, support)
    wanted = [*leaves.values(), *(given.values() if mixed else ())]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def _estimate(problem: Problem, found: list[Tensor], wider: list[Tensor]) -> None:
    """Leave, log and, where it is large, tell the estimate of the relative error."""
    apart = sum(float((one - other).square().sum()) for one, other in zip(found, wider, strict=True))
    length = sum(float(one.square().sum()) for one in found)
    error = (apart / length) ** 0.5 if length else 0.0
    problem.known.error = error
    _log.info("products by differences have a relative error of about %.1e", error)
    if not error <= LARGE:
        warnings.warn(
            f"products by differences have a relative error of about {error:.1e} here: use products='autograd' or "
            "'blocks', a network without ReLU and max-pool, float64, or Differences(step=...)",
            stacklevel=2,
        )
