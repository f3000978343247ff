"""Which classes are taken for which, over the tasks of an evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from innerloop.tasks import TaskSource

MOST = 100  # classes beyond which a matrix says little


class Confusion(NamedTuple):
    """How often queries of each class (a row) were taken for each class (a column).

    Attributes:
        classes: their names, sorted.
        counts: queries, ``[classes][classes]``.
    """

    classes: list[str]
    counts: list[list[int]]


def confusion(tasks: TaskSource, split: str, answers: Tensor | None) -> Confusion | None:
    """The confusion matrix of the first tasks of a split.

    Args:
        tasks: where they come from.
        split: theirs.
        answers: label and guess of every query, ``[tasks, queries, 2]``; see `innerloop.training.evaluation.Scores`.

    Returns:
        The matrix; None without answers, for classes that have no names, and for more than 100 of them.
    """
    names = None if answers is None else tasks.class_names(split, 0, len(answers))
    if answers is None or names is None:
        return None
    classes = sorted({name for task in names for name in task})
    if len(classes) > MOST:
        return None
    place = {name: index for index, name in enumerate(classes)}
    rows = np.array([[place[name] for name in task] for task in names])
    counts = np.zeros((len(classes), len(classes)), np.int64)
    both = answers.numpy()
    which = np.arange(len(rows))[:, None]
    np.add.at(counts, (rows[which, both[..., 0]], rows[which, both[..., 1]]), 1)
    return Confusion(classes, counts.tolist())
