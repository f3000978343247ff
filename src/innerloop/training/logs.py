"""Where the numbers of a run go besides its records: TensorBoard, and a progress display.

Each is a callable that takes one record after another, a flat dict with ``kind``, ``step``, ``seconds`` since training
began, and the numbers. Kinds are "train", once a step, "validation", "skipped" for a batch that was left out, and
"changed" for a setting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, track

from innerloop.training.store import Record

Log = Callable[[Record], None]
T = TypeVar("T")


class TensorBoard:
    """Scalars ``train/...``, every tenth step, and ``validation/...``; hides a killed session's after step ``keep``."""

    def __init__(self, folder: Path, keep: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=keep + 1)

    def __call__(self, record: Record) -> None:
        if record["kind"] == "train" and record["step"] % 10:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()


def tracked(items: Sequence[T], label: str) -> Iterable[T]:
    """Items, with a bar on a terminal while they are gone through; without one where the label is empty."""
    console = Console()
    return track(items, label, console=console, transient=True, disable=not (label and console.is_terminal))


class ProgressDisplay:
    """A live bar on a terminal; elsewhere a line at each validation and every half minute.

    Args:
        steps: outer steps of the whole run.
        start: the step that this session starts from.
        seconds: time that this session may take; infinite where only the steps bound it.
        console: where to write; standard output by default.
    """

    def __init__(self, steps: int, start: int, seconds: float = math.inf, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._steps, self._start, self._step, self._seconds = steps, start, start, seconds
        self._began = self._spoke = time.monotonic()
        self._loss: float | None = None
        self._validation = ""
        self._bar: Progress | None = None
        if self._console.is_terminal:
            text = TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=None)
            self._bar = Progress(*text, TextColumn("{task.fields[status]}"), console=self._console, expand=True)
            self._row = self._bar.add_task("step", total=steps, completed=start, status="")
            self._bar.start()

    def __call__(self, record: Record) -> None:
        if record["kind"] == "train":
            self._step = record["step"]
            # The loss of one batch jumps about; what is shown is an average over about twenty.
            self._loss = record["loss"] if self._loss is None else 0.95 * self._loss + 0.05 * record["loss"]
        elif record["kind"] == "skipped":
            self._step = record["step"]
            self.say(f"step {record['step']} skipped: {record['why']}")
        elif record["kind"] == "changed":
            self.say(f"from step {record['step']} on: {record['what']}")
        elif record["accuracy"] is not None:
            self._validation = f"validation {record['accuracy']:.1%}"
        else:
            self._validation = f"validation loss {record['loss']:.4g}"
        if self._bar:
            self._bar.update(self._row, completed=self._step, status=self._status())
        elif record["kind"] == "validation" or time.monotonic() - self._spoke > 30:
            self._spoke = time.monotonic()
            self.say(f"step {self._step}/{self._steps}  {self._status()}")

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(message, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def _status(self) -> str:
        elapsed = time.monotonic() - self._began
        rate = (self._step - self._start) / elapsed if elapsed else 0.0
        parts = [f"{rate:.2f} steps/s"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4g}")
        if self._validation:
            parts.append(self._validation)
        if rate:
            left = max(0, round(min((self._steps - self._step) / rate, self._seconds - elapsed)))
            hours, minutes = divmod(left // 60, 60)
            parts.append(f"{f'{hours}:{minutes:02}' if hours else minutes}:{left % 60:02} left")
        return "  ".join(parts)
