"""Several trainings, each a process of its own, some at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from innerloop.children import tied
from innerloop.errors import Failed
from innerloop.training.runs import RESULTS
from innerloop.training.settings import SETTINGS, Settings
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


def train_all(trainings: Sequence[Training], jobs: int, bar: Progress) -> dict[Path, str]:
    """Train all that are not trained yet, so many at once; those that were interrupted are continued.

    Args:
        trainings: what to train.
        jobs: processes at once.
        bar: in its only row the seconds of meta-steps still to do become the rest of the total, and advance; where
            there is no terminal, its console gets a line whenever a training ends.

    Returns:
        By the folder of each training that diverged: why.

    Raises:
        Failed: a training ended with another error; the others are stopped, and can be continued.
        KeyboardInterrupt: passed on, once every training has written its checkpoint.
    """
    failed: dict[Path, str] = {}
    waiting = [each for each in trainings if not (each.folder / RESULTS).exists()]
    running: dict[Training, subprocess.Popen[bytes]] = {}
    show = _display(trainings, waiting, bar)
    with _stopped(running):
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
            show(waiting, running)
    return failed


def write_config(training: Training) -> Path:
    """The settings of a training as a file that ``--config`` takes, beside its folder."""
    training.folder.parent.mkdir(parents=True, exist_ok=True)
    file = training.folder.parent / f"{training.folder.name}.json"
    training.settings.save(file)
    return file


def _start(training: Training) -> subprocess.Popen[bytes]:
    folder = training.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).exists():
        arguments = ["--resume", str(folder)]
    else:
        arguments = ["--config", str(write_config(training)), "--out", str(folder)]
    with _log(training).open("ab") as log:
        command = [sys.executable, "-m", "innerloop", "train", *arguments]
        # In a session of its own: Ctrl-C then reaches it once, from here.
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **tied(os.environ))


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


def _display(
    trainings: Sequence[Training], waiting: Sequence[Training], bar: Progress
) -> Callable[[Collection[Training], Collection[Training]], None]:
    """What shows how far the trainings are, given those that wait and those that run.

    ``waiting`` are those that wait before any runs: what is left of them is what the bar has still to cover.
    """
    (row,) = bar.tasks
    end = row.completed + _left(waiting)
    bar.update(row.id, total=end)
    told: set[Path] = set()

    def show(waiting: Collection[Training], running: Collection[Training]) -> None:
        names = ", ".join(each.name for each in running)
        bar.update(row.id, completed=end - _left([*waiting, *running]), description=names)
        if not bar.console.is_terminal:
            for number, each in enumerate(trainings, 1):
                if each.folder not in told and (each.folder / RESULTS).exists():
                    told.add(each.folder)
                    bar.console.print(f"trained {each.name} ({number} of {len(trainings)})")

    return show


def _left(trainings: Sequence[Training]) -> float:
    """Seconds of meta-steps that are still to be done, as far as that is on disk."""
    return sum(each.seconds * (each.settings.steps - steps_done(each)) for each in trainings)


def steps_done(training: Training) -> int:
    """Of an unfinished training."""
    return last_step(training.folder / METRICS)
