"""Truncated back-propagation: the meta-gradient with the curvature of the last n inner steps only.

u  =  prod_{k = steps - n}^{steps - 1} (I - lr H(params_k))  d outer_loss / d params
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import walk
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch


@dataclass(frozen=True)
class Truncated(MetaGradient):
    """Cheaper than ``Unrolled`` by the products left out; equal to it if ``horizon`` reaches all steps.

    Before the horizon it is ``FirstOrder``: the inner gradients of those steps count as constants.

    Attributes:
        horizon: of how many of the last steps to take the curvature, 0 or more; ``Truncated(0)`` is ``FirstOrder()``.

    Raises:
        ValueError: a negative horizon.

    Source:
        After Shaban, Cheng, Hatch and Boots 2019, arXiv 1810.10667, whose estimate takes nothing from the steps before
        the horizon.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.Truncated(2))
    """

    horizon: int

    stays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        if self.horizon < 0:
            raise ValueError(
                f"Truncated({self.horizon}): give how many of the last inner steps to differentiate, 0 or more"
            )

    def advice(self, seen: Seen) -> str:
        """Whether the steps left out matter."""
        left_out = seen.inner.steps - self.horizon
        if not seen.far or left_out <= 0:
            return ""
        return f"the {left_out} steps left out matter: use truncated:{self.horizon + 1} or unrolled"

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The truncated meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        return walk(loop, query, step_weights, horizon=self.horizon)
