"""Several trainings, each a process of its own, some at once, under one progress bar."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from innerloop.studies.measure import Failed
from innerloop.training.fit import METRICS
from innerloop.training.logs import read_records
from innerloop.training.runs import RESULTS, SETTINGS
from innerloop.training.settings import Settings

DIVERGED, OURS = 1, "innerloop: "  # how the command ends where training diverges
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no hang-up
PATIENCE = 60  # seconds in which a training that is stopped has to write its checkpoint


class Training(NamedTuple):
    """One run of ``innerloop train``: its folder, its name for people, its settings."""

    folder: Path
    name: str
    settings: Settings


def train_all(trainings: Sequence[Training], jobs: int, console: Console) -> dict[Path, str]:
    """Train all that are not trained yet, so many at once; those that were interrupted are continued.

    Args:
        trainings: what to train.
        jobs: processes at once.
        console: where progress is shown.

    Returns:
        By the folder of each training that diverged: why.

    Raises:
        Failed: a training ended with another error; the others are stopped, and can be continued.
        KeyboardInterrupt: passed on, once every training has written its checkpoint.
    """
    failed: dict[Path, str] = {}
    waiting = [each for each in trainings if not (each.folder / RESULTS).exists()]
    running: dict[Training, subprocess.Popen[bytes]] = {}
    with _display(trainings, console) as show, _stopped(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                each = waiting.pop(0)
                running[each] = _start(each, jobs)
            time.sleep(0.2)
            for each in [each for each, process in running.items() if process.poll() is not None]:
                status = running.pop(each).returncode
                words = _last_words(each) if status else ""
                if status == DIVERGED and words.startswith(OURS):
                    failed[each.folder] = words.removeprefix(OURS)
                elif status:
                    raise Failed(f"training {each.name} failed: {words} (all of it: {_log(each)})")
            show(running)
    return failed


def _start(training: Training, jobs: int) -> subprocess.Popen[bytes]:
    folder = training.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).exists():
        arguments = ["--resume", str(folder)]
    else:
        config = folder.parent / f"{folder.name}.json"
        training.settings.save(config)
        arguments = ["--config", str(config), "--out", str(folder)]
    environment = {**os.environ}
    if training.settings.threads is None and jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with _log(training).open("ab") as log:
        command = [sys.executable, "-m", "innerloop", "train", *arguments]
        # In a session of its own: Ctrl-C then reaches it once, from here.
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
        )


def _log(training: Training) -> Path:
    return training.folder.parent / f"{training.folder.name}.log"


def _last_words(training: Training) -> str:
    lines = _log(training).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


@contextlib.contextmanager
def _stopped(running: Mapping[Training, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever ends the block, Ctrl-C, a termination signal or a closed terminal too, no training goes on behind it.

    Each writes its checkpoint first.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = {stop: signal.signal(stop, interrupt) for stop in STOPS} if here else {}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def _display(trainings: Sequence[Training], console: Console) -> Iterator[Callable[[Collection[Training]], None]]:
    """A bar over the outer steps of all trainings; where there is no terminal, a line whenever one ends."""
    total = sum(each.settings.steps for each in trainings)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TimeElapsedColumn(), TimeRemainingColumn()
    ended: set[Path] = set()
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("training", total=total, completed=sum(map(_steps_done, trainings)))

        def show(running: Collection[Training]) -> None:
            names = ", ".join(each.name for each in running)
            bar.update(row, completed=sum(map(_steps_done, trainings)), description=names)
            if not console.is_terminal:
                for number, each in enumerate(trainings, 1):
                    if each.folder not in ended and (each.folder / RESULTS).exists():
                        ended.add(each.folder)
                        console.print(f"trained {each.name} ({number} of {len(trainings)})")

        yield show


def _steps_done(training: Training) -> int:
    """Outer steps done, as far as they are on disk."""
    if (training.folder / RESULTS).exists():
        return training.settings.steps
    file = training.folder / METRICS
    records = read_records(file) if file.exists() else []
    return int(records[-1]["step"]) if records else 0
