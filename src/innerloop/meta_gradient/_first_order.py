"""First-order MAML (arXiv 1703.03400, 1803.02999): every inner gradient counts as a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import walk
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch


@dataclass(frozen=True)
class FirstOrder(MetaGradient):
    """No curvature product at all: the outer gradient at the adapted parameters is handed to the start.

    What the update does apart from the inner gradient (weight decay, the proximal term, learned rates) is
    differentiated exactly. Meta-parameters that only the inner loss reads get zero, with one warning that names them:
    use ``Unrolled`` or ``Truncated`` for those.

    Sources:
        Finn, Abbeel and Levine 2017, arXiv 1703.03400; Nichol, Achiam and Schulman 2018, arXiv 1803.02999.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.FirstOrder())
    """

    second_order: ClassVar[bool] = False
    stays: ClassVar[bool] = True

    def advice(self, seen: Seen) -> str:
        """How large what is left out is."""
        if not seen.far:
            return ""
        big = "" if seen.reach is None else f" of size steps * lr * |H| = {seen.inner.steps * seen.reach:.3g}"
        return f"it leaves out terms{big}: use unrolled or truncated, or a smaller inner rate"

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The first-order meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        return walk(loop, query, step_weights, horizon=0)
