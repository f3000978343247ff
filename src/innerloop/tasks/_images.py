"""Image files, in a folder or an archive, read once into one tensor of bytes."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import logging
import os
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.tasks._cache import Arrays, atomic_write, cache_folder, cached_arrays
from innerloop.tasks._episodes import ImageSet

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]

Stamp = tuple[int, int]

Layout = dict[str, dict[str, list[str]]]
"""The image files of each class of each split."""

LARGEST = 84  # pixels a side that images are left at most, unless a size is asked for: those of miniImageNet
MEASURED = 200  # images that are looked at to find the usual size
DECODING = 2
"""Version of `decode`; to be raised by any change that alters an image, since it names the cached file."""

SPLITS = ("train", "validation", "test")
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}

MOST_BYTES = 2**28  # bytes that one image or list may take, 256 MiB
MOST_ARRAYS = 2**33  # bytes that the arrays of an npz may take together, 8 GiB
MOST_UNPACKED = 2**40  # bytes that all files of an archive may take unpacked, 1 TiB

# Those that Pillow reads by itself. Of the others EPS, for one, starts Ghostscript on whatever the file says.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")

_BROKEN = (
    OSError, EOFError, RuntimeError, ValueError, MemoryError,
    zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError,
)  # fmt: skip


class Files:
    """The files of a folder, a zip or a tar, read without unpacking.

    Hidden files and the shadow copies that macOS leaves in archives do not count. Links that lead nowhere, files that
    cannot be read and whatever is no regular file are left out, with a warning that counts them. An archive that wraps
    everything in one folder is read as that folder.

    Attributes:
        root: the folder or archive.
        stamps: of each file, by its path below the root, the size and the time (in a zip, the checksum): what differs
            when the file does. Sorted by path.

    Raises:
        FileNotFoundError: there is no such folder or archive.
        ValueError: the archive is damaged, declares more than 1 TiB, or is no regular file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if root.is_dir():
            stamps = _list_folder(root)
        elif not root.exists():
            raise FileNotFoundError(f"{root} does not exist; data= (--data) must name a folder or an archive")
        elif not root.is_file():
            raise ValueError(f"{root} is neither a folder nor a regular file; name a folder or an archive")
        elif _is_zip(root):
            stamps = _list_zip(root)
        else:
            stamps = _list_tar(root)
        if sum(size for size, _ in stamps.values()) > MOST_UNPACKED:
            raise ValueError(f"{root} declares more than {MOST_UNPACKED >> 40} TiB of files; give fewer")
        stamps = {name: stamp for name, stamp in sorted(stamps.items()) if not _hidden(name)}
        tops = {name.partition("/")[0] + "/" for name in stamps}
        self._prefix = tops.pop() if len(tops) == 1 and not root.is_dir() else ""
        self.stamps = {name.removeprefix(self._prefix): stamp for name, stamp in stamps.items()}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the named files, in whatever order they are read fastest.

        Raises:
            ValueError: the archive is damaged, or a file cannot be read or declares more than 256 MiB.
        """
        for name in names:
            if self.stamps[name][0] > MOST_BYTES:
                size = self.stamps[name][0] >> 20
                raise ValueError(
                    f"{self.root / name} takes {size:,} MiB, more than the {MOST_BYTES >> 20} MiB of an image"
                )
        wanted = {self._prefix + name: None for name in names}
        read = _read_folder if self.root.is_dir() else _read_zip if _is_zip(self.root) else _read_tar
        try:
            for name, content in read(self.root, wanted):
                yield name.removeprefix(self._prefix), content
        except _BROKEN as error:
            raise _damaged(self.root, error) from error


def read_npz(path: Path, names: Collection[str]) -> Arrays:
    """The named arrays of an npz file.

    Raises:
        ValueError: the file is damaged, lacks one of the arrays, or declares more than 8 GiB.
    """
    try:
        with zipfile.ZipFile(path) as entries:
            declared = sum(item.file_size for item in entries.infolist())
        if declared > MOST_ARRAYS:
            raise ValueError(f"it declares {declared >> 30:,} GiB of arrays")
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(names) - set(archive.files))
            arrays = {} if missing else {name: archive[name] for name in names}
    except _BROKEN as error:
        raise _damaged(path, error) from error
    if missing:
        raise ValueError(f"{path} has no array {', '.join(missing)}; is it the file that data= (--data) should name?")
    return arrays


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of a format which Pillow reads by itself, `FORMATS`."""
    from PIL import Image

    return Image.registered_extensions().get(os.path.splitext(name)[1].lower(), "") in {*FORMATS} & Image.OPEN.keys()


def open_image(content: bytes) -> Image.Image:
    """An image file in one of `FORMATS`, not yet decoded.

    Raises:
        ValueError: it is in no such format.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:  # whose message is the address of the bytes
        raise ValueError("in no format that is read here") from None


def read_bytes(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (a pipe or a device would not end), or takes more than 256 MiB.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        raise ValueError(f"no regular file of at most {MOST_BYTES >> 20} MiB")
    return path.read_bytes()


def decode(content: bytes, size: int, channels: int, crop: bool = True) -> Pixels:
    """The image in a file's bytes as uint8 ``[channels, size, size]``, upright as its EXIF data says.

    Args:
        content: a file in one of `FORMATS`; of several frames the first, on white where it is transparent.
        size: height and width to resize to (Lanczos).
        channels: 1 for grey, 3 for colour.
        crop: cut the largest centred square out first; otherwise the image is squeezed.

    Raises:
        Exception: Pillow cannot read it. Its decoders raise nearly anything where an image is damaged.
    """
    return pixels_of(upright(content, size), size, channels, crop)


def upright(content: bytes, size: int) -> Image.Image:
    """The image in a file's bytes, grey or RGB, turned as its EXIF data says, on white where it is transparent.

    Args:
        content: as in `decode`.
        size: the side that will be asked for. A JPEG of many megapixels may come at a half, a quarter or an eighth of
            its own size, no less than four times what is asked.

    Raises:
        Exception: as `decode`.
    """
    from PIL import ImageOps

    with open_image(content) as file:
        file.draft(None, (4 * size, 4 * size))
        return plain(ImageOps.exif_transpose(file))


def plain(image: Image.Image) -> Image.Image:
    """A Pillow image in grey or RGB, on white where it is transparent."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L", "I", "F") else "RGB")


def pixels_of(image: Image.Image, size: int, channels: int, crop: bool = True) -> Pixels:
    """A Pillow image as uint8 ``[channels, size, size]``; arguments as in `decode`."""
    from PIL import Image

    image = plain(image).convert("L" if channels == 1 else "RGB")
    if crop:  # before resizing, so that no version of Pillow reads beyond the square or chooses the order of its passes
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def usual_size(sides: Sequence[int]) -> int:
    """The side to which images are resized where none is asked for: the median of their shorter sides, at most 84."""
    size = min(LARGEST, int(np.median(sides)))
    logging.getLogger("innerloop").info("images become %d x %d pixels: set size for another side", size, size)
    return size


def size_of(files: Files, names: Sequence[str]) -> int:
    """`usual_size` of some images, judged by up to 200 of them.

    Raises:
        ValueError: none can be read.
    """
    sides = []
    for _, content in files.read(names[:: len(names) // MEASURED + 1]):
        with contextlib.suppress(Exception), open_image(content) as image:  # see `decode`
            sides.append(min(image.size))
    if not sides:
        raise ValueError(f"cannot read the images of {files.root}: repair them, or name another folder")
    return usual_size(sides)


def read_table(path: Path, content: bytes) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names in its first row.

    Raises:
        ValueError: it is no CSV file.
    """
    try:
        return list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8 ({error}); mend it, or leave it out") from error


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
    key = hashlib.sha256(repr((DECODING, stamps, size, channels, crop)).encode()).hexdigest()[:16]
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

    def decode_one(item: tuple[str, bytes]) -> tuple[str, Pixels]:
        name, content = item
        try:
            return name, decode(content, size, channels, crop)
        except Exception as error:  # see `decode`
            raise ValueError(f"cannot read the image {files.root / name} ({error}); repair or remove it") from error

    def blocks() -> Iterator[tuple[str, Pixels]]:
        contents = files.read(names)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while block := list(islice(contents, 64)):
                yield from pool.map(decode_one, block)

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


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _is_zip(root: Path) -> bool:
    return root.suffix.lower() == ".zip" or zipfile.is_zipfile(root)


def _list_folder(root: Path) -> dict[str, Stamp]:
    stamps = {}
    skipped: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=lambda error: skipped.append(error.filename), followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        if (real := os.path.realpath(folder)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if _hidden(name):
                continue
            file = Path(folder, name)
            if not regular(file):
                skipped.append(str(file))
                continue
            status = file.stat()
            stamps[file.relative_to(root).as_posix()] = (status.st_size, status.st_mtime_ns)
    warn_of_skipped(root, skipped)
    return stamps


def regular(file: Path) -> bool:
    """Whether it is a regular file, or a link to one, that can be read."""
    return file.is_file() and os.access(file, os.R_OK)


def warn_of_skipped(root: Path, skipped: Sequence[str]) -> None:
    """Count what was left out because it cannot be read, if anything."""
    if skipped:
        warnings.warn(
            f"{str(root)!r}: {len(skipped)} left out that cannot be read (links that lead nowhere, pipes, devices, no "
            f"permission), such as {os.path.relpath(min(skipped), root)!r}",
            stacklevel=2,
        )


def _list_zip(root: Path) -> dict[str, Stamp]:
    try:
        with zipfile.ZipFile(root) as archive:
            return {item.filename: (item.file_size, item.CRC) for item in archive.infolist() if not item.is_dir()}
    except _BROKEN as error:
        raise _damaged(root, error) from error


def _list_tar(root: Path) -> dict[str, Stamp]:
    """Kept in the cache folder, since the list of a compressed tar is found only by unpacking all of it."""

    def make() -> Arrays:
        try:
            with tarfile.open(root) as archive:
                items, size = [], 0
                for item in archive:
                    if item.isfile():
                        items.append(item)
                        size += item.size
                    if size > MOST_UNPACKED:
                        raise ValueError(f"it declares more than {MOST_UNPACKED >> 40} TiB")
        except _BROKEN as error:
            raise _damaged(root, error) from error
        stamps = np.array([(item.size, int(item.mtime)) for item in items], np.int64)
        return {"names": np.array([item.name.removeprefix("./") for item in items], str), "stamps": stamps}

    status = root.stat()
    key = hashlib.sha256(repr((root.resolve(), status.st_size, status.st_mtime_ns)).encode()).hexdigest()[:16]
    listed = cached_arrays(f"listing-{key}.npz", make)
    return {str(name): (int(size), int(time)) for name, (size, time) in zip(*listed.values(), strict=True)}


def _read_folder(root: Path, wanted: dict[str, None]) -> Iterator[tuple[str, bytes]]:
    for name in wanted:
        yield name, read_bytes(root / name)


def _read_zip(root: Path, wanted: dict[str, None]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(root) as archive:
        for name in archive.namelist():
            if name in wanted:
                yield name, archive.read(name)


def _read_tar(root: Path, wanted: dict[str, None]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(root) as archive:
        for item in archive:
            name = item.name.removeprefix("./")
            if item.isfile() and name in wanted:
                if item.size > MOST_BYTES:  # of two files of a name the list has the other
                    raise ValueError(f"{name} takes more than {MOST_BYTES >> 20} MiB")
                content = archive.extractfile(item)
                assert content is not None  # it is a file
                yield name, content.read()


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"cannot read {path} ({reason}); it is damaged or incomplete, so fetch it again")
