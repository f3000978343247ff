"""What stops a process or asks it to save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from innerloop.errors import Stopped

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVE = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


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
