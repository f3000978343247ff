"""Evolution strategies over meta-parameters, and their persistent form for windows of a long inner loop.

    grad  =  1 / (2 n s^2)  sum_i  xi_i ( F(meta + e_i) - F(meta - e_i) ),        e_i normal, of deviation s,    n pairs

F is the outer loss after the inner loop. ES (after ES-MAML, Song et al., arXiv 1910.01215) has xi_i = e_i. Persistent
ES (PES, Vicol, Metz and Sohl-Dickstein, arXiv 2112.13835) takes the inner loop in windows, one a meta-step. Every
particle meta +- e_i goes on from where it was itself left, and xi_i sums the particle's e_i over all windows so far.
So the sum of the estimates over the windows is that of the whole loop, without the bias of truncation. Both formulas
are reconstructed, and checked against exact gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from innerloop.curvature import dense
from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import add, scale
from innerloop.meta_gradient._base import MetaGradient, Result, Seen, without_products
from innerloop.meta_gradient._forward import draw, refuse_many
from innerloop.meta_gradient._unrolled import unroll
from innerloop.problem import Batch, End
from innerloop.trees import tree_map


@dataclass(frozen=True)
class EvolutionStrategies(MetaGradient):
    """Needs values alone: for inner loops without a derivative, or so long and rough that theirs is of no use.

    It is unbiased for the outer loss smoothed by the noise. With d meta-parameters and a small ``sigma`` its variance
    is (d + 1) / pairs times the squared length of the gradient. It runs the inner loop ``2 * pairs + 1`` times, at the
    memory of one step, and keeps no snapshot.

    Attributes:
        pairs: n, 1 or more.
        sigma: s, above 0. Differences of values below a few times rounding are noise: stay above 1e-3 in float32.
        persistent: PES: the particles are carried from call to call, with ``begin=`` or a learner's ``carry=``. They
            take ``2 * pairs`` copies of parameters and solver state.
        most: meta-parameters above which it refuses, those of a learned inner solver counted.

    Raises:
        ValueError: a setting outside its range; in use, more meta-parameters than ``most``.

    Source:
        Song et al. 2020, arXiv 1910.01215; Vicol, Metz and Sohl-Dickstein 2021, arXiv 2112.13835.

    Example:
        >>> estimator = il.EvolutionStrategies(pairs=8, sigma=0.01, persistent=True)
        >>> il.Bilevel(problem, {"log rate": torch.zeros(())}, il.SGD(lr=0.1, steps=10), estimator, carry="slot")
    """

    pairs: int = 8
    sigma: float = 0.01
    persistent: bool = False
    most: int = 1000

    through_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.pairs < 1 or self.most < 1 or not self.sigma > 0:
            raise ValueError(f"{self!r}: give pairs and most of 1 or more, and sigma above 0")

    def advice(self, seen: Seen) -> str:
        """That it is noise."""
        return "one draw of it is mostly noise: use more pairs, more tasks or unrolled" if seen.far else ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The estimate of one task; arguments as in ``MetaGradient.estimate``."""
        given = dense((loop.meta, loop.learned))
        refuse_many(self, given, self.most, f"its variance is (d + 1) / {self.pairs} times the gradient's square")
        loss, (support_loss, *reached, extra) = unroll(loop, query, step_weights)(*given)
        total: Any = None
        left = []
        for number in range(self.pairs):
            noise = draw(loop, number, given, torch.randn_like)
            weight, particles = noise, [(loop, self.sigma), (loop, -self.sigma)]
            if self.persistent and loop.begin.solution:
                before, *places = loop.begin.solution["particles"][number]
                weight = add(noise, before)
                particles = [
                    (replace(loop, begin=End(params, state, loop.begin.step)), deviation)
                    for (params, state), (_, deviation) in zip(places, particles, strict=True)
                ]
            values, ends = [], []
            for particle, deviation in particles:
                value, (_, *end, _) = unroll(particle, query, step_weights)(*add(given, scale(noise, deviation)))
                values.append(value)
                ends.append(tuple(end))
            slope = (values[0] - values[1]) / (2 * self.sigma * self.pairs)
            part = tree_map(lambda value, slope=slope: slope * value, weight)
            total = part if total is None else add(total, part)
            left.append((weight, *ends))
        end = End(reached[0], reached[1], loop.steps.stop, {"particles": left} if self.persistent else {})
        return without_products(total, loss, support_loss, extra, end)
