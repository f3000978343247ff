"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside, bring it to the disk, and only then give it its name.

    Whatever ends the process meanwhile, a loss of power too, leaves the old file or the new one.

    Args:
        path: the file; its folder is made where there is none.
        content: all of it.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name != "nt":  # Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, values: Any, indent: int = 2) -> None:
    """`write_bytes` of values as JSON; named tuples become lists.

    Raises:
        TypeError: JSON cannot hold a value.
    """
    write_text(path, json.dumps(values, indent=indent) + "\n")
