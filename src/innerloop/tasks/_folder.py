"""The user's own images: one folder a class."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path

from innerloop.tasks._episodes import Episodes
from innerloop.tasks._images import SPLITS, Files, image_set, is_image, split_folders

FRACTIONS = (0.6, 0.2, 0.2)
LAYOUT = (
    "data= (--data) takes a folder (or zip, or tar) with one folder of images a class, or with such folders in train/, "
    "validation/ and test/"
)


def folder(
    data: str | PathLike[str] | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    size: int = 84,
    channels: int = 3,
    split: str | PathLike[str] | Sequence[float] | None = None,
) -> Episodes:
    """Few-shot tasks of the user's own images, ``[channels, size, size]``.

    Every file below a class folder that Pillow can open is an image of that class. It is turned upright as its EXIF
    data says, the largest centred square is cut out and resized, and the result is kept in the cache folder for as
    long as no file changes. Classes may have different numbers of images.

    Args:
        data: a folder, zip or tar of class folders.
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks; which class is in which split does not depend on it.
        size: height and width.
        channels: 1 for grey, 3 for colour.
        split: how classes are divided. Three fractions for training, validation and testing, as numbers or as text such
            as ``"0.6,0.2,0.2"``: classes are ordered by a hash of their names. Or a CSV file with the columns
            ``class,split``; classes that it does not list are left out. By default the sub-folders ``train``,
            ``validation`` (or ``val``) and ``test`` that hold the class folders, or where there are none, the fractions
            0.6, 0.2 and 0.2. A split that gets a fraction of 0 is left out.

    Raises:
        FileNotFoundError: no ``data``, or nothing at that place.
        ValueError: another layout, a split that does not fit, an unreadable image, or tasks too large for the images.
    """
    if data is None:
        raise FileNotFoundError(f"folder needs your images; {LAYOUT}")
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"size is {size} and channels is {channels}; size must be at least 1, and channels 1 or 3")
    files = Files(Path(data).expanduser())
    images = [file for file in files.stamps if is_image(file)]
    layout = split_folders(images) if split is None else None
    if layout is None:
        classes: dict[str, list[str]] = {}
        for file in images:
            label, _, rest = file.partition("/")
            if rest:
                classes.setdefault(label, []).append(file)
        if not classes:
            raise ValueError(f"{files.root} has no class folders with images in them; {LAYOUT}")
        fractions = _fractions(FRACTIONS if split is None else split)
        homes = _by_list(Path(str(split)), classes) if fractions is None else _by_fraction(fractions, classes)
        layout = {split: {label: classes[label] for label in labels} for split, labels in homes.items()}
    return Episodes(image_set("folder", files, layout, size, channels, crop=True), ways, shots, queries, seed)


def _fractions(split: str | PathLike[str] | Sequence[float]) -> list[float] | None:
    """Three fractions given as numbers or text; None where ``split`` is the path of a list."""
    if isinstance(split, PathLike):
        return None
    try:
        fractions = [float(part) for part in (split.split(",") if isinstance(split, str) else split)]
    except ValueError:
        return None
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"split is {split!r}; it must be three fractions that add up to 1, for {', '.join(SPLITS)}, or a CSV file"
        )
    return fractions


def _by_fraction(fractions: Sequence[float], classes: dict[str, list[str]]) -> dict[str, list[str]]:
    order = sorted(classes, key=lambda label: hashlib.sha256(label.encode()).digest())
    ends = [round(total * len(order)) for total in accumulate(fractions)]
    starts = [0, *ends]
    parts = zip(SPLITS, fractions, starts, ends, strict=False)
    return {split: order[start:end] for split, fraction, start, end in parts if fraction > 0}


def _by_list(path: Path, classes: dict[str, list[str]]) -> dict[str, list[str]]:
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"split is {str(path)!r}, which is neither three fractions nor a file; give 0.6,0.2,0.2 or a CSV"
        )
    homes: dict[str, list[str]] = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()):
        label, split = row.get("class"), row.get("split")
        if label not in classes or split not in SPLITS:
            raise ValueError(
                f"{path}: class {label!r} in split {split!r} does not fit; it needs the columns class,split with the "
                f"name of a class folder and one of {', '.join(SPLITS)}"
            )
        homes.setdefault(split, []).append(label)
    return homes
