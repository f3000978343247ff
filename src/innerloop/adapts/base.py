"""What every choice of adapted parameters answers."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Adapts(Protocol):
    """Which parameters move in the inner loop."""

    def select(self, model: nn.Module) -> list[str]:
        """Names, as in ``model.named_parameters()``, of the parameters that move.

        Frozen parameters (``requires_grad=False``) never move, whatever is selected.

        Raises:
            ValueError: the choice does not fit the model; the message says what would.
        """
        ...
