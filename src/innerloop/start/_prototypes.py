"""The head begins at the class means of the support set's features (ProtoNet, Proto-MAML).

    weight_c = 2 mean_c,                              bias_c = - |mean_c|^2
    weight_c = scale / length  mean_c / |mean_c|,     bias_c = 0                           with cosine=True

length is the mean length of the support set's features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from innerloop.start._base import Start, members


@dataclass(frozen=True)
class Prototypes(Start):
    """Before any inner step the model is a ProtoNet: scores are minus the squared distances to the class means.

    They are so but for a term that all classes share. With ``cosine`` they are, up to the length of the query's
    features, ``scale`` times the cosine to the class mean: the classes are ranked as by the cosine.

    Attributes:
        cosine: whether to rank by the cosine instead of the distance.
        scale: of the cosines; above 0.

    Raises:
        ValueError: at construction of the learner, a model without an adapted linear layer that has weight and bias; in
            use, a support batch for every step (`Steps`).

    Sources:
        ProtoNet, Snell, Swersky and Zemel 2017, arXiv 1703.05175; as a start, Proto-MAML, Triantafillou et al. 2019,
        arXiv 1903.03096; cosine, Chen et al. 2020, arXiv 2003.04390.

    Example:
        >>> il.MetaLearner(model, adapts=il.Head(), inner=il.SGD(lr=0.1, steps=5), start=il.Prototypes())
        >>> il.MetaLearner(model, adapts=il.Head(), inner=il.SGD(lr=0.1, steps=0), start=il.Prototypes())  # ProtoNet
    """

    cosine: bool = False
    scale: float = 10.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.scale > 0:
            raise ValueError(f"Prototypes(scale={self.scale!r}): give a number above 0")

    def head(self, features: Tensor, targets: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """See ``Start.head``."""
        member = members(targets, ways, features)
        means = member.mT @ features / member.sum(0).clamp(min=1).unsqueeze(-1)
        if not self.cosine:
            return 2 * means, -means.square().sum(-1)
        length = features.norm(dim=-1).mean().clamp(min=1e-12)
        return self.scale / length * F.normalize(means, dim=-1), means.new_zeros(ways)
