"""Parameters chosen by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from innerloop.adapts._base import Adapts


class Named(Adapts):
    """The parameters whose names match any of some globs move: ``Named("layer4.*", "*.bias")``.

    Args:
        *globs: patterns as the shell writes them, matched against names as in ``model.named_parameters()``.

    Raises:
        ValueError: no glob is given; and at construction of the learner, a glob that matches no parameter.

    Example:
        >>> il.MetaLearner(model, adapts=il.Named("classifier.*"), inner=il.SGD(lr=0.1, steps=5))
    """

    def __init__(self, *globs: str) -> None:
        if not globs:
            raise ValueError("Named() adapts nothing: give one or more globs, such as Named('head.*')")
        self.globs = globs

    def __repr__(self) -> str:
        """As it would be typed."""
        return f"Named({', '.join(map(repr, self.globs))})"

    def __eq__(self, other: object) -> bool:
        """Whether the globs are the same."""
        return isinstance(other, Named) and self.globs == other.globs

    def __hash__(self) -> int:
        return hash(self.globs)

    def select(self, model: nn.Module) -> list[str]:
        """The names that match.

        Raises:
            ValueError: a glob matches no parameter.
        """
        names = [name for name, _ in model.named_parameters()]
        for glob in self.globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(f"{self!r}: {glob!r} matches none of the parameters {', '.join(names)}")
        return [name for name in names if any(fnmatchcase(name, glob) for glob in self.globs)]
