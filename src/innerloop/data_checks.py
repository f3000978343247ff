"""Data that cannot be learned from, found before they are: by set, task and cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop.errors import BadData
from innerloop.trees import tensors

T = TypeVar("T")


def check_finite(part: str, data: Any, where: str = "") -> None:
    """Raise `BadData` where a set of examples holds NaN or infinity.

    Args:
        part: ``"support"`` or ``"query"``.
        data: any tree of tensors.
        where: which task it is of, such as ``" of task 3 of the training stream"``.
    """
    for leaf in tensors(data):
        if leaf.is_floating_point() and not leaf.isfinite().all():
            bad = int((~leaf.isfinite()).sum())
            raise BadData(
                f"the {part} set{where} holds {bad} numbers of {leaf.numel()} that are not finite: repair or leave out "
                "that data"
            )


def classes_of(scores: Any) -> int | None:
    """How many classes a model with cross-entropy tells apart, by what it gives; None where that cannot be seen."""
    return scores.shape[1] if isinstance(scores, Tensor) and scores.ndim > 1 else None


def check_labels(part: str, targets: Any, classes: int, ignored: int = -100, where: str = "") -> None:
    """Raise `BadData` where cross-entropy cannot take the targets of a set as labels.

    Args:
        part: ``"support"`` or ``"query"``.
        targets: of one task.
        classes: how many the model tells apart.
        ignored: the label of examples that do not count.
        where: which task it is of.
    """
    if not isinstance(targets, Tensor):
        return
    if targets.is_floating_point() or targets.dtype in (torch.bool, torch.complex64):
        if targets.shape[-1] != classes or targets.ndim < 2:  # else they are probabilities
            raise BadData(
                f"the labels of the {part} set{where} are {str(targets.dtype).removeprefix('torch.')}: give whole "
                "numbers from 0 on, labels.long(), or one probability a class"
            )
        return
    real = targets[targets != ignored]
    if real.numel() and not (int(real.min()) >= 0 and int(real.max()) < classes):
        raise BadData(
            f"the labels of the {part} set{where} run from {int(real.min())} to {int(real.max())}, but the model tells "
            f"{classes} classes apart: give labels from 0 to {classes - 1}, or a model with more outputs"
        )


def passed(forward: Callable[[], T], inputs: Any, name: str) -> T:
    """What a model gives for its first inputs; `BadData` with the shapes where it cannot take them."""
    try:
        return forward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shapes = ", ".join(str(list(leaf.shape)) for leaf in tensors(inputs))
        cure = "give inputs of the shape that it is made for, or a model for these"
        if "more than 1 value per channel" in why or "more than 1 spatial element" in why:
            cure = "batch norm needs two examples or more in a set, or batch_norm='frozen'"
        elif "same dtype" in why or "type (" in why:
            cure = "inputs have the precision of the first parameter that learns; let the model cast them to its own"
        raise BadData(f"{name} cannot take a support set of shape {shapes} ({why}): {cure}") from error
