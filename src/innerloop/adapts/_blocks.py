"""Lambda patterns: chosen blocks adapt (Khabarlak, arXiv 2206.05930).

params^l <- params^l - lr * lambda_l * grad_l,     lambda_l in {0, 1}

or, with a row of bits a step, lambda_{l, step}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from innerloop.adapts._base import Adapts
from innerloop.batch_norm import affine_names
from innerloop.blocks import blocks_of, parameter_names


@dataclass(frozen=True)
class Blocks(Adapts):
    """One character a block, in forward order; a block moves where the pattern has a 1.

    ``Blocks("00001")`` on a five-block model is ``Head()``, ``Blocks("11110")`` is ``Body()``. A table,
    ``Blocks(["11111", "00011"])``, has one row for each inner step, the last for all further ones: here everything
    moves in the first step, then only the last two blocks. A block that stands still in a step keeps its velocity or
    moments; Adam corrects young moments for all steps gone by, those included.

    The blocks are those that the model declares, or, of any other model, the sub-modules that ``parts`` names, in
    forward order; on the first task it is seen whether they are used in that order.

    Attributes:
        pattern: as many of ``0`` and ``1`` as the model has blocks, at least one of them ``1``; or a sequence of such.
        batch_norm: scale and shift of batch norm move with their block. False leaves them out of the inner loop.
        parts: names of sub-modules, as in ``model.named_modules()``, that together hold all parameters of the model.

    Raises:
        ValueError: a pattern holds other characters or no 1, or the rows of a table differ in length; and at
            construction of the learner, a model that names no blocks, or has another number of them.

    Source:
        Lambda patterns, Khabarlak 2022, arXiv 2206.05930.

    Example:
        >>> il.MetaLearner(il.models.Conv4(), adapts=il.Blocks("00011"), inner=il.SGD(lr=0.01, steps=5))
    """

    pattern: str | Sequence[str]
    batch_norm: bool = True
    parts: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the characters; a list will do where a tuple is meant."""
        if not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        if isinstance(self.parts, str):
            raise ValueError(f"Blocks(parts={self.parts!r}): give a list of names, such as ['stem', 'body', 'head']")
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.rows:
            raise ValueError("Blocks([]) has no row: give one for each inner step, such as ['11111', '00011']")
        for row in self.rows:
            if not isinstance(row, str) or not row or set(row) - {"0", "1"}:
                raise ValueError(f"{self!r}: write one 0 or 1 a block, such as '00011'")
            if "1" not in row:
                raise ValueError(f"{self!r} adapts nothing in {row!r}: put a 1 where a block shall move")
            if len(row) != len(self.rows[0]):
                raise ValueError(f"{self!r}: rows of a table have one character a block, all equally many")

    def __repr__(self) -> str:
        """As it would be typed."""
        rows = repr(self.pattern if isinstance(self.pattern, str) else list(self.pattern))
        further = ["batch_norm=False"] if not self.batch_norm else []
        further += [f"parts={list(self.parts)!r}"] if self.parts else []
        return f"Blocks({', '.join([rows, *further])})"

    @property
    def rows(self) -> tuple[str, ...]:
        """The pattern of each step; a single one for all."""
        return (self.pattern,) if isinstance(self.pattern, str) else tuple(self.pattern)

    def select(self, model: nn.Module) -> list[str]:
        """The names of the parameters in the blocks that move in any step.

        Raises:
            ValueError: the model names no blocks, or has another number of them; parts do not hold the model; or the
                blocks are batch norm alone.
        """
        blocks = blocks_for(model, self.parts)
        if len(blocks) != len(self.rows[0]):
            raise ValueError(
                f"{self!r} has {len(self.rows[0])} places but {type(model).__name__} has {len(blocks)} blocks: "
                f"give {len(blocks)} characters"
            )
        parts = [
            part
            for bits, block in zip(zip(*self.rows, strict=True), blocks, strict=True)
            if "1" in bits
            for part in block
        ]
        left_out = set() if self.batch_norm else affine_names(model)
        names = [name for name in parameter_names(model, parts) if name not in left_out]
        if not names:
            raise ValueError(f"{self!r} leaves out all that its blocks hold, which is batch norm: put a 1 elsewhere")
        return names

    def verify(self, model: nn.Module, order: Sequence[nn.Module]) -> None:
        """Refuse parts that are not used in the order in which they are named."""
        last = []
        for name in self.parts:
            inside = {id(module) for module in model.get_submodule(name).modules()}
            used = [place for place, module in enumerate(order) if id(module) in inside]
            last.append((max(used, default=-1), name))
        if sorted(last) != last:
            found = [name for _, name in sorted(last)]
            raise ValueError(f"the forward pass uses the parts in another order: name them so, parts={found!r}")

    def moves(self, model: nn.Module) -> tuple[frozenset[str], ...]:
        """The names of the parameters that move in each step; empty where those are the same in all."""
        if len(set(self.rows)) == 1:
            return ()
        return tuple(frozenset(Blocks(row, self.batch_norm, self.parts).select(model)) for row in self.rows)


def blocks_for(model: nn.Module, names: Sequence[str] = ()) -> list[list[nn.Module]]:
    """The blocks of a model, each a run of sub-modules: those of these names, or those that it declares.

    Raises:
        ValueError: it declares none; there is none of a name, one is without parameters or named twice, or together
            they lack some of the model's.
    """
    if not names:
        if blocks := blocks_of(model):
            return blocks
        children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
        raise ValueError(
            f"{type(model).__name__} does not say what its blocks are: name them in forward order, as in parts="
            f"{children!r}, make it an nn.Sequential, give it an attribute `blocks`, or choose parameters with "
            "Named(...)"
        )
    modules = dict(model.named_modules())
    if odd := [name for name in names if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no part {odd[0]!r}: it has {', '.join(filter(None, modules))}")
    held = [name for part in names for name in parameter_names(model, [modules[part]])]
    if bare := [name for name in names if not parameter_names(model, [modules[name]])]:
        raise ValueError(f"the part {bare[0]!r} holds no parameters: leave it out")
    if len(set(held)) < len(held):
        raise ValueError(f"the parts {list(names)!r} share parameters: name each module once, and none inside another")
    if lacking := [name for name, _ in model.named_parameters() if name not in held]:
        raise ValueError(f"the parts {list(names)!r} lack {lacking[0]} of {type(model).__name__}: name its module too")
    return [[modules[name]] for name in names]
