"""The user's cache folder: files are written whole or not at all, and checked when they are read back."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """The folder of downloaded and rendered data, made when first needed: ``$INNERLOOP_CACHE``, or the user's cache."""
    return Path(os.environ.get("INNERLOOP_CACHE") or platformdirs.user_cache_dir("innerloop"))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; its file takes that place if the block succeeds and is deleted if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cached_arrays(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that ``make`` returns, made once and read from the cache folder from then on.

    The file ``name`` is the SHA-256 of an npz archive followed by the archive. A file that does not match its hash is
    made again. Where the folder cannot be written the arrays are made every time, with a warning.
    """
    path = cache_folder() / name
    arrays = _read(path)
    if arrays is None:
        arrays = make()
        archive = io.BytesIO()
        entries: dict[str, Any] = arrays  # savez has keywords of its own, which an array cannot be
        np.savez(archive, **entries)
        content = archive.getbuffer()
        try:
            with atomic_write(path) as partial, partial.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
        except OSError as error:
            warnings.warn(
                f"could not keep {path} ({error}); set INNERLOOP_CACHE to a folder that can be written", stacklevel=2
            )
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    with np.load(io.BytesIO(content[32:])) as archive:
        return dict(archive)
