"""What every inner solver is: a rule that turns parameters and a gradient into new parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from innerloop.problem import Tree

State = Any
"""What a solver carries from step to step: any tree of tensors, empty for plain gradient descent."""


class Probe(NamedTuple):
    """What a solver may ask of the inner loss at one step, beyond the gradient it is given.

    Attributes:
        value: ``value(params) -> scalar``, the loss anywhere.
        hessian: ``hessian(params, direction) -> tree``, a product with the Hessian there.
    """

    value: Callable[[Tree], Tensor]
    hessian: Callable[[Tree, Tree], Tree]


@dataclass(frozen=True, kw_only=True)
class InnerSolver:
    """Settings that all gradient-based inner solvers share.

    The gradient that enters the update is that of the inner loss plus two optional terms,

        g + weight_decay * params + proximal * (params - start),

    the second being iMAML's pull towards the start (arXiv 1909.04630). Both are differentiated exactly.

    Attributes:
        lr: step size, above 0.
        steps: inner steps in meta-training, 1 or more.
        test_steps: inner steps in evaluation and adaptation; None takes ``steps``.
        weight_decay: weight of the decay term, 0 or more.
        proximal: weight of the proximal term, 0 or more.

    Raises:
        ValueError: a setting outside its range.
    """

    lr: float
    steps: int
    test_steps: int | None = None
    weight_decay: float = 0.0
    proximal: float = 0.0

    needs_gradient: ClassVar[bool] = False
    """Whether an update's derivative depends on the gradient's value, so that going back needs the gradients kept."""

    differentiable: ClassVar[bool] = True
    """Whether a step is an ``update``, which can be differentiated; if not, only its result can."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        name = type(self).__name__
        if not self.lr > 0:
            raise ValueError(f"{name}(lr={self.lr}): the inner rate must be above 0")
        if self.steps < 1:
            raise ValueError(f"{name}(steps={self.steps}): at least one inner step is needed")
        if self.test_steps is not None and self.test_steps < 0:
            raise ValueError(
                f"{name}(test_steps={self.test_steps}): give 0 or more, or None for as many as in training"
            )
        for field in ("weight_decay", "proximal"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{name}({field}={getattr(self, field)}): must be 0 or more")

    @property
    def adaptation_steps(self) -> int:
        """Inner steps outside meta-training."""
        return self.steps if self.test_steps is None else self.test_steps

    def learned(self, params: Tree) -> Tree:
        """First values of what the solver itself has to learn, by name; nothing for most solvers."""
        return {}

    def init(self, params: Tree) -> State:
        """The state before the first step."""
        return {}

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step: a pure function of its arguments, elementwise, differentiable in all of them.

        Args:
            step: index of the step, from 0.
            params: the parameters before the step.
            grad: gradient of the inner loss there.
            state: as ``init`` or the last ``update`` gave it.
            learned: the solver's own meta-parameters, as named by ``learned``.
            start: where the inner loop began, the centre of the proximal term.

        Returns:
            New parameters and new state.
        """
        raise NotImplementedError

    def advance(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree, probe: Probe
    ) -> tuple[Tree, State]:
        """One step as the inner loop takes it: ``update``, but for solvers that look beyond the gradient."""
        return self.update(step, params, grad, state, learned, start)

    def full_gradient(self, params: Tree, grad: Tree, start: Tree) -> Tree:
        """The gradient with weight decay and the proximal term."""
        if self.weight_decay:
            grad = {name: g + self.weight_decay * params[name] for name, g in grad.items()}
        if self.proximal:
            grad = {name: g + self.proximal * (params[name] - start[name]) for name, g in grad.items()}
        return grad
