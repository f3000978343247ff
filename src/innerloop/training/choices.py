"""What the command chooses by a short string beside the four choices: the outer optimiser, its schedule, the model."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from innerloop.choices import Table
from innerloop.models import MLP, Conv4, ResNet12

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
