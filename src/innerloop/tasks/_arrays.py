"""Examples that are in memory already, or in a data set object of another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.tasks._episodes import Episodes, ImageSet
from innerloop.tasks._folder import split_classes
from innerloop.tasks._pictures import pixels_of, usual_size

LABELS = ("label", "labels", "target", "targets", "class", "y")  # what a column of labels is called


def arrays(
    x: Any,
    y: Any,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    split: str | PathLike[str] | Sequence[float] | None = None,
    group: Sequence[Any] | Tensor | None = None,
    augment: str | None = None,
    name: str = "arrays",
) -> Episodes:
    """Few-shot tasks of examples in memory.

    Args:
        x: a tensor or numpy array ``[examples, ...]``, or a tree of them, such as token ids and masks by name. Bytes
            (uint8) are images, ``[examples, channels, height, width]``, or with the channels last, or without any for
            grey ones; tasks hold them divided by 255. All else stays as it is.
        y: a label an example, ``[examples]``: whole numbers or text.
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks; which class is in which split does not depend on it.
        names: what the classes are called, where ``y`` holds the numbers 0, 1, ...
        split: how classes are divided: three fractions, or a CSV file; see `innerloop.tasks.folder`.
        group: what each example shows, ``[examples]``: within a class, examples of one group are never in support and
            query of the same task.
        augment: ``"flip"``, ``"crop"`` or ``"flip,crop"``, of training images alone.
        name: of the source; part of what the randomness of tasks depends on.

    Raises:
        ValueError: lengths that differ, several labels an example, fewer than two classes, or tasks too large.

    Example:
        >>> x, y = torch.randn(200, 16), torch.arange(200) % 20
        >>> il.tasks.arrays(x, y, ways=3, shots=1, queries=5).batch("train", 0, 4).support[0].shape
        torch.Size([4, 3, 16])
    """
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise ValueError(
            f"y has the shape {list(labels.shape)}: give one label an example, such as one column, y[:, 0]"
        )
    if labels.dtype.kind not in "iuUSOb" or any(isinstance(label, float) for label in labels.tolist()):
        raise ValueError(
            f"y holds {labels.dtype} values: give labels, whole numbers or text; regression has no classes"
        )
    stored = pytree.tree_map(_stored, x)
    lengths = {len(each) for each in [*pytree.tree_leaves(stored), labels, *([] if group is None else [group])]}
    if len(lengths) > 1:
        raise ValueError(f"x, y and group hold {sorted(lengths)} examples: give as many of each")
    kinds, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        raise ValueError(f"y holds {len(kinds)} class, and tasks tell classes apart: give two or more for each split")
    if names is not None and not set(kinds.tolist()) <= set(range(len(names))):
        raise ValueError(f"names holds {len(names)} names, and y labels up to {kinds[-1]}: give a name for 0, 1, ...")
    called = tuple(str(kind) if names is None else str(names[kind]) for kind in kinds.tolist())
    order = np.argsort(numbers, kind="stable")
    place = {each: index for index, each in enumerate(called)}
    splits = {part: tuple(place[each] for each in mine) for part, mine in split_classes(split, called).items()}
    grouped = () if group is None else tuple(np.unique(np.asarray(group), return_inverse=True)[1][order].tolist())
    images = pytree.tree_map(lambda each: each.index_select(0, torch.from_numpy(order)), stored)
    stock = ImageSet(name, images, tuple(counts.tolist()), called, splits, groups=grouped)
    return Episodes(stock, ways, shots, queries, seed, augment)


def dataset(
    data: Any,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    *,
    label: str | int | None = None,
    image: str | int | None = None,
    size: int | None = None,
    channels: int = 3,
    split: str | PathLike[str] | Sequence[float] | None = None,
    group: Callable[[Any], Any] | None = None,
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of a data set object, such as torchvision's or those of Hugging Face's ``datasets``.

    It is read once, into memory. Pillow images are cut to their largest centred square and resized; tensors and arrays
    must be of one shape.

    Args:
        data: any object with ``len(data)`` and ``data[index]``, which gives ``(image, label)`` or a dict.
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks.
        label: which entry of an example is its label, by key or place; needed where several could be.
        image: the same of its image.
        size: height and width of Pillow images; by default the median of their shorter sides, at most 84.
        channels: 1 for grey, 3 for colour, of Pillow images.
        split: how classes are divided: three fractions, or a CSV file; see `innerloop.tasks.folder`.
        group: of an example, ``data[index]``, what it shows: within a class, examples of one group are never in support
            and query of the same task.
        augment: ``"flip"``, ``"crop"`` or ``"flip,crop"``, of training images alone.

    Raises:
        ValueError: an object without length and places, examples without one image and one label, or tasks too large.

    Example:
        >>> tasks = il.tasks.dataset(torchvision.datasets.Flowers102("data"), ways=5, shots=1, queries=5)
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or len(data) == 0:
        raise ValueError(
            f"{type(data).__name__} is no data set with examples by number: give an object with len(data) and "
            "data[index], which a stream has not; make a list of it"
        )
    first = data[0]
    inputs, target = _entry(first, image, "image", _is_image), _entry(first, label, "label", _is_label)
    examples = [data[index] for index in range(len(data))]
    images, labels = ([example[key] for example in examples] for key in (inputs, target))
    labels = [each.item() if isinstance(each, (Tensor, np.generic)) else each for each in labels]
    if hasattr(first[inputs], "getbands"):
        side = size or usual_size([min(each.size) for each in images])
        stored: Any = np.stack([pixels_of(each, side, channels) for each in images])
    else:
        tensors = [torch.as_tensor(each) for each in images]
        if len(shapes := {tuple(each.shape) for each in tensors}) > 1:
            raise ValueError(
                f"{type(data).__name__} holds arrays of shapes {sorted(shapes)[:3]}: make them of one shape"
            )
        stored = torch.stack(tensors)
    names = getattr(data, "classes", None)
    if (features := getattr(data, "features", None)) and isinstance(features, Mapping):
        names = getattr(features[target], "names", None)
    if not all(isinstance(each, int) for each in labels):
        names = None
    groups = None if group is None else [group(example) for example in examples]
    return arrays(
        stored, labels, ways, shots, queries, seed, names=names, split=split, group=groups, augment=augment,
        name=type(data).__name__,
    )  # fmt: skip


def _entry(example: Any, given: str | int | None, what: str, fits: Callable[[Any], bool]) -> Any:
    """The key or place of an example's image or label.

    Raises:
        ValueError: none fits, or several do.
    """
    by_name = isinstance(example, Mapping)
    if not by_name and not isinstance(example, (tuple, list)):
        raise ValueError(f"an example is a {type(example).__name__}: let data[index] give (image, label) or a dict")
    entries = dict(example) if by_name else dict(enumerate(example))
    if given is not None:
        if given not in entries or not fits(entries[given]):
            raise ValueError(f"{what}={given!r} is no {what} of an example, which has {', '.join(map(str, entries))}")
        return given
    found = [key for key, value in entries.items() if fits(value)]
    usual = [key for key in found if key in LABELS]
    if len(found) != 1 and len(usual) != 1:
        several = f"several that may be its {what}, {', '.join(map(repr, found))}" if found else f"no {what}"
        key = repr(found[0]) if found else "..."
        raise ValueError(f"an example has {several}, among {', '.join(map(repr, entries))}: name one, {what}={key}")
    return found[0] if len(found) == 1 else usual[0]


def _is_image(value: Any) -> bool:
    return hasattr(value, "getbands") or (isinstance(value, (Tensor, np.ndarray)) and value.ndim >= 1)


def _is_label(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.ndim == 0 and not np.issubdtype(np.asarray(value).dtype, np.floating)
    return isinstance(value, (int, str))


def _stored(values: Any) -> Tensor:
    """Examples as a tensor; images as ``[examples, channels, height, width]``."""
    found = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if found.dtype == torch.uint8:
        if found.ndim == 3:
            found = found.unsqueeze(1)
        elif found.ndim == 4 and found.shape[-1] in (1, 3) and found.shape[1] not in (1, 3):
            found = found.movedim(-1, 1)
    return found.float() if found.dtype == torch.float64 else found
