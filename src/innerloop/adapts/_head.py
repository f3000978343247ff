"""Only the head adapts (ANIL, arXiv 1909.09157, 2006.09486), or all but the head does (BOIL, arXiv 2008.08882)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from innerloop.adapts._base import Adapts
from innerloop.blocks import blocks_of, parameter_names

_NEARLY_ALL = 0.9  # of a model's numbers; a part so large is no head, unless the order of the parts is known


def head_of(model: nn.Module) -> list[nn.Module]:
    """The model's last part that has parameters: its last block, or its last such child where it names no blocks.

    A module with one such child alone is a wrapper: the head is its child's.

    Raises:
        ValueError: there is no such part, or it is all or nearly all of the model.
    """
    inside = model
    while True:
        if blocks := blocks_of(inside):
            head, ordered = blocks[-1], True
            break
        children = [child for child in inside.children() if next(child.parameters(), None) is not None]
        if not children:
            raise ValueError(
                f"{type(model).__name__} has no sub-module with parameters to take as head: use Named(...) or "
                "Everything()"
            )
        if len(children) > 1 or next(inside.parameters(recurse=False), None) is not None:
            head, ordered = children[-1:], False
            break
        inside = children[0]
    mine, every = (sum(p.numel() for p in {*parts}) for parts in (_parameters(head), list(model.parameters())))
    if mine == every or (not ordered and mine > _NEARLY_ALL * every):
        names = parameter_names(model, head)
        raise ValueError(
            f"the head of {type(model).__name__} would be {_glob(names)}, which is {mine:,} of its {every:,} numbers: "
            "name the head yourself, as in Named('classifier.*'), or use Everything()"
        )
    return head


def _parameters(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


def _glob(names: list[str]) -> str:
    """What all names begin with, as a glob."""
    common = names[0].rpartition(".")[0]
    while common and not all(name.startswith(f"{common}.") for name in names):
        common = common.rpartition(".")[0]
    return f"{common}.*" if common else ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _verify(choice: Adapts, model: nn.Module, order: Sequence[nn.Module]) -> None:
    head = {id(module) for part in head_of(model) for module in part.modules()}
    used = [id(module) in head for module in order]
    if used and not used[-1]:
        last = next(name for name, module in model.named_modules() if module is order[-1])
        raise ValueError(
            f"{choice!r} takes {_glob(parameter_names(model, head_of(model)))} for the head of "
            f"{type(model).__name__}, which declares it last, but the forward pass ends in {last}: name what shall "
            f"move, as in Named('{last}.*')"
        )


@dataclass(frozen=True)
class Head(Adapts):
    """The last part of the model that has parameters moves, all before it is shared by all tasks.

    That is the last block of an ``nn.Sequential`` or of what the model declares as ``blocks``, otherwise its last child
    (of a wrapper, its only child's). On the first task it is seen whether the forward pass ends in it.

    Raises:
        ValueError: at construction of the learner, a head that is all or nearly all of the model; on its first task, a
            head in which the forward pass does not end. The message names what was taken; ``Named`` says what is meant.

    Sources:
        ANIL, Raghu et al. 2020, arXiv 1909.09157; its convergence, Ji et al. 2020, arXiv 2006.09486.

    Example:
        >>> il.MetaLearner(model, adapts=il.Head(), inner=il.SGD(lr=0.1, steps=5))
    """

    def select(self, model: nn.Module) -> list[str]:
        """The names of the head's parameters.

        Raises:
            ValueError: nothing in the model is a head; the message says how to name one.
        """
        return parameter_names(model, head_of(model))

    def verify(self, model: nn.Module, order: Sequence[nn.Module]) -> None:
        """Refuse a head in which the forward pass does not end."""
        _verify(self, model, order)


@dataclass(frozen=True)
class Body(Adapts):
    """All but the head moves; see ``Head`` for what that is, and for what is refused.

    Source:
        BOIL, Oh et al. 2021, arXiv 2008.08882.

    Example:
        >>> il.MetaLearner(model, adapts=il.Body(), inner=il.SGD(lr=0.5, steps=1))
    """

    def select(self, model: nn.Module) -> list[str]:
        """The names of all parameters outside the head.

        Raises:
            ValueError: nothing in the model is a head; the message says how to name one.
        """
        head = set(parameter_names(model, head_of(model)))
        return [name for name, _ in model.named_parameters() if name not in head]

    def verify(self, model: nn.Module, order: Sequence[nn.Module]) -> None:
        """Refuse a head in which the forward pass does not end."""
        _verify(self, model, order)
