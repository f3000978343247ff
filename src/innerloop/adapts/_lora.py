"""Low-rank factors beside linear layers adapt, the layers do not (LoRA, Hu et al. 2022, arXiv 2106.09685).

    weight'  =  weight + scale * up @ down,     up [out, rank],  down [rank, in]

Only ``up`` and ``down`` move in the inner loop. ``up`` starts at zero, so that the model is at first what it was. Both
starts are meta-parameters, and so are the weights themselves unless they are frozen.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from innerloop.adapts._base import Adapts


class LowRank(nn.Module):
    """``weight -> weight + scale * up @ down``, as a parametrisation of a linear layer."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = scale
        self.down = nn.Parameter(
            torch.randn(rank, inputs, dtype=weight.dtype, device=weight.device) / math.sqrt(inputs)
        )
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.up @ self.down


class LoRA(Adapts):
    """Low-rank factors beside linear layers move: ``LoRA(8)``, ``LoRA(4, "*.query", "*.value")``.

    The learner's copy of the model gets them; what `MetaLearner.adapt` returns has them added to its weights and is a
    plain model again. Freeze the model (``requires_grad_(False)``) where it shall stay as it is and only the factors'
    starts be learned.

    Args:
        rank: of the factors, 1 or more.
        *layers: globs of names of linear layers, as in ``model.named_modules()``; none for all of them.
        scale: factor of their product.

    Raises:
        ValueError: a rank below 1; and at construction of the learner, a glob that matches no linear layer.

    Source:
        LoRA, Hu et al. 2022, arXiv 2106.09685.

    Example:
        >>> il.MetaLearner(model, adapts=il.LoRA(8, "*.query", "classifier"), inner=il.SGD(lr=0.1, steps=5))
    """

    def __init__(self, rank: int, *layers: str, scale: float = 1.0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"LoRA({rank!r}): the rank is a whole number, 1 or more")
        self.rank, self.layers, self.scale = rank, layers, scale

    def __repr__(self) -> str:
        """As it would be typed."""
        scale = [f"scale={self.scale}"] if self.scale != 1 else []
        return f"LoRA({', '.join([str(self.rank), *map(repr, self.layers), *scale])})"

    def prepare(self, model: nn.Module) -> None:
        """Give the linear layers their factors.

        Raises:
            ValueError: a glob matches no linear layer, or there is none.
        """
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for glob in self.layers or ("*",):
            if not any(fnmatchcase(name, glob) for name in linear):
                raise ValueError(
                    f"{self!r}: {glob!r} matches none of the linear layers {', '.join(linear) or '(there are none)'}"
                )
        for name, layer in linear.items():
            if any(fnmatchcase(name, glob) for glob in self.layers or ("*",)) and not _factors(layer):
                parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, self.rank, self.scale))

    def select(self, model: nn.Module) -> list[str]:
        """The names of the factors."""
        held = {id(each) for module in model.modules() if isinstance(module, LowRank) for each in module.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in held]

    def finish(self, model: nn.Module) -> None:
        """Add the factors to the weights."""
        for layer in [module for module in model.modules() if _factors(module)]:
            parametrize.remove_parametrizations(layer, "weight")


def _factors(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(each, LowRank)
        for each in layer.parametrizations.weight  # type: ignore[union-attr]
    )
