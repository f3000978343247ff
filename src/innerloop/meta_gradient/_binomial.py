"""The binomial meta-gradient: of the exact one, every term with at most ``order`` curvature products.

BinomMAML (Zhang, Jaeger Mountain, Li and Giannakis, arXiv 2604.13263). For plain gradient descent the exact
meta-gradient multiplies out to

    grad = [ I + sum_{l = 1}^{steps} sum_{k_1 < ... < k_l} (-lr H_{k_1}) ... (-lr H_{k_l}) ] d outer_loss / d params

and the estimate stops at l = order: 0 is first-order MAML, ``order = steps`` is exact. One walk back is enough, in
which V^(m) holds the terms with at most m products, all V^(m) begin as the outer gradient, and V^(order) is the answer:

    V^(m) <- P_k V^(m) + (H_k, B_k) G_k V^(m-1)          for m = order .. 1,         V^(0) <- P_k V^(0)

P_k pulls cotangents back through the update of step k with its gradient held constant, and G_k gives the cotangent of
that gradient; for plain gradient descent P = I and G = -lr. So momentum, Adam, decay and learned rates need nothing
more, and the gradients of learned rates and of meta-parameters inside the inner loss have the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import Trail, add, conclude, judge, outer_weights, pull, scale
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch, Tree


@dataclass(frozen=True)
class Binomial(MetaGradient):
    """Every inner step contributes, unlike in ``Truncated``; the error is of order ``lr ** (order + 1)``.

    With plain gradient descent, a convex inner loss and ``lr * |H| <= 1`` the error is at most
    ``C(steps, order + 1) * (lr * |H|) ** (order + 1)`` times the outer gradient. Where ``lr * |H|`` is far above 1, a
    low order can be worse than ``FirstOrder``; damping helps there, and hurts where it is below.

    ``reach`` in the diagnostics is the largest ``|lr * H w| / |w|`` over the products taken, which bounds ``lr * |H|``
    from below; above 1, `innerloop.fit` warns.

    It takes ``order * (steps - order + 1)`` curvature products, for orders above 0 never fewer than ``Unrolled``; those
    at one step, up to ``order``, share one gradient.

    Attributes:
        order: most curvature products in a term, 0 or more; beyond the steps it is the steps.
        damping: factor of every curvature product, above 0 and up to 1: terms with l products count ``damping ** l``.
            1 is the paper's formula; ``"released"`` is ``order / steps``, which the authors' published code applies.

    Raises:
        ValueError: a setting outside its range.

    Source:
        BinomMAML, Zhang, Jaeger Mountain, Li and Giannakis 2026, arXiv 2604.13263.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.Binomial(2))
    """

    order: int
    damping: float | Literal["released"] = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (isinstance(self.order, int) and self.order >= 0):
            raise ValueError(f"Binomial({self.order!r}): give the most curvature products in a term, 0 or more")
        if self.damping != "released" and not (isinstance(self.damping, (int, float)) and 0 < self.damping <= 1):
            raise ValueError(f"Binomial(damping={self.damping!r}): give a factor above 0 and up to 1, or 'released'")

    def advice(self, seen: Seen) -> str:
        """Whether the order is within its safe range."""
        if self.order >= seen.inner.steps:
            return ""
        if seen.reach is not None and seen.rate is not None and seen.reach > 1:
            return (
                f"outside its safe range: lr * |H| = {seen.reach:.3g}, and above 1 a low order can be worse than "
                f"first-order: use unrolled, or an inner rate below {seen.rate / seen.reach:.3g}"
            )
        return f"use binomial:{self.order + 1}, or unrolled, which takes no more curvature products" if seen.far else ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The binomial meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        steps, first = loop.solver.steps, loop.steps.start
        order = min(self.order, steps)
        damping = order / steps if self.damping == "released" else self.damping
        weights = outer_weights(loop, query, step_weights)
        trail = Trail(loop, loop.steps)
        end, support_loss = trail.adapt()
        loss, last, extra = judge(loop, query, loop.steps[-1], end.params, weights[-1])
        # Ascending in order. The last one stands for all higher orders until there are steps enough to tell them apart;
        # the first goes once the steps that remain cannot raise it to ``order`` any more.
        vectors, reach = [last], [torch.zeros_like(loss)]
        for step, place in trail.back():
            pulled = [pull(loop, range(step, step + 1), place, vector) for vector in vectors]
            if loop.steps.stop - step <= order:
                pulled.append(pulled[-1])
            product = loop.products(step, place.params)
            products = [product(grad) for _, grad in pulled[:-1]]
            reach += [
                _norm(made) / _norm(vector.params) for (vector, _), (made, _) in zip(pulled, products, strict=False)
            ]
            vectors = [pulled[0][0]] if step - first >= order else []
            for (vector, _), (in_params, in_meta) in zip(pulled[1:], products, strict=True):
                vectors.append(
                    vector._replace(
                        params=add(vector.params, scale(in_params, damping)),
                        meta=add(vector.meta, scale(in_meta, damping)),
                    )
                )
            if step > first and (weight := weights[step - first - 1]):
                early, more, _ = judge(loop, query, step - 1, place.params, weight)
                loss, vectors = loss + early, [add(vector, more) for vector in vectors]
        count = order * (steps - order + 1)
        result = conclude(loop, vectors[-1], loss, end, extra, support_loss, count)
        return result._replace(diagnostics=result.diagnostics | {"reach": torch.stack(reach).max()})


def _norm(tree: Tree) -> Tensor:
    return torch.stack([value.square().sum() for value in tree.values()]).sum().sqrt()
