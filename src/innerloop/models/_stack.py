"""The shape that all models of the library share: named blocks in a row."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class Stack(nn.Sequential):
    """An ``nn.Sequential`` of named children, in the order given: the blocks of the model.

    A child without parameters belongs to the block before it. Slices are plain ``nn.Sequential`` modules that share the
    weights, so ``model[:-1]`` is the backbone of a model whose last child is its head.
    """

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(OrderedDict(children))

    def __getitem__(self, idx: slice | int) -> nn.Sequential | nn.Module:
        """Return one child, or a plain ``nn.Sequential`` of several."""
        # nn.Sequential would call the subclass here, whose arguments are widths and not modules.
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[idx]))
        return super().__getitem__(idx)
