"""All parameters adapt, as in MAML (arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from innerloop.adapts._base import Adapts


@dataclass(frozen=True)
class Everything(Adapts):
    """Every parameter of the model moves in the inner loop.

    Source:
        MAML, Finn, Abbeel and Levine 2017, arXiv 1703.03400.

    Example:
        >>> il.MetaLearner(model, adapts=il.Everything(), inner=il.SGD(lr=0.01, steps=5))
    """

    def select(self, model: nn.Module) -> list[str]:
        """The names of all parameters."""
        return [name for name, _ in model.named_parameters()]
