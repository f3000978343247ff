"""A context vector that modulates features, CAVIA's only adapted parameters (Zintgraf et al., arXiv 1810.03642)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FiLM(nn.Module):
    """Scales and shifts features as a context says:  ``h <- (1 + G c) h + B c``,  with c at zero at first.

    Maps ``[examples, features, ...]`` to the same shape. Only ``context``, ``[size]``, is to adapt, from zero in every
    task: ``adapts=Named("*.context")`` and ``Unrolled(learn_start=False)``. G and B, in ``maps``, are meta-learned.
    With the context at zero the layer changes nothing; that form, and that there is no bias, is ours.

    Args:
        size: numbers in the context, 1 or more.
        features: channels of what is modulated.

    Raises:
        ValueError: ``size`` below 1.

    Source:
        Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson 2019, arXiv 1810.03642; FiLM, Perez et al. 2018, arXiv
        1709.07871.

    Example:
        >>> model = il.models.MLP([1, 40, 40, 1], context=5)
        >>> il.MetaLearner(model, il.Named("*.context"), il.SGD(lr=1.0, steps=2), il.Unrolled(learn_start=False))
    """

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"context is {size}: give how many numbers it has, 1 or more, or None")
        self.context = nn.Parameter(torch.zeros(size))
        self.maps = nn.Linear(size, 2 * features, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        scale, shift = self.maps(self.context).view(2, 1, -1, *[1] * (maps.ndim - 2))
        return (1 + scale) * maps + shift
