"""Only the head adapts (ANIL, arXiv 1909.09157, 2006.09486), or all but the head does (BOIL, arXiv 2008.08882)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from innerloop.blocks import blocks_of, parameter_names


def head_of(model: nn.Module) -> list[nn.Module]:
    """The model's last part that has parameters: its last block, or its last such child where it names no blocks."""
    blocks = blocks_of(model)
    if blocks is not None:
        return blocks[-1]
    children = [child for child in model.children() if next(child.parameters(), None) is not None]
    if not children:
        raise ValueError(
            f"{type(model).__name__} has no sub-module with parameters to take as head: use Named(...) or Everything()"
        )
    return children[-1:]


@dataclass(frozen=True)
class Head:
    """The last part of the model that has parameters moves, all before it is shared by all tasks."""

    def select(self, model: nn.Module) -> list[str]:
        """The names of the head's parameters."""
        return parameter_names(model, head_of(model))


@dataclass(frozen=True)
class Body:
    """All but the head moves."""

    def select(self, model: nn.Module) -> list[str]:
        """The names of all parameters outside the head.

        Raises:
            ValueError: the model is all head.
        """
        head = set(parameter_names(model, head_of(model)))
        body = [name for name, _ in model.named_parameters() if name not in head]
        if not body:
            raise ValueError(
                f"{type(model).__name__} is all head: there is no body to adapt; use Everything() or Head()"
            )
        return body
