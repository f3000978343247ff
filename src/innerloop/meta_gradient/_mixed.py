"""A convex mixture of truncated meta-gradients, all of them from one walk (Bonnet et al., arXiv 2111.00206).

    grad  =  sum_n c_n grad^(n),     grad^(n) = Truncated(n)'s,     sum_n c_n = 1

Short horizons are biased, long ones noisy where inner batches or environments are random; the mixture trades the two.
Every grad^(n) is what the walk back to the longest horizon holds after n steps, carried on without curvature, so that
all cost what the longest does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import Trail, add, bend, conclude, judge, outer_weights, pull, scale
from innerloop.meta_gradient._base import MetaGradient, Result
from innerloop.problem import Batch


@dataclass(frozen=True)
class Mixed(MetaGradient):
    """The sum of ``weights[i] * Truncated(horizons[i])``, at the cost of the longest horizon.

    Attributes:
        horizons: through how many of the last steps to go back, each 0 or more and no two alike. Where the inner loop
            has fewer steps, all of them.
        weights: one for each horizon, 0 or more, with sum 1.

    Raises:
        ValueError: horizons or weights outside these ranges.

    Source:
        Bonnet et al. 2021, arXiv 2111.00206.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), meta_gradient=il.Mixed((1, 5), (0.2, 0.8)))
    """

    horizons: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the ranges; lists will do where tuples are meant."""
        object.__setattr__(self, "horizons", tuple(self.horizons))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.horizons or any(not isinstance(n, int) or n < 0 for n in self.horizons):
            raise ValueError(f"Mixed(horizons={self.horizons}): give one or more numbers of last steps, each 0 or more")
        if len(set(self.horizons)) < len(self.horizons):
            raise ValueError(f"Mixed(horizons={self.horizons}): a horizon occurs twice; add up its weights")
        if len(self.weights) != len(self.horizons):
            raise ValueError(f"Mixed has {len(self.horizons)} horizons and {len(self.weights)} weights: give one each")
        if not all(weight >= 0 for weight in self.weights) or not math.isclose(sum(self.weights), 1.0, rel_tol=1e-6):
            raise ValueError(f"Mixed(weights={self.weights}): each must be 0 or more, and their sum 1")

    @property
    def reach(self) -> int:
        return max(self.horizons)

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The mixed meta-gradient of one task; arguments as in ``MetaGradient.estimate``."""
        steps = loop.solver.steps
        shares: dict[int, float] = {}
        for horizon, weight in zip(self.horizons, self.weights, strict=True):
            reached = min(horizon, steps)
            shares[reached] = shares.get(reached, 0.0) + weight
        weights, last = outer_weights(loop, query, step_weights), loop.steps[-1]
        trail = Trail(loop, loop.steps)
        end, support_loss = trail.adapt()
        loss, exact, extra = judge(loop, query, last, end.params, weights[-1])
        # the estimates whose horizon is behind, summed: on they go without curvature
        done = shares.get(0, 0.0)
        mixed = scale(exact, done)
        for step, place in trail.back():
            span = range(step, step + 1)
            mixed, _ = pull(loop, span, place, mixed)
            back = last + 1 - step
            if back <= max(shares):
                exact, grad = pull(loop, span, place, exact)
                exact = bend(loop, step, place.params, exact, grad)
            if step > loop.steps.start and (weight := weights[steps - back - 1]):
                early, more, _ = judge(loop, query, step - 1, place.params, weight)
                loss, exact, mixed = loss + early, add(exact, more), add(mixed, scale(more, done))
            if share := shares.get(back):
                mixed, done = add(mixed, scale(exact, share)), done + share
        return conclude(loop, mixed, loss, end, extra, support_loss, max(shares))
