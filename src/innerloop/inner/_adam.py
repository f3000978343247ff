"""Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101) inside the inner loop, safe to differentiate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from innerloop.inner._base import InnerSolver, State
from innerloop.problem import Tree


@dataclass(frozen=True, kw_only=True)
class Adam(InnerSolver):
    """``params <- params - lr * m_hat / (sqrt(v_hat) + eps)``, torch.optim.Adam's formula with moments that start at 0.

    The square root has an infinite slope at 0, where a gradient that is exactly zero puts it; there its derivative is
    taken as 0, so that no NaN reaches the meta-gradient.

    Attributes:
        betas: decay of the first and the second moment, each from 0 up to, not including, 1. Reptile's authors use
            a first one of 0.
        eps: added to the root, above 0. The meta-gradient of an entry whose gradient vanishes is of the order of
            ``lr / eps`` times its curvature: raise it where that is too much.

    Source:
        Kingma and Ba 2015, arXiv 1412.6980.

    Example:
        >>> il.Adam(lr=1e-3, steps=5, betas=(0.0, 0.999))
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Adam(betas={self.betas}): each must be at least 0 and below 1")
        if not self.eps > 0:
            raise ValueError(f"Adam(eps={self.eps}): must be above 0")

    def init(self, params: Tree) -> State:
        """Zero moments."""
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return {"mean": zeros, "square": dict(zeros)}

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step of Adam."""
        grad = self.full_gradient(params, grad, start)
        first, second = self.betas
        mean = {name: first * state["mean"][name] + (1 - first) * g for name, g in grad.items()}
        square = {name: second * state["square"][name] + (1 - second) * g * g for name, g in grad.items()}
        new = {}
        for name, p in params.items():
            moment = square[name] / (1 - second ** (step + 1))
            root = torch.where(moment > 0, torch.where(moment > 0, moment, 1.0).sqrt(), 0.0)
            rate = self.rate(step, name)
            kept = 1 - rate * self.weight_decay if self.decoupled else 1.0
            new[name] = kept * p - rate * mean[name] / (1 - first ** (step + 1)) / (root + self.eps)
        return new, {"mean": mean, "square": square}


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW: ``params <- (1 - lr * weight_decay) * params - ...``.

    Its weight decay is no term of the inner loss; estimators that differentiate the solution refuse it.

    Attributes:
        betas: as in ``Adam``.
        eps: as in ``Adam``.

    Source:
        Loshchilov and Hutter 2019, arXiv 1711.05101.

    Example:
        >>> il.AdamW(lr=1e-3, steps=2, weight_decay=0.01, clip=1.0)
    """

    decoupled: ClassVar[bool] = True
