"""What stops a process or asks it to save: signals, and the end of the process that started it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

from innerloop.errors import Stopped

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVE = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
LIFELINE = "INNERLOOP_LIFELINE"  # set for a child whose standard input closes when its parent ends


class Signals:
    """What was asked for within a block of `heeded`.

    Attributes:
        at_once: whether a signal to stop raises `Stopped` where it arrives; otherwise it is noted in ``stop``.
        stop: its number, once there was one; a second one raises.
        save: whether to save was asked for since this was last set to False.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once, self.stop, self.save = at_once, 0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of all of them."""
        if number in SAVE:
            self.save = True
        elif self.at_once or self.stop:
            raise Stopped(number)
        else:
            self.stop = number

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Within the block nothing is changed that an interrupt could leave half-done."""
        if self.stop:
            raise Stopped(self.stop)
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


@contextmanager
def heeded(at_once: bool) -> Iterator[Signals]:
    """Within the block signals to stop and to save are heeded, except those that are ignored, as by nohup.

    Only the main thread can do this; elsewhere signals stay as they are.
    """
    heed, before = Signals(at_once), {}
    if threading.current_thread() is threading.main_thread():
        numbers = [number for number in (*STOP, *SAVE) if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, heed) for number in numbers}
    try:
        yield heed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

    if has_parent():
        threading.Thread(target=watch, daemon=True).start()


def has_parent() -> bool:
    """Whether this process ends with the one that started it."""
    return LIFELINE in os.environ
