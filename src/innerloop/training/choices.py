"""What the command chooses by a short string beside the four choices: the outer optimiser, its schedule, the model."""

from __future__ import annotations

import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from innerloop.choices import Table
from innerloop.models import MLP, Conv4, ResNet12

SKIPS = 10  # batches left out in a row after which training stops
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

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
    _check_floor(floor)
    return lambda progress: floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def linear(floor: float = 0.0) -> Callable[[float], float]:
    """The outer rate falls evenly to ``floor`` times what was given."""
    _check_floor(floor)
    return lambda progress: floor + (1 - floor) * (1 - min(progress, 1.0))


def _check_floor(floor: float) -> None:
    if not 0 <= floor <= 1:
        raise ValueError(f"the schedule's floor is {floor}; it is a share of the outer rate, from 0 to 1")


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


def mlp(shape: tuple[int, ...], outputs: int, filters: int = 40, context: int | None = None) -> nn.Module:
    """``MLP`` with two hidden layers of ``filters`` units; images are flattened."""
    network = MLP([math.prod(shape), filters, filters, outputs], context=context)
    if len(shape) == 1:
        return network
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **dict(network.named_children())))


def _image(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 3:
        raise ValueError(f"this model takes images, not inputs of shape {list(shape)}; choose model 'mlp'")
    return shape[0], shape[-1]


MODEL: Table = {"conv4": conv4, "resnet12": resnet12, "mlp": mlp}


def seconds(text: str) -> float | None:
    """The seconds of a time such as ``90s``, ``10m`` or ``1h``; None where it is none."""
    found = re.fullmatch(r"(\d+\.?\d*)([smh])", text, re.ASCII)
    return float(found[1]) * UNITS[found[2]] if found and float(found[1]) > 0 else None


def interval(text: str) -> tuple[float, float]:
    """Steps and seconds between checkpoints, one of them infinite.

    Raises:
        ValueError: it is neither a number of steps nor a time.
    """
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text), math.inf
    if (time := seconds(text)) is not None:
        return math.inf, time
    raise ValueError(f"checkpoint-every is {text!r}; give steps, such as 500, or a time, such as 90s, 10m or 1h")


def most_skips(text: str) -> int:
    """How many batches in a row may be left out: of ``stop``, ``skip`` or ``skip:N``.

    Raises:
        ValueError: it is none of them.
    """
    word, _, number = text.partition(":")
    if text in ("stop", "skip"):
        return SKIPS if word == "skip" else 0
    if word == "skip" and number.isascii() and number.isdecimal() and int(number) > 0:
        return int(number)
    raise ValueError(f"on-nonfinite is {text!r}; give stop, skip, or skip:N for at most N batches in a row")
