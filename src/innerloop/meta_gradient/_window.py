"""Window gradient reuse: one inner gradient, and one curvature product, for every window of inner steps.

Window j holds the steps s_j .. s_j + m_j - 1, with s_j = j * size. Where every step of it applies the gradient taken at
its first point, a window of plain gradient descent is one jump,

    params_{s + m} = params_s - m lr g(params_s, meta)

and back-propagation through the jumps is, from the last window to the first,

    u <- u - m_j lr H(params_{s_j}) u,     grad_meta <- grad_meta - m_j lr B(params_{s_j}) u

both with the u of after the window on the right. With momentum, Adam, decay or learned rates, u is first pulled back
through the window's updates, in all of which the gradient is one and the same variable; what reaches that variable is
what H and B are multiplied with. After Kim, Park and Choi, "Multi-step Estimation for Gradient-based Meta-learning"
(arXiv 2006.04298).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._adjoint import Snapshot, Trail, bend, conclude, judge, outer_weights, pull
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.problem import Batch, End, Steps


@dataclass(frozen=True)
class Window(MetaGradient):
    """Second-order at ``ceil(steps / size)`` curvature products, meta-parameters inside the inner loss included.

    A reconstruction from the abstract of arXiv 2006.04298, all of it that could be read: no replication of its results.

    ``Window(1)`` is exact in both modes. The error grows with ``(size - 1) * lr``, and the estimate is of use while
    ``size * lr * |H|`` stays below 1: beyond it the factors ``1 - size * lr * h`` change sign, and beyond 2 their
    product explodes, even where the ordinary steps converge.

    Evaluation and adaptation take the solver's ordinary steps in both modes: the window belongs to training. To adapt
    by the frozen schedule too, give plain SGD ``size`` times the rate and ``size`` times fewer steps.

    A window's gradient is that of its first step: its batch, where each step has its own, and its random draws.

    Attributes:
        size: steps in a window, 1 or more. Windows start at steps 0, size, 2 * size, ...; the last one is shorter where
            ``size`` does not divide the steps, and a size beyond the steps is one window of them all.
        mode: ``"frozen"`` takes the inner steps themselves with the window's one gradient, and its meta-gradient is the
            exact one of that cheaper procedure; ``support_loss`` in the diagnostics then holds the loss before each
            window, ``[windows]``. ``"true_forward"`` takes ordinary steps, so that loss and adapted parameters are
            those of ``Unrolled``, and differentiates the jumps in their place.

    Raises:
        ValueError: ``size`` below 1, or an unknown mode.

    Example:
        >>> il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=10), meta_gradient=il.Window(5))
    """

    size: int
    mode: Literal["frozen", "true_forward"] = "frozen"

    stepless: ClassVar[str] = "shares one gradient between steps"

    @property
    def reach(self) -> int:
        return self.size

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (isinstance(self.size, int) and self.size >= 1):
            raise ValueError(
                f"Window({self.size!r}): give how many inner steps share one gradient, a whole number from 1"
            )
        if self.mode not in ("frozen", "true_forward"):
            raise ValueError(f"Window(mode={self.mode!r}): choose 'frozen' or 'true_forward'")

    def advice(self, seen: Seen) -> str:
        """Whether the windows are within their safe range."""
        steps = seen.inner.steps
        jump = min(self.size, steps)
        if jump == 1:
            return ""
        if seen.reach is not None and seen.rate is not None and jump * seen.reach > 1:
            return (
                f"outside its safe range: {jump} * lr * |H| = {jump * seen.reach:.3g}, and above 1 a window's factors "
                f"change sign: use window:{max(1, int(1 / seen.reach))} or an inner rate below "
                f"{seen.rate / (jump * seen.reach):.3g}"
            )
        return f"use window:{jump - 1} or a smaller inner rate" if seen.far else ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The window estimate of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given.
        """
        if step_weights is not None:
            raise ValueError(
                "Window goes back from window to window and cannot weigh the query losses of the steps in between: "
                "leave step_weights out, or use Unrolled(), Truncated() or Binomial()"
            )
        outer_weights(loop, query, None)  # refuses a stream that is too short
        spans = windows(loop.steps, self.size)
        if self.mode == "frozen":
            end, kept, support_loss = _jump(loop, spans)
        else:
            trail = Trail(loop, loop.steps[:: self.size])
            end, support_loss = trail.adapt()
            kept = dict(trail.back())
        loss, cotangents, extra = judge(loop, query, loop.steps[-1], end.params, 1.0)
        for span in reversed(spans):
            place = kept.pop(span.start)
            cotangents, grad = pull(loop, span, place, cotangents)
            cotangents = bend(loop, span.start, place.params, cotangents, grad)
        return conclude(loop, cotangents, loss, end, extra, support_loss, len(spans))


def windows(steps: range, size: int) -> list[range]:
    """The steps of each window, in order."""
    return [steps[place : place + size] for place in range(0, len(steps), size)]


def _jump(loop: InnerLoop, spans: Sequence[range]) -> tuple[End, dict[int, Snapshot], Tensor]:
    """Adapt with one gradient a window: the end, the snapshots by step, and the inner loss before each window."""
    if isinstance(loop.support, Steps):
        loop.support.check("support", loop.solver.steps)
    kept, losses = {}, []
    params, state, _, _ = loop.begin
    for span in spans:
        grad, loss = loop.gradient(span.start, params)
        losses.append(loss)
        kept[span.start] = Snapshot(params, state, grad if loop.solver.needs_gradient else params)
        for step in span:
            params, state = loop.update(step, params, grad, state)
    return End(params, state, loop.steps.stop), kept, torch.stack(losses)
