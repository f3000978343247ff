"""Inner rates that the outer optimiser trains: Meta-SGD and the per-layer per-step rates of MAML++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from innerloop.inner._base import InnerSolver, State
from innerloop.problem import Tree


@dataclass(frozen=True, kw_only=True)
class LearnedRates(InnerSolver):
    """Gradient descent whose rates are meta-parameters, which start at ``lr``: ``params <- params - rate * g``.

    Attributes:
        per: ``"parameter"``: one rate for each entry of each parameter, the same in all steps (Meta-SGD, arXiv
            1707.09835); ``"layer-step"``: one rate for each parameter tensor and step (MAML++, arXiv 1810.09502), where
            steps beyond those of training reuse the last rate.

    The learner's ``rates`` holds them, one tensor a parameter: of the parameter's shape, or ``[steps]``. Estimators
    that differentiate the solution refuse this solver, because a solution does not depend on the rates.

    Example:
        >>> learner = il.MetaLearner(model, inner=il.LearnedRates(lr=0.1, steps=5, per="layer-step"))
        >>> learner.rates
    """

    per: Literal["parameter", "layer-step"] = "parameter"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.per not in ("parameter", "layer-step"):
            raise ValueError(f"LearnedRates(per={self.per!r}): choose 'parameter' or 'layer-step'")
        if not self.steps:
            raise ValueError("LearnedRates(steps=0) learns no rate: give 1 step or more, or SGD(lr=0.1, steps=0)")

    def learned(self, params: Tree) -> Tree:
        """All rates at ``lr``; a schedule's value of each step where rates are a step's own."""
        if self.per == "parameter":
            return {name: torch.full_like(p, self.rate(0, name)) for name, p in params.items()}
        steps = range(self.steps)
        return {name: p.new_tensor([self.rate(step, name) for step in steps]) for name, p in params.items()}

    def largest_rate(self, learned: Tree) -> float | None:
        """The largest of the learned ones."""
        return max(rate.abs().max().item() for rate in learned.values())

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step with the learned rates."""
        grad = self.full_gradient(params, grad, start)
        rates = learned
        if self.per == "layer-step":
            rates = {name: rate[min(step, self.steps - 1)] for name, rate in learned.items()}
        elif odd := [name for name, p in params.items() if p.shape != rates[name].shape]:
            raise ValueError(
                f"LearnedRates has {tuple(rates[odd[0]].shape)} rates for {odd[0]}, which this task has as "
                f"{tuple(params[odd[0]].shape)}: use per='layer-step', or tasks of as many classes as the model"
            )
        return {name: p - rates[name] * grad[name] for name, p in params.items()}, state
