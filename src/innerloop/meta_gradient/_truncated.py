"""Truncated back-propagation: the meta-gradient with the curvature of the last n inner steps only.

u  =  prod_{k = steps - n}^{steps - 1} (I - lr H(params_k))  d outer_loss / d params

With a random end the inner loop stops after e steps, drawn anew in every meta-step, and e takes the place of steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import walk
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch, Steps
from innerloop.trees import tree_map


@dataclass(frozen=True)
class Truncated(MetaGradient):
    """Cheaper than ``Unrolled`` by the products left out; equal to it if ``horizon`` reaches all steps.

    Before the horizon it is ``FirstOrder``: the inner gradients of those steps count as constants.

    Attributes:
        horizon: of how many of the last steps to take the curvature, 0 or more; ``Truncated(0)`` is ``FirstOrder()``.
        end: ``"last"`` judges the parameters after all steps; ``"random"`` those after e steps, uniform from the
            horizon to all of them, and goes no further. So a window is placed anywhere in a long inner loop (dataset
            distillation by RaT-BPTT). Tasks computed at once share e. ``support_loss`` then has the last ``horizon``
            steps alone.

    Raises:
        ValueError: a negative horizon, an unknown end, or a random one with no horizon; in use, a random end with
            ``step_weights``.

    Sources:
        After Shaban, Cheng, Hatch and Boots 2019, arXiv 1810.10667, whose estimate takes nothing from the steps before
        the horizon. Random ends: Feng, Vedantam and Kempe 2023, arXiv 2311.07025, recalled.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.Truncated(2))
        >>> il.hypergradient(problem, meta, task, il.Adam(lr=1e-3, steps=200), il.Truncated(60, end="random"))
    """

    horizon: int
    end: Literal["last", "random"] = "last"

    stays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        if self.horizon < 0:
            raise ValueError(
                f"Truncated({self.horizon}): give how many of the last inner steps to differentiate, 0 or more"
            )
        if self.end not in ("last", "random") or (self.end == "random" and not self.horizon):
            raise ValueError(f"{self!r}: choose end='last', or end='random' with a horizon of 1 or more")

    @property
    def draws(self) -> bool:
        """Whether the end is random."""
        return self.end == "random"

    @property
    def reach(self) -> int:
        return self.horizon

    def advice(self, seen: Seen) -> str:
        """Whether the steps left out matter."""
        left_out = seen.inner.steps - self.horizon
        if not seen.far or left_out <= 0:
            return ""
        return f"the {left_out} steps left out matter: use truncated:{self.horizon + 1} or unrolled"

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The truncated meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        if self.end == "last":
            return walk(loop, query, step_weights, horizon=self.horizon)
        if step_weights is not None:
            raise ValueError(f"{self!r} judges the parameters at one random step: leave step_weights out")
        least = min(self.horizon, loop.solver.steps)
        last = random.Random(f"{loop.seed} {loop.begin.step}").randint(least, loop.solver.steps)
        support, query = (_first(batch, last) for batch in (loop.support, query))
        loop = replace(loop, support=support, solver=replace(loop.solver, steps=last))
        result = walk(loop, query, horizon=self.horizon)
        shown = {"support_loss": result.diagnostics["support_loss"][-least:]}  # of one shape in all meta-steps
        return result._replace(diagnostics=result.diagnostics | shown)


def _first(batch: Batch, steps: int) -> Batch:
    """Of a batch for every step, those of the first steps."""
    if not isinstance(batch, Steps) or callable(batch.rows):
        return batch
    return Steps(tree_map(lambda leaf: leaf[:steps], batch.rows))
