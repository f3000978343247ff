"""The head begins at the ridge regression of the support set's classes on its features (R2-D2, arXiv 1805.08136).

With X and Y, features and one-hot classes of the n support examples less their means x and y,

    W = X' (X X' + regularisation * trace(X X') / n  I)^-1 Y,     weight = scale W',     bias = scale (y - W' x)

X X' is n by n: a solve costs little, however wide the features are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.start._base import Start, members


@dataclass(frozen=True)
class Ridge(Start):
    """Before any inner step the head is the solution of ridge regression, in closed form.

    The regularisation is relative to the spread of the features, so that it means the same for all of them. It and the
    scale are fixed here; the paper learns both. The paper appends a constant feature in place of subtracting means.

    Attributes:
        regularisation: of the regression, above 0.
        scale: of the scores, above 0. Regression aims at 0 and 1, between which cross-entropy tells too little.

    Raises:
        ValueError: a setting outside its range; and as `Prototypes`.

    Source:
        R2-D2, Bertinetto, Henriques, Torr and Vedaldi 2018, arXiv 1805.08136.

    Example:
        >>> il.MetaLearner(model, adapts=il.Head(), inner=il.SGD(lr=0.1, steps=0), start=il.Ridge())
    """

    regularisation: float = 0.1
    scale: float = 10.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (self.regularisation > 0 and self.scale > 0):
            raise ValueError(f"{self!r}: give a regularisation and a scale above 0")

    def head(self, features: Tensor, targets: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """See ``Start.head``."""
        with torch.autocast(features.device.type, enabled=False):  # a solve needs float32 or more
            x = features.to(torch.promote_types(features.dtype, torch.float32))
            y, n = members(targets, ways, x), len(x)
            middle, share = x.mean(0), y.mean(0)
            x, y = x - middle, y - share
            gram = x @ x.mT
            penalty = self.regularisation * gram.diagonal().mean().clamp(min=1e-12)
            weight = torch.linalg.solve(gram + penalty * torch.eye(n, dtype=x.dtype, device=x.device), y).mT @ x
            return self.scale * weight, self.scale * (share - weight @ middle)
