"""Images as functions of coordinates, a task an image."""

from __future__ import annotations

import torch

from innerloop.problem import Task
from innerloop.tasks._episodes import Episodes, TaskSource


class Fields(TaskSource):
    """Regression from pixel coordinates to the values of one image, the first of each task of a source.

    Support and query are both all pixels: inputs ``[tasks, height * width, 2]``, row and column from -1 to 1, targets
    ``[tasks, height * width, channels]``: ``il.tasks.Fields(il.tasks.glyphs())``.
    """

    ways = None

    def __init__(self, source: Episodes) -> None:
        self.source, self.name = source, f"fields of {source.name}"
        self.input_shape, self.output_size = (2,), source.input_shape[0]

    def batch(self, split: str, start: int, count: int) -> Task:
        """See `TaskSource.batch`."""
        images = self.source.batch(split, start, count).support[0][:, 0]
        sides = [torch.linspace(-1, 1, size) for size in images.shape[2:]]
        points = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1).expand(count, -1, 2)
        return Task((points, images.flatten(2).mT), (points, images.flatten(2).mT))
