"""SAMA and the one-step differences of DARTS: the last inner step alone, by three first-order passes.

    w     =  d outer_loss / d params  pulled back through the last update, to its gradient           (SGD: -lr times it)
    grad  =  d outer_loss / d meta  +  [ d inner_loss / d meta (params + h w)  -  the same (params - h w) ] / 2 h

with h = epsilon / |w|. The base Jacobian is taken for the identity, and with Adam w has Adam's own derivative. SAMA
(Choe et al., arXiv 2310.05674, the authors' library Betty) takes the differences around the adapted parameters, DARTS
(Liu, Simonyan and Yang, arXiv 1806.09055) around those before the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from innerloop.curvature import pullback
from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import Trail, add, conclude, judge, outer_weights, pull
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch, Tree


@dataclass(frozen=True)
class SAMA(MetaGradient):
    """For meta-parameters inside the inner loss, at two plain gradients more than `FirstOrder` and no product.

    Without a second derivative it goes with fused attention and models that checkpoint themselves. It leaves out all
    steps but the last, so it is biased, and points the right way where a step does most of the work. With
    ``around="step"`` and `SGD` it is ``Truncated(1)`` but for an error of order ``epsilon`` squared, and for the start.

    Attributes:
        epsilon: length of the differences, above 0; 0.01 is of both authors' code.
        around: ``"end"``, SAMA; ``"step"``, DARTS.
        learn_start: True hands the outer gradient to the start, as `FirstOrder` does.

    Raises:
        ValueError: a setting outside its range; in use, ``step_weights``.

    Source:
        Choe et al. 2023, arXiv 2310.05674; Liu, Simonyan and Yang 2019, arXiv 1806.09055.

    Example:
        >>> il.Bilevel(problem, weights_of_data, il.Adam(lr=1e-3, steps=1), il.SAMA(), carry="slot")
    """

    epsilon: float = 0.01
    around: Literal["end", "step"] = "end"
    learn_start: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.epsilon > 0 or self.around not in ("end", "step"):
            raise ValueError(f"{self!r}: give epsilon above 0, and around 'end' or 'step'")

    def advice(self, seen: Seen) -> str:
        """That it sees one step."""
        return "it sees the last inner step alone: use truncated or unrolled" if seen.far else ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The one-step estimate of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given.
        """
        if step_weights is not None:
            raise ValueError("SAMA sees the last inner step alone: leave step_weights out, or use Unrolled()")
        outer_weights(loop, query, None)  # refuses a stream that is too short
        last = loop.steps[-1]
        trail = Trail(loop, loop.steps[-1:])
        end, support_loss = trail.adapt()
        loss, cotangents, extra = judge(loop, query, last, end.params, 1.0)
        ((_, place),) = trail.back()
        pulled, direction = pull(loop, loop.steps[-1:], place, cotangents)
        size = torch.stack([value.square().sum() for value in direction.values()]).sum().sqrt()
        length = self.epsilon / torch.where(size > 0, size, 1.0)
        centre = end.params if self.around == "end" else place.params
        above, below = (
            gradient_in_meta(loop, last, {n: p + sign * length * direction[n] for n, p in centre.items()})
            for sign in (1, -1)
        )
        mixed = {name: (above[name] - below[name]) / (2 * length) for name in above}
        cotangents = cotangents._replace(meta=add(cotangents.meta, mixed), learned=pulled.learned)
        return conclude(loop, cotangents, loss, end, extra, support_loss, 0, self.learn_start)


def gradient_in_meta(loop: InnerLoop, step: int, params: Tree) -> Tree:
    """Gradient of the inner loss in the meta-parameters, with the batch and the random draws of ``step``."""
    value, back = pullback(lambda meta: replace(loop, meta=meta).value(step, params), loop.meta)
    grad: Tree = back(torch.ones_like(value))[0]
    return grad
