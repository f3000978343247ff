"""What can be chosen by a short string such as ``truncated:2``: one table a choice, one row a name.

Behind the colon come the arguments of what the name stands for, separated by commas, by place or as ``name=value``:
``blocks:00011``, ``named:block4.*,head.*``, ``sgd:momentum=0.9,nesterov=true``.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from innerloop.adapts import Blocks, Body, Everything, Head, Named
from innerloop.inner import SGD, Adam, LearnedRates, Momentum, NewtonCG
from innerloop.linear import CG
from innerloop.meta_gradient import (
    Binomial,
    FirstOrder,
    Implicit,
    MemoryReduced,
    Mixed,
    Reptile,
    Truncated,
    Unrolled,
    Window,
)
from innerloop.models import MLP, Conv4, ResNet12

Table = Mapping[str, Callable[..., Any]]


def blocks(pattern: str, batch_norm: bool = True) -> Blocks:
    """``Blocks``, so that a table can be typed, ``blocks:11111/00011``: a row for each inner step."""
    rows = pattern.split("/")
    return Blocks(rows if len(rows) > 1 else pattern, batch_norm)


def learned_rates(per: str = "parameter", **options: Any) -> LearnedRates:
    """``LearnedRates``, so that ``learned-rates:layer-step`` can be typed."""
    return LearnedRates(per=per, **options)  # type: ignore[arg-type]  # an unknown one is refused there


def adam(beta1: float = 0.9, beta2: float = 0.999, **options: Any) -> Adam:
    """``Adam``, so that ``adam:beta1=0`` can be typed."""
    return Adam(betas=(beta1, beta2), **options)


def implicit(proximal: float = 2.0, iterations: int = 5) -> Implicit:
    """``Implicit`` with so many iterations of conjugate gradient."""
    return Implicit(proximal, CG(iterations))


def memory_reduced(l2: float = 0.05, iterations: int = 20, warm_start: str = "none") -> MemoryReduced:
    """``MemoryReduced`` with so many iterations of conjugate gradient."""
    if warm_start == "task":
        raise ValueError(
            "memory-reduced:warm_start=task resumes tasks that come again, and those of a training stream never do: "
            "choose slot or none, or call MetaLearner.meta_step with task_ids in a training loop of your own"
        )
    return MemoryReduced(CG(iterations), l2, warm_start)  # type: ignore[arg-type]  # an unknown one is refused there


def mixed(*unweighted: str, **weights: str) -> Mixed:
    """``Mixed``, typed as ``mixed:1=0.2,5=0.8``: horizons and their weights."""
    try:
        if unweighted or not weights:
            raise ValueError
        shares = {int(horizon): float(weight) for horizon, weight in weights.items()}
    except ValueError:
        given = [*unweighted, *(f"{horizon}={weight}" for horizon, weight in weights.items())]
        raise ValueError(f"mixed takes horizon=weight, as in mixed:1=0.2,5=0.8, not {','.join(given)!r}") from None
    return Mixed(tuple(shares), tuple(shares.values()))


ADAPTS: Table = {"everything": Everything, "head": Head, "body": Body, "blocks": blocks, "named": Named}
INNER: Table = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": adam,
    "learned-rates": learned_rates,
    "newton-cg": NewtonCG,
}
META_GRADIENT: Table = {
    "unrolled": Unrolled,
    "truncated": Truncated,
    "first-order": FirstOrder,
    "reptile": Reptile,
    "window": Window,
    "binomial": Binomial,
    "mixed": mixed,
    "implicit": implicit,
    "memory-reduced": memory_reduced,
}

# LBFGS calls back for the loss, SparseAdam and Muon take only some kinds of parameters.
OPTIMIZER: Table = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}


def constant() -> Callable[[float], float]:
    """The outer rate as it is given."""
    return lambda progress: 1.0


def cosine(floor: float = 0.0) -> Callable[[float], float]:
    """The outer rate falls along half a cosine to ``floor`` times what was given."""
    return lambda progress: floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def linear(floor: float = 0.0) -> Callable[[float], float]:
    """The outer rate falls evenly to ``floor`` times what was given."""
    return lambda progress: floor + (1 - floor) * (1 - min(progress, 1.0))


SCHEDULE: Table = {"constant": constant, "cosine": cosine, "linear": linear}
"""The outer rate's factor as a function of the share of the steps done."""


def conv4(
    shape: tuple[int, ...], outputs: int, filters: int = 32, downsample: str | None = None, **options: Any
) -> nn.Module:
    """``Conv4`` for images ``(channels, height, width)``; as in the papers, grey ones are halved by strides."""
    channels, size = _image(shape)
    downsample = downsample or ("stride" if channels == 1 else "pool")
    return Conv4(channels, outputs, filters, downsample, size, **options)  # type: ignore[arg-type]  # checked there


def resnet12(shape: tuple[int, ...], outputs: int, filters: int = 64) -> nn.Module:
    """``ResNet12`` whose blocks have 1, 2.5, 5 and 10 times ``filters`` channels."""
    channels, _ = _image(shape)
    return ResNet12(channels, outputs, widths=[round(times * filters) for times in (1, 2.5, 5, 10)])


def mlp(shape: tuple[int, ...], outputs: int, filters: int = 40) -> nn.Module:
    """``MLP`` with two hidden layers of ``filters`` units; images are flattened."""
    network = MLP([math.prod(shape), filters, filters, outputs])
    if len(shape) == 1:
        return network
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **dict(network.named_children())))


def _image(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 3:
        raise ValueError(f"this model takes images, not inputs of shape {list(shape)}; choose model 'mlp'")
    return shape[0], shape[-1]


MODEL: Table = {"conv4": conv4, "resnet12": resnet12, "mlp": mlp}


def make(what: str, table: Table, text: str, *args: Any, **options: Any) -> Any:
    """Build what ``text`` chooses from a table.

    Args:
        what: what is chosen, for messages.
        table: names and what they stand for.
        text: ``name`` or ``name:arguments``.
        *args: first arguments, which are not to be typed.
        **options: further arguments; those that are None are left out.

    Raises:
        ValueError: an unknown name, or arguments that it does not take; and whatever is refused at construction.
    """
    name, _, rest = text.partition(":")
    check_name(what, name, table)
    typed = [part.strip() for part in rest.split(",") if part.strip()]
    named = dict(part.split("=", 1) for part in typed if "=" in part)
    places = [part for part in typed if "=" not in part]
    options = {key: value for key, value in options.items() if value is not None}
    signature = inspect.signature(table[name])
    try:
        bound = signature.bind(*args, *places, **named, **options)
    except TypeError as error:
        taken = list(signature.parameters)[len(args) :]
        raise ValueError(f"{what} {text!r}: {error}; {name} takes {', '.join(taken) or 'no arguments'}") from error
    for key, value in bound.arguments.items():
        if isinstance(value, str) and signature.parameters[key].annotation != "str":
            bound.arguments[key] = _number(value)
    return table[name](*bound.args, **bound.kwargs)


def check_name(what: str, name: str, names: Iterable[str]) -> None:
    """Raise ValueError where a name is not among those known, and say which is nearest."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{what} {name!r} is unknown: {hint}choose one of {', '.join(names)}")


def _number(text: str) -> Any:
    """A number or boolean as JSON writes it; any other text stays text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
