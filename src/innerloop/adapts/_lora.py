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
            ValueError: a glob matches no linear layer, or there is none; a layer has other factors already.
        """
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for glob in self.layers or ("*",):
            if not any(fnmatchcase(name, glob) for name in linear):
                raise ValueError(
                    f"{self!r}: {glob!r} matches none of the linear layers {', '.join(linear) or '(there are none)'}"
                )
        for name, layer in linear.items():
            wanted = any(fnmatchcase(name, glob) for glob in self.layers or ("*",))
            held = [(len(each.down), each.scale) for each in _factors(layer)]
            if held and (not wanted or held != [(self.rank, self.scale)]):
                raise ValueError(
                    f"{name} has factors of rank {held[0][0]} and scale {held[0][1]} already, which are not those of "
                    f"{self!r}: give a model without factors, such as adapt() returns"
                )
            if wanted and not held:
                if parametrize.is_parametrized(layer):
                    _class_of_its_own(layer)
                parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, self.rank, self.scale))

    def select(self, model: nn.Module) -> list[str]:
        """The names of the factors."""
        held = {id(each) for module in model.modules() if isinstance(module, LowRank) for each in module.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in held]

    def finish(self, model: nn.Module) -> None:
        """Add the factors to the weights."""
        for layer in [module for module in model.modules() if _factors(module)]:
            weight = nn.Parameter(layer.weight.detach(), requires_grad=False)  # type: ignore[operator]
            _class_of_its_own(layer)
            # in place of the original, which another layer may share, and torch would overwrite
            alone = parametrize.ParametrizationList([nn.Identity()], weight)
            layer.parametrizations.weight = alone  # type: ignore[union-attr]
            parametrize.remove_parametrizations(layer, "weight")


def _class_of_its_own(layer: nn.Module) -> None:
    """Torch keeps a parametrised property on the layer's class, which copies of the layer share."""
    kind = type(layer)
    layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))


def _factors(layer: nn.Module) -> list[LowRank]:
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    return [each for each in layer.parametrizations.weight if isinstance(each, LowRank)]  # type: ignore[union-attr]
