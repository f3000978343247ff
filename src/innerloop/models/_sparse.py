"""Layers whose weights are normal and drive themselves to zero: B-SMALL (Madan and Prasad, arXiv 2101.00203).

    log a  =  2 s - 2 log |mu|,  within -10 .. 10             mu the mean of a weight, s the logarithm of its deviation
    training:    y  =  mu x  +  e sqrt(exp(2 s) x^2)  +  b,   e ~ N(0, 1) for each output;    x^2 is elementwise
    evaluation:  y  =  (mu where log a < 3, else 0) x  +  b
    divergence   =  - sum [ 0.63576 sigmoid(1.8732 + 1.48695 log a) - log(1 + 1 / a) / 2 ]

Read off the authors' code. Inner and outer loss take a weight times the divergence; theirs grows from 2e-6 to 1e-5.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _log_alpha(mean: Tensor, log_std: Tensor) -> Tensor:
    return (2 * log_std - 2 * (mean.abs() + 1e-8).log()).clamp(-10, 10)


def _forward(layer: Any, inputs: Tensor, run: Any) -> Tensor:
    if not layer.training:
        kept = _log_alpha(layer.weight, layer.log_std) < 3
        return run(inputs, torch.where(kept, layer.weight, 0.0), layer.bias)
    mean, variance = run(inputs, layer.weight, layer.bias), run(inputs.square(), (2 * layer.log_std).exp(), None)
    return mean + torch.randn_like(mean) * (variance + 1e-8).sqrt()


class SparseLinear(nn.Linear):
    """``nn.Linear`` with normal weights, of mean ``weight``; made by `sparse`."""

    def forward(self, inputs: Tensor) -> Tensor:
        return _forward(self, inputs, F.linear)


class SparseConv2d(nn.Conv2d):
    """``nn.Conv2d`` likewise."""

    def forward(self, inputs: Tensor) -> Tensor:
        return _forward(self, inputs, self._conv_forward)


def sparse(model: nn.Module) -> nn.Module:
    """A copy of a model in which the weights of all linear layers and 2-d convolutions are normal.

    Each has a parameter ``log_std`` beside ``weight``, -8 at first; both adapt and are meta-learned like others. Noise
    is drawn while the model trains, and a step that is computed again draws the same.

    Raises:
        ValueError: the model has no such layer.

    Example:
        >>> model = il.models.sparse(il.models.Conv4(in_channels=1))
        >>> learner = il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=5), regulariser=il.models.Divergence(1e-5))
        >>> il.models.sparsity(learner.model)
    """
    model = copy.deepcopy(model)
    kinds = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
    layers: list[Any] = [layer for layer in model.modules() if type(layer) in kinds]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no plain linear layer or 2-d convolution to make sparse")
    for layer in layers:
        layer.__class__ = kinds[type(layer)]
        layer.log_std = nn.Parameter(torch.full_like(layer.weight, -8.0))
    return model


class Divergence:
    """A weight, 0 or more, times the divergence of all sparse layers: a learner's ``regulariser``.

    Losses that training reports hold it, some five times the weight for each of the layers' weights at first.
    """

    def __init__(self, weight: float) -> None:
        if not weight >= 0:
            raise ValueError(f"Divergence({weight}): give a weight of 0 or more, such as 1e-5")
        self.weight = weight

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Of the parameters of a model, by name."""
        parts = [0.63576 * (1.8732 + 1.48695 * a).sigmoid() - F.softplus(-a) / 2 for a in _ratios(params)]
        return -self.weight * torch.stack([part.sum() for part in parts]).sum()


def sparsity(model: nn.Module) -> float:
    """The share of the sparse layers' weights that evaluation leaves out."""
    return torch.cat([(a >= 3).flatten() for a in _ratios(dict(model.named_parameters()))]).float().mean().item()


def _ratios(params: Mapping[str, Tensor]) -> list[Tensor]:
    names = [name.removesuffix("log_std") for name in params if name.endswith("log_std")]
    return [_log_alpha(params[f"{name}weight"], params[f"{name}log_std"]) for name in names]
