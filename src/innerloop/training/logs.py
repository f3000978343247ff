"""Where the numbers of a run go besides its records: TensorBoard, and a progress display.

Each is a callable that takes one record after another, a flat dict with ``kind``, ``step``, ``seconds`` since training
began, and the numbers. Kinds are "train", once a step, "validation", "skipped" for a batch that was left out, and
"changed" for a setting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, track

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
    """

    def __init__(self, steps: int, start: int, seconds: float = math.inf) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._steps, self._start, self._step, self._seconds = steps, start, start, seconds
        self._began = self._spoke = time.monotonic()
        self._told: dict[str, str] = {}
        self._loss = math.nan
        columns = "{task.description}", MofNCompleteColumn(), BarColumn(bar_width=None), "{task.fields[status]}"
        self._bar = Progress(*columns, console=self._console, expand=True, disable=not self._console.is_terminal)
        self._row = self._bar.add_task("step", total=steps, completed=start, status="")
        self._bar.start()

    def __call__(self, record: Record) -> None:
        kind, self._step = record["kind"], record["step"]
        if kind == "train":
            # The loss of one batch jumps about; what is shown is an average over about twenty.
            self._loss = record["loss"] if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * record["loss"]
            self._told["train"] = f"loss {self._loss:.4g}"
        elif kind == "validation":
            accuracy, loss = record["accuracy"], record["loss"]
            self._told[kind] = f"validation loss {loss:.4g}" if accuracy is None else f"validation {accuracy:.1%}"
        elif kind == "skipped":
            self._console.print(f"step {self._step} skipped: {record['why']}", markup=False)
        else:
            self._console.print(f"from step {self._step} on: {record['what']}", markup=False)
        self._bar.update(self._row, completed=self._step, status=self._status())
        if not self._console.is_terminal and (kind == "validation" or time.monotonic() - self._spoke > 30):
            self._spoke = time.monotonic()
            self._console.print(f"step {self._step}/{self._steps}  {self._status()}", markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def _status(self) -> str:
        elapsed = time.monotonic() - self._began
        rate = (self._step - self._start) / elapsed if elapsed else 0.0
        parts = [f"{rate:.2f} steps/s", *self._told.values()]
        if rate:
            left = max(0, round(min((self._steps - self._step) / rate, self._seconds - elapsed)))
            parts.append(f"{timedelta(seconds=left)} left")
        return "  ".join(parts)
