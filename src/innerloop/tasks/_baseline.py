"""The honest baseline that every few-shot accuracy should stand beside."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from innerloop.problem import Task


def nearest_neighbour(task: Task) -> Tensor:
    """Accuracy of giving each query the label of the support example nearest by cosine on the raw inputs.

    Args:
        task: a batch of classification tasks, or one task.

    Returns:
        Accuracy in [0, 1] of each task, ``[tasks]``; a scalar for one task.
    """
    (support, labels), (query, targets) = task
    support, query = (F.normalize(inputs.flatten(labels.dim()).float(), dim=-1) for inputs in (support, query))
    nearest = (query @ support.mT).argmax(-1)
    return (labels.gather(-1, nearest) == targets).float().mean(-1)
