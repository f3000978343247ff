"""CIFAR-100 as few-shot tasks: the splits CIFAR-FS and FC100.

CIFAR-100: Krizhevsky, "Learning multiple layers of features from tiny images" (2009). CIFAR-FS: Bertinetto et al.,
"Meta-learning with differentiable closed-form solvers" (ICLR 2019). FC100: Oreshkin et al., "TADAM" (NeurIPS 2018).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.tasks._cache import cached_arrays
from innerloop.tasks._downloads import download
from innerloop.tasks._episodes import Episodes, ImageSet, recorded
from innerloop.tasks._files import Files, read_npz

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
SHA256 = "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
LAYOUT = (
    "data= (--data) takes cifar-100-binary.tar.gz from www.cs.toronto.edu/~kriz/cifar.html, the folder with its "
    "train.bin and test.bin, or cifarfs32.npz; the Python version is pickled, and nothing is unpickled here"
)
PARTS = {"train.bin": 500, "test.bin": 100}  # images of each class

CLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""Superclasses and their classes. The archive numbers the classes in alphabetical order."""

NAMES = tuple(sorted(name for names in CLASSES.values() for name in names.split()))

CIFAR_FS = {
    "validation": "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea "
    "shark television tractor",
    "test": "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table "
    "telephone wardrobe whale woman worm",
}

FC100 = {
    "validation": "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals",
    "test": "aquatic_mammals insects medium_mammals people",
}


@recorded
def cifar_fs(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of CIFAR-100 images, ``[3, 32, 32]``: 64, 16 and 20 random classes to train, validate and test on.

    Args:
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks.
        data: where the images are: the authors' binary archive or its folder, or an npz with the classes of CIFAR-FS
            (or the folder that holds one of them); by default the archive is downloaded (161 MiB) and kept in the cache
            folder. The npz is lossy, as if by JPEG: say so where a number is compared with published ones.
        augment: changes of training images, ``"flip"`` (left to right), ``"crop"`` (shifts by up to an eighth) or
            ``"flip,crop"``.

    Raises:
        ValueError: data that is damaged or incomplete, or tasks too large for the images.
        FileNotFoundError: nothing readable at ``data``.
        ConnectionError: the download failed.
    """
    splits = {split: names.split() for split, names in CIFAR_FS.items()}
    return Episodes(_image_set("cifar_fs", splits, data), ways, shots, queries, seed, augment)


@recorded
def fc100(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of CIFAR-100 images, ``[3, 32, 32]``: 60, 20 and 20 classes, split by superclass.

    Arguments and errors are those of `cifar_fs`.
    """
    splits = {split: [c for s in names.split() for c in CLASSES[s].split()] for split, names in FC100.items()}
    return Episodes(_image_set("fc100", splits, data), ways, shots, queries, seed, augment)


def _image_set(name: str, held_out: dict[str, list[str]], data: str | PathLike[str] | None) -> ImageSet:
    images = torch.from_numpy(_load(data))
    held_out = {"train": sorted(set(NAMES).difference(*held_out.values())), **held_out}
    splits = {split: tuple(sorted(map(NAMES.index, names))) for split, names in held_out.items()}
    counts = (sum(PARTS.values()),) * len(NAMES)
    return ImageSet(name, images, counts, NAMES, splits)


def _load(data: str | PathLike[str] | None) -> NDArray[np.uint8]:
    """uint8 ``[60000, 3, 32, 32]``: 600 images of each class of `NAMES`, CIFAR's training images first."""
    if data is None:
        return cached_arrays("cifar100.npz", lambda: {"images": _read_binary(Files(download(URL, SHA256)))})["images"]
    root = Path(data).expanduser()
    for place in (root, root / "cifarfs32.npz"):
        if place.is_file() and place.suffix == ".npz":
            return _read_npz(place)
    for place in (root, root / "cifar-100-binary", root / "cifar-100-binary.tar.gz"):
        if place.is_file() or all((place / part).is_file() for part in PARTS):
            return _read_binary(Files(place))
    raise FileNotFoundError(f"found no CIFAR-100 at {root}; {LAYOUT}")


def _read_binary(files: Files) -> NDArray[np.uint8]:
    """A record is the superclass, the class and the red, green and blue plane of one image, a byte each."""
    contents = dict(files.read(PARTS.keys() & files.stamps.keys()))
    parts = []
    for part, count in PARTS.items():
        content = np.frombuffer(contents.get(part, b""), np.uint8)
        records = content[: content.size // 3074 * 3074].reshape(-1, 3074)
        if records.size != content.size or np.bincount(records[:, 1]).tolist() != [count] * 100:
            raise ValueError(f"{files.root} does not hold {count} images of each of 100 classes in {part}; {LAYOUT}")
        parts.append(records[records[:, 1].argsort(kind="stable"), 2:].reshape(100, count, 3, 32, 32))
    return np.concatenate(parts, axis=1).reshape(-1, 3, 32, 32)


def _read_npz(path: Path) -> NDArray[np.uint8]:
    """Images stored as luma and half-size chroma of 5 bits a pixel, each plane as two-way differences modulo 32."""
    splits, planes = ("train", "val", "test"), ("classes", "y", "cb", "cr")
    arrays = read_npz(path, [f"{split}_{plane}" for split in splits for plane in planes])
    images = dict[str, NDArray[np.uint8]]()
    for split in splits:
        for name, *differences in zip(*(arrays[f"{split}_{plane}"] for plane in planes), strict=True):
            images[str(name)] = _to_rgb(*map(_undo, differences))
    if tuple(sorted(images)) != NAMES:
        raise ValueError(f"{path} does not hold the 100 classes of CIFAR-100; {LAYOUT}")
    return np.concatenate([images[name] for name in NAMES])


def _undo(differences: NDArray[np.uint8]) -> NDArray[np.uint8]:
    sums: NDArray[np.uint8] = differences.cumsum(-1, dtype=np.uint8).cumsum(-2, dtype=np.uint8)
    return sums & np.uint8(31)


def _to_rgb(y: NDArray[np.uint8], cb: NDArray[np.uint8], cr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    luma = y * np.float32(255 / 31)
    blue, red = (((c ^ 16).astype(np.float32) - 16).repeat(2, -1).repeat(2, -2) * 8 for c in (cb, cr))
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
