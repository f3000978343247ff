"""Light augmentation of training images, drawn like the tasks themselves: mirror images, and shifts by a few pixels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("flip", "crop")
DRAWS = 3  # random numbers that an image takes: for its mirror image, and for its shift both ways
MARGIN = 8  # a shift is of up to an eighth of the side


def augmentations(text: str | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The kinds of a text such as ``flip,crop``; none in ``none``.

    Raises:
        ValueError: an unknown kind, or examples that are no images.
    """
    kinds = tuple(part.strip() for part in (text or "").split(",") if part.strip() not in ("", "none"))
    if odd := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"augment {odd[0]!r} is unknown: choose {', '.join(KINDS)}, or both with a comma")
    if kinds and len(shape) != 3:
        raise ValueError(f"augment is for images, and examples have the shape {list(shape)}: leave it out")
    return kinds


def augmented(images: Tensor, kinds: tuple[str, ...], draws: NDArray[np.float64]) -> Tensor:
    """Images ``[images, channels, height, width]`` changed as ``draws``, ``[images, DRAWS]`` in [0, 1), say.

    ``flip`` mirrors half of them left to right. ``crop`` shifts each, and what comes in at a rim mirrors what is there.
    """
    chance = torch.from_numpy(draws)
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(side).expand(len(images), side) for side in (height, width))
    if "crop" in kinds:
        rows, columns = (
            _mirrored(index + ((2 * draw - 1) * (side // MARGIN + 0.5)).round().long().unsqueeze(1), side)
            for index, draw, side in ((rows, chance[:, 1], height), (columns, chance[:, 2], width))
        )
    if "flip" in kinds:
        columns = torch.where(chance[:, :1] < 0.5, columns.flip(1), columns)
    found = images.gather(2, rows[:, None, :, None].expand_as(images))
    return found.gather(3, columns[:, None, None, :].expand_as(images))


def _mirrored(index: Tensor, side: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index).clamp(0, side - 1)
