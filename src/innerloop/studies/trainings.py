"""Several trainings, each a process of its own, some at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from innerloop.children import tied
from innerloop.errors import Failed
from innerloop.training.runs import RESULTS
from innerloop.training.settings import Settings
from innerloop.training.signals import heeded
from innerloop.training.store import METRICS, last_step

DIVERGED, OURS = 1, "innerloop: "  # how the command ends where training diverges
PATIENCE = 60  # seconds in which a training that is stopped has to write its checkpoint


class Training(NamedTuple):
    """One run of ``innerloop train``: its folder, its name for people, its settings, the seconds of a meta-step."""

    folder: Path
    name: str
    settings: Settings
    seconds: float


def train_all(trainings: Sequence[Training], jobs: int, console: Console) -> dict[Path, str]:
    """Train all that are not trained yet, so many at once; those that were interrupted are continued.

    Args:
        trainings: what to train.
        jobs: processes at once.
        console: gets a line whenever a training ends and, where it is a terminal, a bar over the seconds of meta-steps
            that are left.

    Returns:
        By the folder of each training that diverged: why.

    Raises:
        Failed: a training ended with another error; the others are stopped, and can be continued.
        KeyboardInterrupt: passed on, once every training has written its checkpoint.
    """
    failed: dict[Path, str] = {}
    waiting = [each for each in trainings if not (each.folder / RESULTS).exists()]
    running: dict[Training, subprocess.Popen[bytes]] = {}
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TimeElapsedColumn(), TimeRemainingColumn()
    total = _left(waiting)
    with _stopped(running), Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=total)
        while waiting or running:
            while waiting and len(running) < jobs:
                each = waiting.pop(0)
                running[each] = _start(each)
            time.sleep(0.2)
            for each in [each for each, process in running.items() if process.poll() is not None]:
                status = running.pop(each).returncode
                words = _last_words(each) if status else ""
                if status == DIVERGED and words.startswith(OURS):
                    failed[each.folder] = words.removeprefix(OURS)
                elif status:
                    raise Failed(f"training {each.name} failed: {words} (all of it: {_log(each)})")
                console.print(
                    f"{'diverged' if status else 'trained'}: {each.name}; {len(waiting) + len(running)} to go",
                    markup=False,
                )
            names = ", ".join(each.name for each in running)
            bar.update(row, completed=total - _left([*waiting, *running]), description=names)
    return failed


def command(training: Training) -> list[str]:
    """The command line that begins a training, or goes on with it; its settings are written beside its folder."""
    training.folder.parent.mkdir(parents=True, exist_ok=True)
    file = training.folder.parent / f"{training.folder.name}.json"
    training.settings.save(file)
    return ["innerloop", "train", "--config", str(file), "--out", str(training.folder)]


def _start(training: Training) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", *command(training)]
    with _log(training).open("ab") as log:
        # In a session of its own: Ctrl-C then reaches it once, from here.
        return subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True, **tied(os.environ))


def _log(training: Training) -> Path:
    return training.folder.parent / f"{training.folder.name}.log"


def _last_words(training: Training) -> str:
    lines = _log(training).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


@contextlib.contextmanager
def _stopped(running: Mapping[Training, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever ends the block, a signal too, no training goes on behind it; each writes its checkpoint first."""
    try:
        with heeded(at_once=True):
            yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _left(trainings: Sequence[Training]) -> float:
    """Seconds of meta-steps that are still to be done, as far as that is on disk."""
    return sum(each.seconds * (each.settings.steps - last_step(each.folder / METRICS)) for each in trainings)
