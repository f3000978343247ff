"""Tasks without labels: clusters of embeddings stand for classes (CACTUs, Hsu, Levine and Finn, arXiv 1810.02334)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from innerloop.tasks._episodes import Episodes

ROUNDS, COMPONENTS = 20, 32


def clustered(
    source: Episodes, clusters: int, embed: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> Episodes:
    """A source whose training classes are k-means clusters of its training images; their labels are not looked at.

    Clusters with fewer images than a task asks for are left out. Validation and test tasks stay as they are.

    Args:
        source: images in memory.
        clusters: how many, at least the ways of a task.
        embed: ``embed(images) -> [images, numbers]``, such as features learned without labels, which is what the paper
            has. None takes the first 32 principal components of the pixels, each scaled to variance 1.
        seed: selects the first centres.

    Raises:
        ValueError: more clusters than images, or too few that are large enough.

    Example:
        >>> tasks = il.tasks.clustered(il.tasks.glyphs(ways=5, shots=1, queries=5), clusters=100)
    """
    own, need = source.image_set, source.shots + source.queries
    rows = torch.arange(sum(own.counts)).split(list(own.counts))
    mine = torch.cat([rows[each] for each in own.splits["train"]])
    if not source.ways <= clusters <= len(mine):
        raise ValueError(f"clusters is {clusters}; give from {source.ways}, the ways, to {len(mine)}, the images")
    images = own.images[mine]
    labels = _kmeans((embed or _components)(images.float()), clusters, seed)
    parts = [part for part in (mine[labels == each] for each in range(clusters)) if len(part) >= need]
    if len(parts) < source.ways:
        raise ValueError(f"{len(parts)} of {clusters} clusters hold {need} images or more: ask for fewer clusters")
    splits, names = {"train": tuple(range(len(parts)))}, [f"cluster {place}" for place in range(len(parts))]
    for split in [each for each in own.splits if each != "train"]:
        splits[split] = tuple(range(len(parts), len(parts) + len(own.splits[split])))
        parts += [rows[each] for each in own.splits[split]]
        names += [own.classes[each] for each in own.splits[split]]
    order = torch.cat(parts)
    found = replace(
        own, name=f"{own.name}, {clusters} clusters", images=own.images[order], counts=tuple(map(len, parts)),
        classes=tuple(names), splits=splits, groups=tuple(own.groups[row] for row in order.tolist() if own.groups),
    )  # fmt: skip
    tasks = Episodes(found, source.ways, source.shots, source.queries, source.seed)
    tasks._augments = copy.copy(source._augments)
    return tasks


def _components(images: Tensor) -> Tensor:
    flat = images.flatten(1).double()
    flat = flat - flat.mean(0)
    values, axes = torch.linalg.eigh(flat.mT @ flat / len(flat))
    return flat @ axes[:, -COMPONENTS:] / values[-COMPONENTS:].clamp(min=1e-9).sqrt()


def _kmeans(points: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each point: Lloyd's algorithm, from points drawn by the distance to those before (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (points - centres[-1]).square().sum(1)).clamp(min=1e-30)
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=generator)]])
    for _ in range(ROUNDS):
        labels = torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(labels, minlength=clusters).clamp(min=1)
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / counts[:, None]
    return labels
