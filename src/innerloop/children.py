"""Child processes that end with the process that started them, however that ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

LIFELINE = "INNERLOOP_LIFELINE"  # set for a child whose standard input closes when its parent ends
_tied: list[bool] = []


def tied(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of ``subprocess.Popen`` for a child that ends with this process, on SIGKILL too: see `end_with_parent`.

    The child's standard input is a pipe that only this process could write to, and never does.
    """
    return {"stdin": _pipe()[0], "env": {**environment, LIFELINE: "1"}}


@cache
def _pipe() -> tuple[int, int]:
    return os.pipe()


def end_with_parent() -> None:
    """In a child that was started with `tied`: be sent SIGTERM when its parent ends."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(LIFELINE, None):
        _tied.append(True)
        threading.Thread(target=watch, daemon=True).start()


def has_parent() -> bool:
    """Whether this process ends with the one that started it."""
    return bool(_tied)
