"""The blocks of a model: its parts in the order in which the input passes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import functional_call

from innerloop.problem import Tree


def blocks_of(model: nn.Module) -> list[list[nn.Module]] | None:
    """Split a model into blocks, or return None if it does not say how.

    An ``nn.Sequential`` is the chain of its children; any other module may name its chain by an attribute ``blocks``, a
    sequence of its sub-modules whose composition is the model. Parts without parameters join the block before them (the
    first ones the block after them).
    """
    chain = model if isinstance(model, nn.Sequential) else getattr(model, "blocks", None)
    if not isinstance(chain, (Sequence, nn.ModuleList, nn.Sequential)):
        return None
    blocks: list[list[nn.Module]] = []
    leading: list[nn.Module] = []
    for part in chain:
        if next(part.parameters(), None) is not None:
            blocks.append([*leading, part])
            leading = []
        elif blocks:
            blocks[-1].append(part)
        else:
            leading.append(part)
    return blocks or None


def parameter_names(model: nn.Module, parts: Sequence[nn.Module]) -> list[str]:
    """Names in ``model.named_parameters()`` of the parameters that the parts hold; a shared parameter has one name."""
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


class Chain:
    """A run of a model's parts as a pure function of a tree that is named as the whole model's parameters are.

    Args:
        model: the whole model.
        parts: some of its sub-modules, in order.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.parts = parts
        self._named = [
            (part, {local: names[id(parameter)] for local, parameter in part.named_parameters()}) for part in parts
        ]
        self.names = parameter_names(model, parts)

    def __call__(self, tree: Tree, inputs: Tensor) -> Tensor:
        """Pass the inputs through the parts; parameters that the tree does not name keep their own values."""
        for part, names in self._named:
            values = {local: tree[name] for local, name in names.items() if name in tree}
            inputs = functional_call(part, values, (inputs,))
        return inputs
