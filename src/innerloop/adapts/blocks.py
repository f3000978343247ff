"""Lambda patterns: chosen blocks adapt (Khabarlak, arXiv 2206.05930).

params^l <- params^l - lr * lambda_l * grad_l,     lambda_l in {0, 1}
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from innerloop.blocks import blocks_of, parameter_names


@dataclass(frozen=True)
class Blocks:
    """One character a block, in forward order; a block moves where the pattern has a 1.

    ``Blocks("00001")`` on a five-block model is ``Head()``, ``Blocks("11110")`` is ``Body()``.

    Attributes:
        pattern: as many of ``0`` and ``1`` as the model has blocks, at least one of them ``1``.

    Raises:
        ValueError: the pattern holds other characters or no 1.
    """

    pattern: str

    def __post_init__(self) -> None:
        """Check the characters."""
        if not self.pattern or set(self.pattern) - {"0", "1"}:
            raise ValueError(f"Blocks({self.pattern!r}): write one 0 or 1 a block, such as '00011'")
        if "1" not in self.pattern:
            raise ValueError(f"Blocks({self.pattern!r}) adapts nothing: put a 1 where a block shall move")

    def select(self, model: nn.Module) -> list[str]:
        """The names of the parameters in the chosen blocks.

        Raises:
            ValueError: the model names no blocks, or has another number of them.
        """
        blocks = blocks_of(model)
        if blocks is None:
            raise ValueError(
                f"{type(model).__name__} does not say what its blocks are: make it an nn.Sequential, give it an "
                "attribute `blocks` (its sub-modules in forward order), or choose parameters with Named(...)"
            )
        if len(blocks) != len(self.pattern):
            raise ValueError(
                f"Blocks({self.pattern!r}) has {len(self.pattern)} places but {type(model).__name__} has {len(blocks)} "
                f"blocks: give {len(blocks)} characters"
            )
        parts = [part for bit, block in zip(self.pattern, blocks, strict=True) if bit == "1" for part in block]
        return parameter_names(model, parts)
