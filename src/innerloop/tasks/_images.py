"""A set of images: which file is of which class and split, and their pixels, decoded once."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from innerloop.tasks._cache import atomic_write, cache_folder
from innerloop.tasks._episodes import SPLITS, ImageSet
from innerloop.tasks._files import Files
from innerloop.tasks._pictures import DECODING, Pixels, decode

Layout = dict[str, dict[str, list[str]]]
"""The image files of each class of each split."""

SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


def split_folders(names: Iterable[str]) -> Layout | None:
    """The layout of files at ``SPLIT/CLASS/...`` with a train split, or None where they lie otherwise.

    Files beside the split folders do not count.
    """
    layout: Layout = {}
    for name in names:
        split, _, rest = name.partition("/")
        if not rest:
            continue
        if split not in SPLIT_FOLDERS or "/" not in rest:
            return None
        layout.setdefault(SPLIT_FOLDERS[split], {}).setdefault(rest.partition("/")[0], []).append(name)
    return layout if "train" in layout else None


def image_set(
    name: str,
    files: Files,
    layout: Layout,
    size: int,
    channels: int,
    crop: bool,
    groups: Mapping[str, str] | None = None,
) -> ImageSet:
    """The images of a layout, decoded by all cores the first time and mapped from the cache folder from then on.

    Args:
        name: of the set.
        files: where they are.
        layout: which there are.
        size: side to which they are resized.
        channels: 1 for grey, 3 for colour.
        crop: cut the largest centred square out first.
        groups: of each image, by its file, if they have groups.

    Raises:
        ValueError: a class or an image is in two places, or an image cannot be read.
    """
    layout = {split: layout[split] for split in SPLITS if split in layout}
    home: dict[str, str] = {}
    for split, members in layout.items():
        for label in members:
            if label in home:
                raise ValueError(
                    f"{files.root}: class {label!r} is in {home[label]} and in {split}; few-shot splits share no "
                    f"class, so give each class one split"
                )
            home[label] = split
    classes = {label: sorted(members[label]) for members in layout.values() for label in sorted(members)}
    rows = {image: row for row, image in enumerate(image for images in classes.values() for image in images)}
    counts = tuple(len(images) for images in classes.values())
    if len(rows) < sum(counts):
        raise ValueError(f"{files.root}: an image is listed more than once; list each image once")

    def decoded() -> Iterator[tuple[int, Pixels]]:
        return ((rows[image], pixels) for image, pixels in _decode_all(files, rows, size, channels, crop))

    stamps = [(image, files.stamps[image]) for image in rows]
    key = hashlib.sha256(repr((DECODING, files.place, stamps, size, channels, crop)).encode()).hexdigest()[:16]
    images = _cached_pixels(f"{name}-{key}.pixels", (len(rows), channels, size, size), decoded)
    index = {label: position for position, label in enumerate(classes)}
    splits = {split: tuple(index[label] for label in sorted(members)) for split, members in layout.items()}
    numbers = {group: number for number, group in enumerate(sorted({*(groups or {}).values()}))}
    grouped = tuple(numbers[groups[image]] for image in rows) if groups else ()
    return ImageSet(name, images, counts, tuple(classes), splits, groups=grouped)


def _decode_all(
    files: Files, names: Collection[str], size: int, channels: int, crop: bool
) -> Iterator[tuple[str, Pixels]]:
    from rich.console import Console
    from rich.progress import track

    damaged: dict[str, Exception] = {}

    def decode_one(item: tuple[str, bytes]) -> tuple[str, Pixels] | None:
        name, content = item
        try:
            return name, decode(content, size, channels, crop)
        except Exception as error:  # see `decode`
            damaged[name] = error
            return None

    def blocks() -> Iterator[tuple[str, Pixels]]:
        contents = files.read(names)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while block := list(islice(contents, 64)):
                yield from filter(None, pool.map(decode_one, block))
        if damaged:
            first, *others = sorted(damaged)
            more = f", and {len(others)} more: {', '.join(others[:9])}" if others else ""
            raise ValueError(
                f"cannot read the image {files.root / first} ({damaged[first]}); repair or remove it{more}"
            ) from damaged[first]

    console = Console(stderr=True)
    title = f"reading {files.root.name}"
    return iter(track(blocks(), title, len(names), console=console, transient=True, disable=not console.is_terminal))


def _cached_pixels(name: str, shape: tuple[int, ...], make: Callable[[], Iterator[tuple[int, Pixels]]]) -> Tensor:
    """The images that ``make`` yields with their rows, in any order, as one tensor mapped from the cache folder.

    The file is the bytes followed by their SHA-256. Unlike `cached_arrays` it is neither built nor held in memory, so
    that a set of many gigabytes opens on a machine with less.
    """
    path = cache_folder() / name
    size = int(np.prod(shape))
    pixels = _map_pixels(path, size)
    if pixels is None:
        try:
            with atomic_write(path) as partial:
                with partial.open("wb") as file:
                    for row, image in make():
                        file.seek(row * image.size)
                        file.write(image.tobytes())
                with partial.open("r+b") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
                    file.write(digest)
            pixels = np.memmap(path, np.uint8, "c")[:size]
        except OSError as error:
            warnings.warn(
                f"could not keep {path} ({error}); set INNERLOOP_CACHE to a folder that can be written", stacklevel=2
            )
            pixels = np.empty(size, np.uint8)
            for row, image in make():
                pixels[row * image.size : (row + 1) * image.size] = image.ravel()
    return torch.from_numpy(pixels.reshape(shape))


def _map_pixels(path: Path, size: int) -> Pixels | None:
    if not path.is_file() or path.stat().st_size != size + hashlib.sha256().digest_size:
        return None
    content = np.memmap(path, np.uint8, "c")  # copy on write: torch wants memory that it could write
    if hashlib.sha256(content[:size].data).digest() != content[size:].tobytes():
        return None
    return content[:size]
