"""The files of a folder or an archive, read within limits."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from lzma import LZMAError
from pathlib import Path

import numpy as np

from innerloop.tasks._cache import Arrays, cached_arrays

Stamp = tuple[int, ...]
MOST_BYTES = 2**28  # bytes that one image or list may take, 256 MiB
MOST_ARRAYS = 2**33  # bytes that the arrays of an npz may take together, 8 GiB
MOST_UNPACKED = 2**40  # bytes that all files of an archive may take unpacked, 1 TiB
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
        stamps: of each file, by its path below the root, the size and the times (in a zip, the checksum): what differs
            when the file does. Sorted by path.
        place: where the root is, and the stamp of a tar. With the stamps it names the content in the cache. None of a
            zip, whose checksums do so wherever it is.

    Raises:
        FileNotFoundError: there is no such folder or archive.
        ValueError: the archive is damaged, declares more than 1 TiB, or is no regular file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place: tuple[str, Stamp] | None = _place(root)
        if root.is_dir():
            stamps = _list_folder(root)
        elif not root.exists():
            raise FileNotFoundError(f"{root} does not exist; data= (--data) must name a folder or an archive")
        elif not root.is_file():
            raise ValueError(f"{root} is neither a folder nor a regular file; name a folder or an archive")
        elif _is_zip(root):
            stamps, self.place = _list_zip(root), None
        else:
            stamps = _list_tar(root)
        if sum(stamp[0] for stamp in stamps.values()) > MOST_UNPACKED:
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


def read_table(path: Path, content: bytes) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names in its first row.

    Raises:
        ValueError: it is no CSV file.
    """
    try:
        return list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8 ({error}); mend it, or leave it out") from error


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
            stamps[file.relative_to(root).as_posix()] = _stamp(file)
    warn_of_skipped(root, skipped)
    return stamps


def _stamp(file: Path) -> Stamp:
    """The time of modification can be set, and a copy may have that of its original; that of change cannot."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _place(root: Path) -> tuple[str, Stamp]:
    return str(root.resolve()), _stamp(root) if root.is_file() else ()


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

    key = hashlib.sha256(repr(_place(root)).encode()).hexdigest()[:16]
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
