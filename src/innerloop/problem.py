"""The bilevel statement that every method of the library differentiates, and nothing else.

minimise over meta   mean over tasks i of  outer_loss(params_i, meta, query_i)
where params_i is what an inner solver makes of  inner_loss(params, meta, support_i),  started at start(meta)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tree = dict[str, Tensor]
"""Parameters by name. Estimators and solvers map trees to trees and never look at the names."""

Batch = Any
"""What a loss reads besides parameters; for few-shot learning a pair (inputs, targets)."""


class Task(NamedTuple):
    """One few-shot task, or a batch of them: then every tensor has a leading task dimension.

    Attributes:
        support: inputs ``[ways * shots, ...]`` and targets ``[ways * shots]`` (integers below ``ways``, or values to
            regress), the examples that the inner loop learns from.
        query: the same for the examples that judge the adapted parameters.
    """

    support: Any
    query: Any

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """Move every tensor to ``device`` and the floating ones to ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=True)

        return torch.utils._pytree.tree_map(move, self)


@dataclass(frozen=True)
class Problem:
    """A bilevel problem for one task, as three pure functions over trees.

    Attributes:
        start: ``start(meta) -> params``, where the inner solver begins.
        inner_loss: ``inner_loss(params, meta, support) -> scalar``, what the inner solver lowers.
        outer_loss: ``outer_loss(params, meta, query) -> scalar``, what the meta-parameters are judged by. It may return
            ``(scalar, extra)`` instead; ``extra``, any tree of tensors, then comes back in the result.
        seed: where the inner loss draws random numbers (dropout), a seed for them: step ``k`` always draws from
            ``seed + k``, so that a step recomputed is the same step. None if the inner loss draws none.
        moves: where not all parameters move in all inner steps, the names of those that do in step 0, 1, ...; the last
            holds for all further steps. The others stand still in that step, and their part of the solver's state too.
    """

    start: Callable[[Tree], Tree]
    inner_loss: Callable[[Tree, Tree, Batch], Tensor]
    outer_loss: Callable[[Tree, Tree, Batch], Any]
    seed: int | None = None
    moves: tuple[frozenset[str], ...] = ()
