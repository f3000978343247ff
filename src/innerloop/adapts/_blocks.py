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

    Attributes:
        pattern: as many of ``0`` and ``1`` as the model has blocks, at least one of them ``1``; or a sequence of such.
        batch_norm: scale and shift of batch norm move with their block. False leaves them out of the inner loop.

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

    def __post_init__(self) -> None:
        """Check the characters; a list will do where a tuple is meant."""
        if not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", tuple(self.pattern))
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
        return f"Blocks({rows})" if self.batch_norm else f"Blocks({rows}, batch_norm=False)"

    @property
    def rows(self) -> tuple[str, ...]:
        """The pattern of each step; a single one for all."""
        return (self.pattern,) if isinstance(self.pattern, str) else tuple(self.pattern)

    def select(self, model: nn.Module) -> list[str]:
        """The names of the parameters in the blocks that move in any step.

        Raises:
            ValueError: the model names no blocks, or has another number of them; or the blocks are batch norm alone.
        """
        blocks = blocks_of(model)
        if blocks is None:
            raise ValueError(
                f"{type(model).__name__} does not say what its blocks are: make it an nn.Sequential, give it an "
                "attribute `blocks` (sub-modules in forward order that hold all its parameters), or choose parameters "
                "with Named(...)"
            )
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

    def moves(self, model: nn.Module) -> tuple[frozenset[str], ...]:
        """The names of the parameters that move in each step; empty where those are the same in all."""
        if len(set(self.rows)) == 1:
            return ()
        return tuple(frozenset(Blocks(row, self.batch_norm).select(model)) for row in self.rows)
