"""What every choice of adapted parameters answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Adapts:
    """Which parameters move in the inner loop; subclass it and write ``select``."""

    def prepare(self, model: nn.Module) -> None:
        """Change the learner's own copy of the model before all else: parameters that it adds may then be selected.

        Raises:
            ValueError: the choice does not fit the model.
        """

    def finish(self, model: nn.Module) -> None:
        """Take back what ``prepare`` changed, in a model that was adapted and is handed out."""

    def select(self, model: nn.Module) -> list[str]:
        """Names, as in ``model.named_parameters()``, of the parameters that move.

        Frozen parameters (``requires_grad=False``) never move, whatever is selected.

        Raises:
            ValueError: the choice does not fit the model; the message says what would.
        """
        raise NotImplementedError

    def moves(self, model: nn.Module) -> Sequence[frozenset[str]]:
        """The names of the parameters that move in inner step 0, 1, ...; empty where those are the same in all."""
        return ()

    def verify(self, model: nn.Module, order: Sequence[nn.Module]) -> None:
        """Refuse a choice that turns out wrong once the model has been run on real inputs.

        Args:
            model: the model.
            order: its sub-modules that hold parameters of their own, in order of their last use.

        Raises:
            ValueError: the choice is not what its name says; the message says how to say what is meant.
        """
