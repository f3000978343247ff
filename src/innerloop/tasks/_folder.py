"""The user's own images: one folder a class."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path

from innerloop.tasks._episodes import SPLITS, Episodes, recorded
from innerloop.tasks._files import Files, read_table
from innerloop.tasks._images import image_set, split_folders
from innerloop.tasks._pictures import is_image, size_of

FRACTIONS = (0.6, 0.2, 0.2)
LAYOUT = (
    "data= (--data) takes a folder (or zip, or tar) with one folder of images a class, or with such folders in train/, "
    "validation/ and test/"
)


@recorded
def folder(
    data: str | PathLike[str] | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    size: int | None = None,
    channels: int = 3,
    split: str | PathLike[str] | Sequence[float] | None = None,
    group: str | None = None,
    augment: str | None = None,
) -> Episodes:
    """Few-shot tasks of the user's own images, ``[channels, size, size]``.

    Every image file below a class folder is an image of that class; formats that Pillow reads only with another program
    (EPS) do not count, and dead links and files without permission are left out with a warning. An image is turned
    upright as its EXIF data says, the largest centred square is cut out and resized, and the result is kept in the
    cache folder for as long as no file changes. Classes may have different numbers of images.

    Args:
        data: a folder, zip or tar of class folders.
        ways: classes in a task.
        shots: support examples a class.
        queries: query examples a class.
        seed: selects the stream of tasks; which class is in which split does not depend on it.
        size: height and width; by default the median of what the shorter sides of the images are, at most 84.
        channels: 1 for grey, 3 for colour.
        split: how classes are divided. Three fractions for training, validation and testing, as numbers or as text such
            as ``"0.6,0.2,0.2"``: classes are ordered by a hash of their names. Or a CSV file with the columns
            ``class,split``; classes that it does not list are left out. By default the sub-folders ``train``,
            ``validation`` (or ``val``) and ``test`` that hold the class folders, or where there are none, the fractions
            0.6, 0.2 and 0.2. A split that gets a fraction of 0 is left out.
        group: what shows the same object, patient or video, so that within a class it is never in support and query of
            the same task. A regular expression, found in the path below the class folder: the group is what its
            parentheses hold, or all of it. Or a column of a CSV file with a column ``file``, as in
            ``frames.csv:patient``; files go by their path below ``data``, or by their name alone.
        augment: ``"flip"`` (left to right), ``"crop"`` (shifts by up to an eighth) or ``"flip,crop"``, of training
            images alone.

    Raises:
        FileNotFoundError: no ``data``, or nothing at that place.
        ValueError: another layout, fewer than two classes, a split or groups that do not fit, damaged images, or
            tasks too large for the images.

    Example:
        >>> tasks = il.tasks.folder("birds", ways=5, shots=1, queries=5, group=r"^(.*)_frame")
    """
    if data is None:
        raise FileNotFoundError(f"folder needs your images; {LAYOUT}")
    if (size is not None and size < 1) or channels not in (1, 3):
        raise ValueError(f"size is {size} and channels is {channels}; size must be at least 1, and channels 1 or 3")
    files = Files(Path(data).expanduser())
    images = [file for file in files.stamps if is_image(file)]
    layout = split_folders(images) if split is None else None
    depth = 1 if layout is None else 2
    if layout is None:
        classes: dict[str, list[str]] = {}
        for file in images:
            label, _, rest = file.partition("/")
            if rest:
                classes.setdefault(label, []).append(file)
        if not classes:
            raise ValueError(f"{files.root} has no class folders with images in them; {LAYOUT}")
        if len(classes) == 1:
            raise ValueError(
                f"{files.root} has one class folder with images, {next(iter(classes))!r}, and tasks tell classes "
                f"apart; {LAYOUT}"
            )
        homes = split_classes(split, list(classes))
        layout = {split: {label: classes[label] for label in labels} for split, labels in homes.items()}
    used = [file for members in layout.values() for mine in members.values() for file in mine]
    groups = _groups(group, files.root, used, depth) if group is not None else None
    stored = image_set("folder", files, layout, size or size_of(files, used), channels, crop=True, groups=groups)
    return Episodes(stored, ways, shots, queries, seed, augment)


def split_classes(split: str | PathLike[str] | Sequence[float] | None, classes: Sequence[str]) -> dict[str, list[str]]:
    """The classes of each split, by three fractions or a CSV file; see `folder`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other fractions, or a list that does not fit.
    """
    fractions = _fractions(FRACTIONS if split is None else split)
    return _by_list(Path(str(split)), classes) if fractions is None else _by_fraction(fractions, classes)


def _groups(group: str, root: Path, images: Sequence[str], depth: int) -> dict[str, str]:
    """The group of each image, by a regular expression on its path below so many folders or by a column of a CSV."""
    table, _, column = group.rpartition(":")
    if table.lower().endswith(".csv"):
        return _by_column(Path(table).expanduser(), column, root, images)
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"group {group!r} is no regular expression ({error}): give one, or FILE.csv:COLUMN") from error
    found = {image: pattern.search("/".join(image.split("/")[depth:])) for image in images}
    groups = {image: match[min(pattern.groups, 1)] or "" for image, match in found.items() if match}
    if lacking := [image for image in images if not groups.get(image)]:
        raise ValueError(
            f"group {group!r} is found in {len(images) - len(lacking)} of {len(images)} image paths of {root}, and not "
            f"in {lacking[0]!r}: give a regular expression that matches all, such as '^[^_]+', or FILE.csv:COLUMN"
        )
    return groups


def _by_column(table: Path, column: str, root: Path, images: Sequence[str]) -> dict[str, str]:
    if not table.is_file():
        raise FileNotFoundError(f"group names {table}, which does not exist; give FILE.csv:COLUMN")
    rows = read_table(table, table.read_bytes())
    if not rows or not {"file", column} <= rows[0].keys():
        raise ValueError(f"{table} needs the columns file,{column}; it has {','.join(rows[0]) if rows else 'no rows'}")
    named = {row["file"]: row[column] for row in rows}
    groups = {image: named.get(image, named.get(image.rpartition("/")[2], "")) for image in images}
    if lacking := [image for image in images if not groups[image]]:
        raise ValueError(
            f"{table} names a group for {len(images) - len(lacking)} of {len(images)} images of {root}, and none for "
            f"{lacking[0]!r}: list each in the column file, by its path below {root.name} or by its name"
        )
    return groups


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


def _by_fraction(fractions: Sequence[float], classes: Sequence[str]) -> dict[str, list[str]]:
    order = sorted(classes, key=lambda label: hashlib.sha256(label.encode("utf-8", "surrogateescape")).digest())
    ends = [round(total * len(order)) for total in accumulate(fractions)]
    starts = [0, *ends]
    parts = zip(SPLITS, fractions, starts, ends, strict=False)
    return {split: order[start:end] for split, fraction, start, end in parts if fraction > 0}


def _by_list(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"split is {str(path)!r}, which is neither three fractions nor a file; give 0.6,0.2,0.2 or a CSV"
        )
    homes: dict[str, list[str]] = {}
    for row in read_table(path, path.read_bytes()):
        label, split = row.get("class"), row.get("split")
        if label not in classes or split not in SPLITS:
            raise ValueError(
                f"{path}: class {label!r} in split {split!r} does not fit; it needs the columns class,split with the "
                f"name of a class folder and one of {', '.join(SPLITS)}"
            )
        homes.setdefault(split, []).append(str(label))
    return homes
