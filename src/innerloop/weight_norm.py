"""Weight norm by its formula: torch's own kernel has a wrong second derivative, which holds the norms constant.

weight  =  g * v / |v|
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm


class Formula(_WeightNorm):
    """What ``torch.nn.utils.parametrizations.weight_norm`` registers, right in every derivative."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """As torch's own."""
        axes = range(weight_v.ndim)
        over = [axis for axis in axes if self.dim == -1 or axis != axes[self.dim]]  # -1 is torch's word for all of them
        norms = torch.linalg.vector_norm(weight_v, dim=over, keepdim=True) if over else weight_v.abs()
        return weight_v * (weight_g / norms)


def refuse(module: nn.Module) -> None:
    """Refuse torch's own where a caller's loss would call it.

    Raises:
        ValueError: a part has torch's weight norm.
    """
    if any(type(each) is _WeightNorm for each in module.modules()):
        raise ValueError(
            "meta holds torch's weight_norm, whose second derivative is wrong: compute g * v / v.norm() in the module, "
            "or give the model to il.MetaLearner, which does so"
        )


def convert(model: nn.Module) -> None:
    """Let weight norm go by its formula; each parametrisation stays the object that it is."""
    for module in model.modules():
        if type(module) is _WeightNorm:
            module.__class__ = Formula


def to_torch(model: nn.Module) -> None:
    """Undo `convert`."""
    for module in model.modules():
        if type(module) is Formula:
            module.__class__ = _WeightNorm  # type: ignore[assignment]
