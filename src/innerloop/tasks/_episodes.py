"""N-way K-shot tasks drawn from a set of images in memory.

A task is a pure function of (source, split, seed, index). Its randomness is the raw output of the counter-based
generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream is fixed
by its specification: the key is the seed and the stream's name, the counter is the index of the task. So task 812 is
the same on every machine, in every process and after every restart, and is drawn without drawing the 811 before it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.problem import Task

Bits = NDArray[np.uint64]


class TaskSource(ABC):
    """Where tasks come from, image or regression: three endless numbered streams of tasks, one a split.

    Attributes:
        name: what the source is called on the command line.
        input_shape: the shape of one example, such as ``(1, 28, 28)``.
        ways: classes in a task; None for regression.
        output_size: numbers that a model must return for one example: ``ways``, or the targets of a regression.
    """

    name: str
    input_shape: tuple[int, ...]
    ways: int | None
    output_size: int

    @abstractmethod
    def batch(self, split: str, start: int, count: int) -> Task:
        """Tasks ``start`` to ``start + count - 1`` of a split's stream, stacked along a new leading dimension.

        Any task can be drawn at any time, so several processes share a stream by asking for different numbers.

        Raises:
            ValueError: unknown split, ``start`` below 0 or ``count`` below 1.
        """

    def train(self, tasks_per_batch: int, steps: int, start: int = 0) -> Batches:
        """``steps`` batches of training tasks; ``start`` is the step to resume at.

        Step s holds tasks ``s * tasks_per_batch`` to ``(s + 1) * tasks_per_batch - 1``, wherever training was started.
        """
        return Batches(self, "train", start * tasks_per_batch, (start + steps) * tasks_per_batch, tasks_per_batch)

    def validation(self, tasks: int, tasks_per_batch: int = 32) -> Batches:
        """The first ``tasks`` validation tasks, the same at every call, in batches of which the last may be smaller."""
        return Batches(self, "validation", 0, tasks, tasks_per_batch)

    def test(self, tasks: int, tasks_per_batch: int = 32) -> Batches:
        """The first ``tasks`` test tasks, the same at every call, in batches of which the last may be smaller."""
        return Batches(self, "test", 0, tasks, tasks_per_batch)


class Batches(Iterator[Task]):
    """Tasks ``start`` to ``stop - 1`` of a split, ``size`` at a time; ``len`` counts the batches still to come."""

    def __init__(self, source: TaskSource, split: str, start: int, stop: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"tasks_per_batch is {size}; it must be at least 1")
        self._source, self._split = source, split
        self._next, self._stop, self._size = start, stop, size

    def __len__(self) -> int:
        return max(0, -((self._next - self._stop) // self._size))

    def __next__(self) -> Task:
        if self._next >= self._stop:
            raise StopIteration
        start, self._next = self._next, min(self._next + self._size, self._stop)
        return self._source.batch(self._split, start, self._next - start)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images by class, as bytes in memory, and the classes of each split.

    Attributes:
        name: what the set is called; part of what a task's randomness depends on.
        images: uint8 ``[images, channels, height, width]``: all images of class 0, then all of class 1, and so on.
        counts: images in each class.
        classes: the name of each class, such as ``"Greek/small letter alpha"``.
        splits: the classes of ``"train"``, ``"validation"`` and ``"test"``, by index; disjoint; any may be left out.
        rotations: every training class also appears turned by 90, 180 and 270 degrees, as three further classes. They
            are turned when drawn and never stored; images must be square.

    Raises:
        ValueError: the parts do not fit together.
    """

    name: str
    images: Tensor
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    splits: dict[str, tuple[int, ...]]
    rotations: bool = False

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                f"{self.name}: images must be uint8 [images, channels, height, width], "
                f"not {self.images.dtype} {list(self.images.shape)}"
            )
        if len(self.counts) != len(self.classes) or sum(self.counts) != len(self.images):
            raise ValueError(
                f"{self.name}: {len(self.classes)} class names, {len(self.counts)} counts that add up to "
                f"{sum(self.counts)}, and {len(self.images)} images do not fit together"
            )
        used = [index for split in self.splits.values() for index in split]
        if len(set(used)) != len(used):
            raise ValueError(f"{self.name}: a class is in two splits, or twice in one; splits must be disjoint")
        if not set(used) <= set(range(len(self.classes))):
            raise ValueError(f"{self.name}: a split names a class beyond 0..{len(self.classes) - 1}")
        if self.rotations and self.images.shape[-1] != self.images.shape[-2]:
            raise ValueError(f"{self.name}: rotations need square images, not {list(self.images.shape[-2:])}")


class Episodes(TaskSource):
    """Few-shot classification tasks from a set of images.

    Each task has ``ways`` classes of its split in random order, and of each class ``shots`` support and ``queries``
    query images, all different. Inputs are float32 in [0, 1], ``[tasks, ways * shots, channels, height, width]`` and
    ``[tasks, ways * queries, ...]``; targets are int64 labels 0 to ``ways - 1``, in ascending order.

    Raises:
        ValueError: a split has too few classes, or a class too few images, for the tasks asked.
    """

    def __init__(self, image_set: ImageSet, ways: int = 5, shots: int = 1, queries: int = 15, seed: int = 0) -> None:
        for what, value in {"ways": ways, "shots": shots, "queries": queries}.items():
            if value < 1:
                raise ValueError(f"{what} is {value}; it must be at least 1")
        check_seed(seed)
        for split, classes in image_set.splits.items():
            choices = len(classes) * (4 if image_set.rotations and split == "train" else 1)
            if choices < ways:
                raise ValueError(
                    f"{image_set.name}: the {split} split has {choices} classes, fewer than the {ways} ways asked; "
                    "ask for fewer ways"
                )
            for index in classes:
                if image_set.counts[index] < shots + queries:
                    raise ValueError(
                        f"{image_set.name}: class {image_set.classes[index]!r} has {image_set.counts[index]} images, "
                        f"fewer than the {shots} shots + {queries} queries = {shots + queries} asked; "
                        "ask for fewer, or leave the class out"
                    )
        self.image_set = image_set
        self.name = image_set.name
        self.input_shape = tuple(image_set.images.shape[1:])
        self.ways: int = ways
        self.output_size = ways
        self.shots, self.queries, self.seed = shots, queries, seed
        self._counts = np.array(image_set.counts)
        self._offsets = np.cumsum(self._counts) - self._counts

    def batch(self, split: str, start: int, count: int) -> Task:
        """See `TaskSource.batch`."""
        check_split(self.name, split, self.image_set.splits)
        classes = np.array(self.image_set.splits[split])
        turns = 4 if self.image_set.rotations and split == "train" else 1
        choices, most = turns * len(classes), self._counts[classes].max()

        bits = random_bits(f"{self.name}/{split}", self.seed, start, count, choices + self.ways * most)
        turn, position = np.divmod(_draw(bits[:, :choices], self.ways), len(classes))
        chosen = classes[position]
        keys = bits[:, choices:].reshape(count, self.ways, most)
        keys[np.arange(most) >= self._counts[chosen][..., None]] = np.iinfo(np.uint64).max
        rows = _draw(keys, self.shots + self.queries) + self._offsets[chosen][..., None]
        images = self.images(rows, turn).unflatten(0, (count, self.ways))

        def examples(images: Tensor) -> tuple[Tensor, Tensor]:
            labels = torch.arange(self.ways).repeat_interleave(images.shape[2]).repeat(count, 1)
            return images.flatten(1, 2).float().div_(255), labels

        return Task(examples(images[:, :, : self.shots]), examples(images[:, :, self.shots :]))

    def images(self, rows: NDArray[np.int64], turn: NDArray[np.int64]) -> Tensor:
        """The images of rows ``[..., n]``, as bytes ``[groups, n, ...]``, each group of n turned as ``turn`` says."""
        # index_select copies whole images and is many times faster than indexing with a tensor.
        images = self.image_set.images.index_select(0, torch.from_numpy(rows).flatten())
        images = images.unflatten(0, (-1, rows.shape[-1]))
        for quarter in range(1, 4 if self.image_set.rotations else 1):
            turned = torch.from_numpy(np.flatnonzero(turn == quarter))
            images.index_copy_(0, turned, images.index_select(0, turned).rot90(quarter, dims=(-2, -1)))
        return images

    def single_images(self) -> SingleImages:
        """The same source with single images of all training classes as training tasks, for `Supervised`."""
        return SingleImages(self)


class SingleImages(TaskSource):
    """Episodes whose training tasks are single images of all training classes, labelled by their class in the split.

    A training task has as many images as one of the episodes, each of a random class; ``output_size`` is the number of
    training classes. The other splits are those of the episodes.
    """

    def __init__(self, episodes: Episodes) -> None:
        self.episodes, self.name = episodes, episodes.name
        self.input_shape, self.ways = episodes.input_shape, episodes.ways
        image_set = episodes.image_set
        self._classes = np.array(image_set.splits["train"])
        self.output_size = len(self._classes) * (4 if image_set.rotations else 1)

    def batch(self, split: str, start: int, count: int) -> Task:
        """See `TaskSource.batch`."""
        each = self.episodes
        if split != "train":
            return each.batch(split, start, count)
        size, support = each.ways * (each.shots + each.queries), each.ways * each.shots
        bits = uniform(random_bits(f"{self.name}/train/single images", each.seed, start, count, 2 * size))
        labels = (bits[:, :size] * self.output_size).astype(np.int64)
        turn, position = np.divmod(labels, len(self._classes))
        chosen = self._classes[position]
        rows = (bits[:, size:] * each._counts[chosen]).astype(np.int64) + each._offsets[chosen]
        images = each.images(rows[..., None], turn).unflatten(0, (count, size)).squeeze(2).float().div_(255)
        targets = torch.from_numpy(labels)
        return Task(*((images[:, part], targets[:, part]) for part in (slice(support), slice(support, None))))


def random_bits(stream: str, seed: int, start: int, count: int, width: int) -> Bits:
    """Random 64-bit integers ``[count, width]``: row i belongs to task ``start + i`` of a named stream alone.

    ``width`` must be the same for every task of a stream. `uniform` makes floats of them.

    Raises:
        ValueError: ``start`` below 0 or ``count`` below 1.
    """
    if start < 0 or count < 1:
        raise ValueError(
            f"asked for {count} tasks from task {start} on; tasks are numbered from 0 and a batch has at least one"
        )
    blocks = -(-width // 4)  # Philox gives four integers a count
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    generator = np.random.Philox(key=np.array([seed, name], dtype=np.uint64), counter=start * blocks)
    return generator.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :width]


def uniform(bits: Bits) -> NDArray[np.float64]:
    """Uniform floats in [0, 1) from random 64-bit integers, of the same shape."""
    return (bits >> np.uint64(11)) * np.float64(2**-53)


def check_seed(seed: int) -> None:
    """Raise ValueError where a seed is not a number that the generator's key can hold."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2**64 - 1")


def check_split(source: str, split: str, splits: Collection[str]) -> None:
    """Raise ValueError where a source has no such split."""
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(splits)}")


def _draw(keys: Bits, count: int) -> NDArray[np.int64]:
    """``count`` different numbers below n in random order: the places of the smallest of the random keys ``[..., n]``.

    Each key's low bits are replaced, in ``keys`` itself, by its place, so that no two are equal and sorting the keys
    sorts the places along. A key of all ones is drawn last.
    """
    places = keys.shape[-1]
    low = np.uint64((1 << places.bit_length()) - 1)
    keys &= ~low  # in place: a copy of all keys would cost more than the draw
    keys |= np.arange(places, dtype=np.uint64)
    smallest = np.sort(np.partition(keys, count - 1, axis=-1)[..., :count], axis=-1)
    return (smallest & low).astype(np.int64)
