"""Text and JSON as files that are there whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from innerloop import files


def write(path: Path, content: bytes | str) -> None:
    """Write a file as `innerloop.files.write` does, and the folder is made where there is none.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content)


def write_json(path: Path, values: Any, indent: int = 2) -> None:
    """Write values as JSON; named tuples become lists.

    Raises:
        TypeError: JSON cannot hold a value.
    """
    write(path, json.dumps(values, indent=indent) + "\n")


def plain(value: Any) -> Any:
    """Named tuples as objects, and NaN, which JSON has not, as null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
