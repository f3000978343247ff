"""N-way K-shot tasks drawn from a set of images in memory.

A task is a pure function of (source, split, seed, index). Its randomness is the raw output of the counter-based
generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream is fixed
by its specification: the key is the seed and the stream's name, the counter is the index of the task. So task 812 is
the same on every machine, in every process and after every restart, and is drawn without drawing the 811 before it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.problem import Task
from innerloop.tasks._augment import DRAWS, augmentations, augmented

Bits = NDArray[np.uint64]
SPLITS = ("train", "validation", "test")


class TaskSource(ABC):
    """Where tasks come from, image or regression: three endless numbered streams of tasks, one a split.

    Attributes:
        name: what the source is called on the command line.
        input_shape: the shape of one example, such as ``(1, 28, 28)``.
        ways: classes in a task; None for regression.
        output_size: numbers that a model must return for one example: ``ways``, or the targets of a regression.
        made: how it was made, as settings of the command; None where no text says it.
    """

    made: dict[str, Any] | None = None
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

    def class_names(self, split: str, start: int, count: int) -> list[list[str]] | None:
        """What the classes of tasks are called, a list a task in the order of labels; None where they have no names."""
        return None

    def with_train_shots(self, shots: int) -> TaskSource:
        """The same source with so many support examples of a class in training tasks, as Reptile's authors train.

        Raises:
            ValueError: the source cannot do so, or a training class has too few examples.
        """
        raise ValueError(f"{self.name} takes no train-shots: leave it out, or give none")

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


Made = TypeVar("Made", bound=TaskSource)
Given = ParamSpec("Given")


def recorded(source: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function's sources say in ``made`` how they were made: the function's name and its arguments.

    Only if numbers and text say it; a list of numbers is text with commas.
    """

    @functools.wraps(source)
    def made(*args: Given.args, **keywords: Given.kwargs) -> Made:
        tasks = source(*args, **keywords)
        signature = inspect.signature(source)
        sizes = {
            name: each.default for name, each in signature.parameters.items() if name in ("ways", "shots", "queries")
        }
        settings: dict[str, Any] = {"dataset": source.__name__}
        for name, value in (sizes | signature.bind(*args, **keywords).arguments).items():
            if isinstance(value, PathLike) or (name == "data" and value is not None):
                value = str(Path(value).expanduser().absolute())
            elif isinstance(value, (tuple, list)):
                value = ",".join(map(str, value))
            settings["class_split" if name == "split" else name] = value
        if all(value is None or isinstance(value, (str, int, float)) for value in settings.values()):
            tasks.made = settings
        return tasks

    return made


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
    """Images, or other examples, by class in memory, and the classes of each split.

    Attributes:
        name: what the set is called; part of what a task's randomness depends on.
        images: uint8 ``[images, channels, height, width]``, which tasks hold divided by 255; or any tensor or tree of
            tensors ``[examples, ...]``, which they hold as it is. All of class 0 come first, then all of class 1.
        counts: images in each class.
        classes: the name of each class, such as ``"Greek/small letter alpha"``.
        splits: the classes of ``"train"``, ``"validation"`` and ``"test"``, by index; disjoint; any may be left out.
        rotations: every training class also appears turned by 90, 180 and 270 degrees, as three further classes. They
            are turned when drawn and never stored; images must be square.
        groups: the group of each image, by number, such as the object or the video that it shows; images of one group
            and class are never in support and query of the same task. Empty where each image stands alone.

    Raises:
        ValueError: the parts do not fit together.
    """

    name: str
    images: Any
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    splits: dict[str, tuple[int, ...]]
    rotations: bool = False
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        first = pytree.tree_leaves(self.images)[0]
        if first.dtype == torch.uint8 and first.dim() != 4:
            raise ValueError(
                f"{self.name}: images must be uint8 [images, channels, height, width], "
                f"not {first.dtype} {list(first.shape)}"
            )
        if len(self.counts) != len(self.classes) or sum(self.counts) != len(first):
            raise ValueError(
                f"{self.name}: {len(self.classes)} class names, {len(self.counts)} counts that add up to "
                f"{sum(self.counts)}, and {len(first)} images do not fit together"
            )
        used = [index for split in self.splits.values() for index in split]
        if len(set(used)) != len(used):
            raise ValueError(f"{self.name}: a class is in two splits, or twice in one; splits must be disjoint")
        if not set(used) <= set(range(len(self.classes))):
            raise ValueError(f"{self.name}: a split names a class beyond 0..{len(self.classes) - 1}")
        if self.rotations and first.shape[-1] != first.shape[-2]:
            raise ValueError(f"{self.name}: rotations need square images, not {list(first.shape[-2:])}")


class Episodes(TaskSource):
    """Few-shot classification tasks from a set of images.

    Each task has ``ways`` classes of its split in random order, and of each class ``shots`` support and ``queries``
    query images, all different, and of other groups where the set has groups. Inputs are float32 in [0, 1],
    ``[tasks, ways * shots, channels, height, width]`` and ``[tasks, ways * queries, ...]``; targets are int64 labels 0
    to ``ways - 1``, in ascending order.

    Args:
        image_set: the images.
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks.
        augment: changes that training images undergo, drawn anew in each task; see `innerloop.tasks._augment`.

    Raises:
        ValueError: a split has too few classes, or a class too few images or groups, for the tasks asked.
    """

    def __init__(
        self,
        image_set: ImageSet,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        augment: str | None = None,
    ) -> None:
        for what, value in {"ways": ways, "shots": shots, "queries": queries}.items():
            if value < 1:
                raise ValueError(f"{what} is {value}; it must be at least 1")
        check_seed(seed)
        for split, classes in image_set.splits.items():
            choices = len(classes) * (4 if image_set.rotations and split == "train" else 1)
            if choices < ways:
                raise ValueError(
                    f"{image_set.name}: the {split} split has {choices} classes, fewer than the {ways} ways asked; "
                    f"give it more classes{', or ask for fewer ways' if choices > 1 else ''}"
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
        self.input_shape = tuple(pytree.tree_leaves(image_set.images)[0].shape[1:])
        self.ways: int = ways
        self.output_size = ways
        self.shots, self.queries, self.seed = shots, queries, seed
        self.train_shots = shots
        self._augments = augmentations(augment, self.input_shape)
        self._counts = np.array(image_set.counts)
        self._offsets = np.cumsum(self._counts) - self._counts
        if image_set.groups:
            used = [index for classes in image_set.splits.values() for index in classes]
            self._groups = {index: self._grouped(index) for index in used}

    def batch(self, split: str, start: int, count: int) -> Task:
        """See `TaskSource.batch`."""
        turn, chosen, keys = self._drawn(split, start, count)
        shots = self.train_shots if split == "train" else self.shots
        rows = self._apart(chosen, keys) if self.image_set.groups else _draw(keys, shots + self.queries)
        images = self.images(split, start, count, rows + self._offsets[chosen][..., None], turn)

        def part(some: slice) -> tuple[Any, Tensor]:
            mine = pytree.tree_map(lambda each: each.unflatten(0, (count, -1))[:, :, some].flatten(1, 2), images)
            shown = len(range(shots + self.queries)[some])
            return mine, torch.arange(self.ways).repeat_interleave(shown).repeat(count, 1)

        return Task(part(slice(shots)), part(slice(shots, None)))

    def with_train_shots(self, shots: int) -> Episodes:
        """See `TaskSource.with_train_shots`."""
        if self.image_set.groups:
            raise ValueError(f"{self.name} has groups, with which training takes no train-shots: leave one out")
        least = min(self._counts[list(self.image_set.splits["train"])])
        if least < shots + self.queries:
            raise ValueError(
                f"{self.name}: a training class has {least} images, fewer than {shots} train-shots + {self.queries} "
                "queries; ask for fewer"
            )
        found = copy.copy(self)
        found.train_shots = shots
        found.made = self.made and {**self.made, "train_shots": shots}
        return found

    def images(self, split: str, start: int, count: int, rows: NDArray[np.int64], turn: NDArray[np.int64]) -> Any:
        """The images of rows ``[tasks, groups, n]``, a tree of ``[tasks * groups, n, ...]``.

        Each group of n is turned as ``turn`` says, ``[tasks, groups]``; for training they are augmented.
        """
        picked = torch.from_numpy(rows).flatten()

        def examples(stored: Tensor) -> Tensor:
            # index_select copies whole images and is many times faster than indexing with a tensor.
            found = stored.index_select(0, picked).unflatten(0, (-1, rows.shape[-1]))
            for quarter in range(1, 4 if turn.any() else 1):
                turned = torch.from_numpy(np.flatnonzero(turn == quarter))
                found.index_copy_(0, turned, found.index_select(0, turned).rot90(quarter, dims=(-2, -1)))
            if self._augments and split == "train":
                draws = uniform(random_bits(f"{self.name}/augment", self.seed, start, count, rows[0].size * DRAWS))
                found = augmented(found.flatten(0, 1), self._augments, draws.reshape(-1, DRAWS)).view_as(found)
            return found.float().div_(255) if found.dtype == torch.uint8 else found

        return pytree.tree_map(examples, self.image_set.images)

    def single_images(self) -> SingleImages:
        """The same source with single images of all training classes as training tasks, for `Supervised`."""
        return SingleImages(self)

    def class_names(self, split: str, start: int, count: int) -> list[list[str]]:
        """See `TaskSource.class_names`."""
        turn, chosen, _ = self._drawn(split, start, count)
        named = zip(turn.tolist(), chosen.tolist(), strict=True)
        return [
            [
                self.image_set.classes[index] + (f" turned by {90 * quarter}" if quarter else "")
                for quarter, index in zip(*task, strict=True)
            ]
            for task in named
        ]

    def _drawn(self, split: str, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Bits]:
        """Of each task the quarter turns and the classes, ``[tasks, ways]``, and a random key for each image."""
        check_split(self.name, split, self.image_set.splits)
        classes = np.array(self.image_set.splits[split])
        turns = 4 if self.image_set.rotations and split == "train" else 1
        choices, most = turns * len(classes), self._counts[classes].max()

        bits = random_bits(f"{self.name}/{split}", self.seed, start, count, choices + self.ways * most)
        turn, position = np.divmod(_draw(bits[:, :choices], self.ways), len(classes))
        chosen = classes[position]
        keys = bits[:, choices:].reshape(count, self.ways, most)
        keys[np.arange(most) >= self._counts[chosen][..., None]] = np.iinfo(np.uint64).max
        return turn, chosen, keys

    def _grouped(self, index: int) -> list[NDArray[np.int64]]:
        """The images of each group of a class, by their number in it.

        Raises:
            ValueError: they cannot be parted into enough for support and enough for query.
        """
        first = self._offsets[index]
        mine = np.array(self.image_set.groups[first : first + self._counts[index]])
        found = [np.flatnonzero(mine == group) for group in np.unique(mine)]
        if not _parted(list(map(len, found)), self.shots, self.queries):
            raise ValueError(
                f"{self.name}: class {self.image_set.classes[index]!r} has {len(found)} groups of "
                f"{', '.join(str(len(each)) for each in found[:5])}{', ...' if len(found) > 5 else ''} images, which "
                f"cannot be parted into {self.shots} shots and {self.queries} queries without a group on both sides; "
                "ask for fewer, or leave the class out"
            )
        return found

    def _apart(self, chosen: NDArray[np.int64], keys: Bits) -> NDArray[np.int64]:
        """The images of each class of each task, support first, with no group on both sides."""
        rows = np.empty((*chosen.shape, self.shots + self.queries), np.int64)
        for place in np.ndindex(chosen.shape):
            groups, key = self._groups[int(chosen[place])], keys[place]
            # Groups are ordered by their first image's key, mixed so that this image is not favoured below.
            order = np.argsort(key[[group[0] for group in groups]] * np.uint64(0x9E3779B97F4A7C15), kind="stable")
            mine = {int(order[at]) for at in _parted([len(groups[at]) for at in order], self.shots, self.queries)}
            sides = [
                np.concatenate([g for at, g in enumerate(groups) if (at in mine) is side]) for side in (True, False)
            ]
            for side, some in zip(sides, (slice(self.shots), slice(self.shots, None)), strict=True):
                wanted = rows[place][some]
                wanted[:] = side[_draw(key[side].copy(), len(wanted))]
        return rows


def _parted(sizes: Sequence[int], shots: int, queries: int) -> list[int]:
    """Which groups, of those with these sizes, are for support; empty where no parting leaves enough on both sides.

    In order, at least one and as many as are the support set's share of all, unless that leaves too few for a side.
    """
    total, reach = sum(sizes), [1]
    for size in reversed(sizes):  # bit n of reach[-1 - at]: some of the groups from `at` on have n images
        reach.append(reach[-1] | reach[-1] << size)
    share = len(sizes) * shots // (shots + queries)
    taken: list[int] = []
    have = 0
    for at, size in enumerate(sizes):
        if have >= shots and len(taken) >= share:
            break
        least, room = max(0, shots - have - size), total - queries - have - size
        if room >= least and (reach[len(sizes) - 1 - at] >> least) & ((1 << (room - least + 1)) - 1):
            taken.append(at)
            have += size
    return taken if have >= shots else []


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
        images = each.images(split, start, count, rows[..., None], turn)
        targets = torch.from_numpy(labels)

        def half(some: slice) -> tuple[Any, Tensor]:
            mine = pytree.tree_map(lambda leaf: leaf.unflatten(0, (count, size)).squeeze(2)[:, some], images)
            return mine, targets[:, some]

        return Task(half(slice(support)), half(slice(support, None)))


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
