"""Files that are written whole or not at all, and are still there after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".part"  # how a file ends that is still being written


def write(path: Path, content: bytes | str, ready: Callable[[], object] | None = None) -> None:
    """Write a file aside, see it to the disk, and put it in its place in one move.

    Args:
        path: the file; what it held before stays until the new content is on the disk.
        content: text is written as UTF-8.
        ready: called once the content is on the disk, before it takes its place.

    Raises:
        OSError: with the file's name, for a full disk too.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # never through a link that lies there
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if ready is not None:
            ready()
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def shown(text: str) -> str:
    """Text for a terminal: control characters and bytes that are no UTF-8, as names of files may hold, are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def sync_folder(folder: Path) -> None:
    """See the names in a folder to the disk, where the system can do that."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def clean(folder: Path) -> None:
    """Delete what a killed process left half-written; call it while no other process writes there."""
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def check_writable(folder: Path, cure: str = "copy it") -> None:
    """Try to write to a folder, which is made if need be, before what should go there is computed.

    Args:
        folder: where.
        cure: what to do beside making it writable.

    Raises:
        OSError: it cannot be written; the message names the cure.
    """
    trial = folder / f"trial.{os.getpid()}{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"0")
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}), and the results go there: make it writable, or {cure}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
