"""All parameters adapt, as in MAML (arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from innerloop.adapts._base import Adapts


@dataclass(frozen=True)
class Everything(Adapts):
    """Every parameter of the model moves in the inner loop."""

    def select(self, model: nn.Module) -> list[str]:
        """The names of all parameters."""
        return [name for name, _ in model.named_parameters()]
