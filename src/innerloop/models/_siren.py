"""Sinusoidal networks for neural fields (Sitzmann et al., arXiv 2006.09661)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from innerloop.models._mlp import MLP


class Sine(nn.Module):
    """``sin(30 x)``."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (30 * inputs).sin()


class SIREN(MLP):
    """An `MLP` with sines between its layers, from coordinates to values: ``SIREN([2, 256, 256, 1])`` is a grey image.

    Args:
        sizes: coordinates, widths of the hidden layers, values. Weights start uniform as published, section 3.2.

    Raises:
        ValueError: as `MLP`.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes, Sine)
        for place, layer in enumerate(each for each in self.modules() if isinstance(each, nn.Linear)):
            bound = math.sqrt(6 / layer.in_features) / 30 if place else 1 / layer.in_features
            nn.init.uniform_(layer.weight, -bound, bound)
