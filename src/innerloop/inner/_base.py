"""What every inner solver is: a rule that turns parameters and a gradient into new parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop.problem import Tree, refuse_kinds, short_repr

State = Any
"""What a solver carries from step to step: any tree of tensors, empty for plain gradient descent."""

Rate = float | Callable[[int], float]

# Every solver's docstring ends in these.
_SHARED = """
    Shared by all inner solvers:
        lr: the inner rate, above 0: a number; a schedule ``step -> rate``; or either for groups of parameters, by globs
            of their names: ``{"head.*": 0.1, "*": 0.01}``, of which the first that matches counts.
        steps: inner steps in meta-training; 0 where a start makes the head (`Prototypes`).
        test_steps: inner steps in evaluation and adaptation; None takes ``steps``.
        weight_decay: w of the term ``w / 2 |params|^2`` that joins the inner loss, 0 or more.
        proximal: p of the term ``p / 2 |params - start|^2``, iMAML's pull towards the start (arXiv 1909.04630), 0 or
            more. Both terms are differentiated exactly.
        clip: largest norm of the inner loss's gradient over all parameters together; a longer one is shortened to it,
            as ``torch.nn.utils.clip_grad_norm_`` does, before the two terms are added. None clips nothing.
        minibatch: how many support examples a step sees, drawn by a seed of its own; every example is seen once before
            any is seen again. None, or no fewer than there are, shows all of them in every step, in order. Every tensor
            of the support set has the examples in its first dimension. Meta-parameters of single examples are read by
            an index in the batch: ``meta["belief"][batch["index"]]``.
        moves: where not all parameters move in all steps, the names of those that do in step 0, 1, ...; the last
            holds for all further steps. The others stand still, and their part of the solver's state too.

    Raises:
        ValueError: a setting outside its range.
"""


class Probe(NamedTuple):
    """What a solver may ask of the inner loss at one step, beyond the gradient it is given.

    Attributes:
        value: ``value(params) -> scalar``, the loss anywhere.
        hessian: ``hessian(params)`` gives ``direction -> tree``, products with the Hessian there.
    """

    value: Callable[[Tree], Tensor]
    hessian: Callable[[Tree], Callable[[Tree], Tree]]


RULES = "update", "advance", "rate", "full_gradient"  # methods that a step consists of


@dataclass(frozen=True, kw_only=True)
class InnerSolver:
    """A rule for inner steps, with the settings that all rules share; subclass it and write ``update``.

    A subclass is a frozen dataclass with keyword-only fields. Its own docstring is completed by the shared settings.
    """

    lr: Rate | Mapping[str, Rate]
    steps: int
    test_steps: int | None = None
    weight_decay: float = 0.0
    proximal: float = 0.0
    clip: float | None = None
    minibatch: int | None = None
    moves: Sequence[Collection[str]] = ()

    linear: ClassVar[bool] = False
    """Whether an update is linear in the gradient, so that its derivative does not depend on the gradient's value."""

    differentiable: ClassVar[bool] = True
    """Whether a step is an ``update``, which can be differentiated; if not, only its result can."""

    counts: ClassVar[bool] = True
    """Whether ``update`` reads the number of the step, but for ``lr``; like ``linear``, said anew with a new rule."""

    decoupled: ClassVar[bool] = False
    """Whether weight decay shrinks the parameters beside the gradient (AdamW) instead of being a term of the loss."""

    def __init_subclass__(cls) -> None:
        """Complete the docstring, and show what differs from the defaults."""
        refuse_kinds(cls)
        if "__repr__" not in vars(cls):
            cls.__repr__ = short_repr  # type: ignore[method-assign]  # here, so that dataclass makes none
        for fact, cautious in (("counts", True), ("linear", False)):  # what a parent says is of its own rule
            says = next(kind for kind in cls.__mro__ if fact in vars(kind))
            if any(getattr(cls, rule) is not getattr(says, rule, None) for rule in RULES):
                setattr(cls, fact, cautious)
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{_SHARED}"

    def __post_init__(self) -> None:
        """Check the ranges."""
        name = type(self).__name__
        rates = list(self.lr.values()) if isinstance(self.lr, Mapping) else [self.lr]
        if not rates or not all(callable(rate) or (_number(rate) and rate > 0) for rate in rates):
            raise ValueError(f"{name}(lr={self.lr!r}): the inner rate must be a number above 0, a schedule or a dict")
        for field, least in (("steps", 0), ("test_steps", 0), ("minibatch", 1)):
            value = getattr(self, field)
            if not (isinstance(value, int) and value >= least) and (value is not None or field == "steps"):
                raise ValueError(f"{name}({field}={value!r}): give a whole number of {least} or more")
        for field in ("weight_decay", "proximal"):
            if not (_number(getattr(self, field)) and getattr(self, field) >= 0):
                raise ValueError(f"{name}({field}={getattr(self, field)!r}): must be a number, 0 or more")
        if self.clip is not None and not (_number(self.clip) and self.clip > 0):
            raise ValueError(f"{name}(clip={self.clip!r}): give the largest norm of a gradient, above 0, or None")
        if not all(self.moves):
            raise ValueError(f"{name}(moves={self.moves!r}): a row in which nothing moves; name parameters in each")
        object.__setattr__(self, "moves", tuple(frozenset(row) for row in self.moves))

    @property
    def needs_gradient(self) -> bool:
        """Whether going back through a step needs its gradient's value."""
        return not self.linear or self.clip is not None

    @property
    def timeless(self) -> bool:
        """Whether all steps are alike, whatever their number."""
        rates = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return not (self.counts or self.moves or any(callable(rate) for rate in rates))

    @property
    def adaptation_steps(self) -> int:
        """Inner steps outside meta-training."""
        return self.steps if self.test_steps is None else self.test_steps

    def check_names(self, names: Collection[str]) -> None:
        """Refuse globs of ``lr`` that match no parameter, parameters that no glob matches, and unknown ``moves``.

        Raises:
            ValueError: so.
        """
        if unknown := frozenset[str]().union(*map(frozenset, self.moves)) - frozenset(names):
            raise ValueError(f"moves names {', '.join(sorted(unknown))}, which is no parameter of the inner problem")
        if isinstance(self.lr, Mapping):
            for name in names:
                self.rate(0, name)
            for glob in self.lr:
                if not any(fnmatchcase(name, glob) for name in names):
                    raise ValueError(
                        f"{type(self).__name__}(lr=...): {glob!r} matches none of {', '.join(names)}: correct it, or "
                        "leave it out"
                    )

    def rates(self) -> list[float]:
        """The rates of all groups in all training steps."""
        groups: Any = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return [rate(step) if callable(rate) else rate for rate in groups for step in range(self.steps)]

    def rate(self, step: int, name: str) -> float:
        """The inner rate of a parameter in a step.

        Raises:
            ValueError: no glob of ``lr`` matches the name.
        """
        rate: Any = self.lr
        if isinstance(rate, Mapping):
            rate = next((value for glob, value in rate.items() if fnmatchcase(name, glob)), None)
            if rate is None:
                raise ValueError(
                    f"{type(self).__name__}(lr=...) names no rate for {name!r}: add it, or '*' for all others, to "
                    f"{', '.join(map(repr, self.lr))}"  # type: ignore[arg-type]
                )
        return rate(step) if callable(rate) else rate

    def largest_rate(self, learned: Tree) -> float | None:
        """The largest rate of any parameter and step; None where a step is no rate times a gradient."""
        return None

    def learned(self, params: Tree) -> Tree:
        """First values of what the solver itself has to learn, by name; nothing for most solvers."""
        return {}

    def init(self, params: Tree) -> State:
        """The state before the first step."""
        return {}

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step: a pure function of its arguments, differentiable in all of them.

        Args:
            step: index of the step, from 0.
            params: the parameters before the step.
            grad: gradient of the inner loss there.
            state: as ``init`` or the last ``update`` gave it.
            learned: the solver's own meta-parameters, as named by ``learned``.
            start: the centre of the proximal term, where the inner loop began.

        Returns:
            New parameters and new state.
        """
        raise NotImplementedError

    def pull_back(self, step: int, cotangent: Tree) -> tuple[Tree, Tree, Tree] | None:
        """Cotangents of parameters, gradient and start from that of the new parameters.

        An update that is linear and has no state may write this, which spares recording it. The start's are ``{}``
        where nothing reaches it. None leaves all to autograd.
        """
        return None

    def advance(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree, probe: Probe
    ) -> tuple[Tree, State]:
        """One step as the inner loop takes it: ``update``, but for solvers that look beyond the gradient."""
        return self.update(step, params, grad, state, learned, start)

    def full_gradient(self, params: Tree, grad: Tree, start: Tree) -> Tree:
        """The gradient, clipped, with weight decay and the proximal term."""
        if self.clip is not None:
            square = torch.stack([g.square().sum() for g in grad.values()]).sum()
            # the root has an infinite slope at 0, where nothing is clipped
            norm = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
            factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            grad = {name: factor * g for name, g in grad.items()}
        if self.weight_decay and not self.decoupled:
            grad = {name: g + self.weight_decay * params[name] for name, g in grad.items()}
        if self.proximal:
            grad = {name: g + self.proximal * (params[name] - start[name]) for name, g in grad.items()}
        return grad


def _number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)
