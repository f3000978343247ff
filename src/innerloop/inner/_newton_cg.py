"""Newton's method without a Hessian in memory, the inner solver of iMAML-HF (arXiv 1909.04630).

    s  ~  -(H + (proximal + weight_decay) I)^-1 grad G             by a few conjugate gradients
    params <- params + t s,    t the first of lr, lr / 2, lr / 4, ...  with  G(params + t s) <= G(params) + c t s.grad G

G is the inner loss with weight decay and proximal term, H the Hessian of the inner loss, and c = 1e-4 (Armijo's rule).
The paper has five conjugate gradients and a line search; that it halves, and stops by this rule, is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.inner._base import InnerSolver, Probe, State
from innerloop.linear import CG, solve_tree
from innerloop.problem import Tree

_ARMIJO = 1e-4
# Units of rounding error by which the loss may seem to rise: near the solution nothing else is left of a decrease.
_ROUNDING = 10


@dataclass(frozen=True, kw_only=True)
class NewtonCG(InnerSolver):
    """Converges in a handful of steps where gradient descent takes hundreds.

    A step costs ``iterations`` curvature products and ``trials`` evaluations of the loss, and is no differentiable
    update: use it with ``Implicit``, which differentiates the solution. Where the direction meets
    negative curvature it is what was found before that, or the gradient; where no trial is short enough the parameters
    stay, and the next step tries on from there.

    Attributes:
        lr: the first length that the line search tries.
        iterations: conjugate gradients a step, 1 or more.
        trials: lengths that the line search tries in a step, each half the last, 1 or more.

    Source:
        The inner solver of iMAML-HF, Rajeswaran et al. 2019, arXiv 1909.04630; our line search halves by Armijo's rule.

    Example:
        >>> il.MetaLearner(model, inner=il.NewtonCG(steps=3, proximal=2.0), meta_gradient=il.Implicit())
    """

    lr: float = 1.0  # checked below
    iterations: int = 5
    trials: int = 8

    differentiable: ClassVar[bool] = False
    counts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not isinstance(self.lr, (int, float)) or self.clip is not None or self.moves:
            raise ValueError(
                "NewtonCG chooses its own step for all parameters together: give lr as a number, without clip or "
                "moves, or use SGD, Momentum or Adam"
            )
        for field in ("iterations", "trials"):
            if getattr(self, field) < 1:
                raise ValueError(f"NewtonCG({field}={getattr(self, field)}): give 1 or more")

    def init(self, params: Tree) -> State:
        """The length to try first."""
        return next(iter(params.values())).new_full((), self.lr)

    def advance(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree, probe: Probe
    ) -> tuple[Tree, State]:
        """One direction and its line search."""
        grad = self.full_gradient(params, grad, start)
        direction, _ = solve_tree(
            CG(self.iterations),
            probe.hessian(params),
            {name: -g for name, g in grad.items()},
            shift=self.weight_decay + self.proximal,
        )

        def moved(length: Tensor) -> Tree:
            return {name: p + length * direction[name] for name, p in params.items()}

        def objective(at: Tree) -> Tensor:
            decay = sum(p.square().sum() for p in at.values())
            distance = sum((p - start[name]).square().sum() for name, p in at.items())
            return probe.value(at) + self.weight_decay / 2 * decay + self.proximal / 2 * distance

        here = objective(params)
        slack = _ROUNDING * torch.finfo(here.dtype).eps * here.abs()
        slope = torch.stack([(g * direction[name]).sum() for name, g in grad.items()]).sum()
        length, found = torch.zeros_like(here), torch.zeros_like(here, dtype=torch.bool)
        for trial in range(self.trials):
            candidate = state * 0.5**trial
            enough = objective(moved(candidate)) <= here + _ARMIJO * candidate * slope + slack
            length = torch.where(enough & ~found, candidate, length)
            found = found | enough
        return moved(length), torch.where(found, self.lr, state * 0.5**self.trials)
