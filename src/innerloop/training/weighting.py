"""How much each task of a batch counts: a function ``weights(losses, ids, step)``, for ``fit(task_weights=...)``.

It is given the query losses after adaptation, ``[tasks]``, the tasks' numbers in the training stream and the outer
step, and gives ``[tasks]``, constants. One that remembers has ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = Callable[[Tensor, Sequence[int], int], Tensor]


def by_loss(power: float = 1.0) -> Weights:
    """Weights in proportion to a power of the losses: above 0 hard tasks count more, below 0 easy ones.

    Example:
        >>> il.fit(learner, tasks, steps=1000, task_weights=il.by_loss(2.0))
    """
    return lambda losses, ids, step: (power * losses.double().clamp(min=1e-30).log()).softmax(0)


class SPSA:
    """Weights learned by simultaneous perturbation, from the losses alone (Boiarov et al., arXiv 2110.13188).

        L(w) = mean_i( l_i / w_i^2 + log w_i^2 ),         task i counts in proportion to 1 / w_i^2
        w  <-  w - a d (L(w + b d) - L(w - b d)) / (2 b),        d = +-1,  a = rate n^-1/6,  b = reach n^-1/24

    L is least where w_i^2 = l_i, so that hard tasks count less. The authors' code begins at w = 1 / tasks with
    rate 0.25 and reach 15, where over 99 % of the difference is the logarithm's, and the losses hardly show. Here w
    begins at 1 and stays above 2 ``reach``; that and both defaults are ours.

    Args:
        keys: what has a weight: ``keys(id)`` names a task's, of which it takes the mean, such as its classes, ``lambda
            each: tasks.class_names("train", each, 1)[0]``. None: the place in the batch, as published, which says
            nothing of a task that is drawn at random.
        rate: a at first, above 0.
        reach: b at first, above 0.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, keys: Callable[[int], Sequence[Hashable]] | None = None, rate: float = 0.02, reach: float = 0.05
    ) -> None:
        if not (rate > 0 and reach > 0):
            raise ValueError(f"SPSA: rate is {rate} and reach {reach}; both must be above 0")
        self.keys, self.rate, self.reach = keys, rate, reach
        self.w: dict[Hashable, float] = {}

    def __call__(self, losses: Tensor, ids: Sequence[int], step: int) -> Tensor:
        """The weights by what is known so far; then w takes its step."""
        mine: list[list[Any]] = [
            [place] if self.keys is None else list(self.keys(each)) for place, each in enumerate(ids)
        ]
        names = list(dict.fromkeys(name for each in mine for name in each))
        share = torch.tensor([[each.count(name) / len(each) for name in names] for each in mine], dtype=torch.float64)
        w = torch.tensor([self.w.get(name, 1.0) for name in names], dtype=torch.float64)
        given = losses.detach().to("cpu", torch.float64)

        def total(w: Tensor) -> Tensor:
            squares = (share @ w).square()
            return (given / squares + squares.log()).mean()

        draw = torch.randint(0, 2, w.shape, generator=torch.Generator().manual_seed(step)).double() * 2 - 1
        reach, rate = self.reach * (step + 1) ** (-1 / 24), self.rate * (step + 1) ** (-1 / 6)
        slope = (total(w + reach * draw) - total(w - reach * draw)) / (2 * reach)
        if slope.isfinite():
            self.w |= zip(names, (w - rate * slope * draw).clamp(min=2 * self.reach).tolist(), strict=True)
        counts = (share @ w).square().reciprocal()
        return counts / counts.sum()

    def state_dict(self) -> dict[str, Any]:
        """What has been learned."""
        return {"w": dict(self.w)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.w = dict(state["w"])
