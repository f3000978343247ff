"""What is done to a run to see what it survives: processes that are killed, files that are damaged.

Processes are forked from one that has loaded the library, so that a start costs next to nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from innerloop.cli import main
from innerloop.training import report, store
from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.settings import SETTINGS, Settings
from innerloop.training.store import LAST, METRICS, load_newest, read_records

STEPS = 24
TINY = [
    "--dataset=sinusoid", "--model=mlp", "--filters=4", "--inner=sgd", "--inner-lr=0.01", "--inner-steps=1",
    "--tasks-per-batch=2", "--device=cpu", "--threads=1", f"--steps={STEPS}", "--validate-every=6",
    "--validation-tasks=4", "--test-tasks=4", "--checkpoint-every=2", "--outer-lr=1e-3",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trials", "innerloop.cli.train", "torch.utils.tensorboard", "torch._dynamo"])


def without_pictures() -> None:
    """Which take longer than the run, and come when all is saved."""
    for name in ("plot_learning", "plot_adaptation", "plot_tasks"):
        setattr(report, name, lambda *_: False)


def command(output: Path, argv: list[str], before: Callable[..., None] | None, *given: Any) -> None:
    """In a process of its own: the command, its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    without_pictures()
    if before:
        before(*given)
    main(argv)


def end_of(run: Path) -> tuple[dict[str, Any], list[Any], Any]:
    """What a run comes to: its last checkpoint, its records without the time, the numbers of its test."""
    states = load_checkpoint(run / LAST)
    del states["progress"]["seconds"], states["progress"]["records"]
    records = [{**record, "seconds": None} for record in read_records(run / METRICS)]
    return states, records, json.loads((run / "results.json").read_text())["test"]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def die_in_a_write(calls: int) -> None:
    """Be killed at the so-manieth call that reaches the disk, before or after it."""
    left = [calls]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    os.truncate = counted(os.truncate)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]


def whole_run(run: Path) -> Path:
    """A run that nothing happens to."""
    output = run.with_name("output")
    process = CONTEXT.Process(target=command, args=(output, ["train", f"--out={run}", *TINY], None))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()
    return run


class Kill(NamedTuple):
    """A SIGKILL: whether it came in a call that reaches the disk, the steps that were recorded, those of them lost."""

    in_write: bool
    step: int
    lost: int


def killed_runs(folder: Path, count: int, expected: Any) -> tuple[list[Kill], Counter[str]]:
    """Kill trainings so often and resume them, until the last one has ended.

    Every other kill comes a random time after a random step, every other at a random call that reaches the disk.

    Returns:
        The kills, and what the runs came to: ``"equal"`` to ``expected``, as `end_of` gives it, ``"different"`` or
        ``"refused"``.
    """
    chance, kills, ends = random.Random(0), list[Kill](), Counter[str]()
    finished = False
    while len(kills) < count or not finished:
        run, output = folder / f"run{ends.total()}", folder / "output"
        which = ["--resume", str(run)] if (run / SETTINGS).exists() else [f"--out={run}", *TINY]
        alive = len(kills) >= count
        in_write = len(kills) % 2 == 1 and not alive
        before = (die_in_a_write, chance.randint(1, 120)) if in_write else (None,)
        process = CONTEXT.Process(target=command, args=(output, ["train", *which], *before))
        process.start()
        if not in_write and not alive:
            done = store.last_step(run / METRICS)
            target = chance.randint(done, STEPS)  # done: while it starts
            while process.is_alive() and store.last_step(run / METRICS) < target:
                process.join(0.003)
            process.join(chance.uniform(0.0, 0.2))
            process.kill()
        process.join(120)
        finished = process.exitcode != -signal.SIGKILL
        if finished:
            good = process.exitcode == 0
            ends["equal" if good and same(end_of(run), expected) else "different" if good else "refused"] += 1
        else:
            step, saved = store.last_step(run / METRICS), load_newest(run) if run.exists() else None
            kills.append(Kill(in_write, step, max(0, step - (saved["progress"]["step"] if saved else 0))))
    return kills, ends


class Damage(NamedTuple):
    """A damaged file: what was done to it, where (a share of its length), what came of it, and how much was lost."""

    file: str
    what: str
    place: float
    outcome: str
    lost: int


def damages(whole: Path, run: Path, count: int) -> Iterator[Damage]:
    """Damage each file of a copy of a run so often: a byte, 64 bytes, or all that follows.

    Args:
        whole: the run.
        run: where the copy goes.
        count: how often.
    """
    chance = random.Random(0)
    shutil.copytree(whole, run)
    for name, judge in ((LAST, _checkpoint), (SETTINGS, _settings), (METRICS, _records)):
        content = (run / name).read_bytes()
        judged = judge(run)
        for _ in range(count):
            place, damaged = chance.randrange(len(content)), bytearray(content)
            what = chance.choices(("a byte changed", "64 bytes zeroed", "the end cut off"), (64, 16, 20))[0]
            if what == "the end cut off":
                del damaged[place:]
            elif what == "64 bytes zeroed":
                damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
            else:
                damaged[place] ^= chance.randint(1, 255)
            (run / name).write_bytes(damaged)
            with warnings.catch_warnings(action="ignore"):
                outcome, lost = judged()
            yield Damage(name, what, place / len(content), outcome, lost)
        (run / name).write_bytes(content)


def _checkpoint(run: Path) -> Callable[[], tuple[str, int]]:
    newest, before = (load_checkpoint(file) for file in store.generations(run))

    def judge() -> tuple[str, int]:
        lost = newest["progress"]["step"] - before["progress"]["step"]
        return ("the one before is used", lost) if same(load_newest(run), before) else ("not noticed", 0)

    return judge


def _settings(run: Path) -> Callable[[], tuple[str, int]]:
    settings = Settings.load(run / SETTINGS)

    def judge() -> tuple[str, int]:
        try:
            read = Settings.load(run / SETTINGS)
        except (ValueError, OSError):
            return "refused", 0
        differ = sum(value != getattr(settings, key) for key, value in vars(read).items())
        return "taken for others" if differ else "the same", differ

    return judge


def _records(run: Path) -> Callable[[], tuple[str, int]]:
    records = read_records(run / METRICS)

    def judge() -> tuple[str, int]:
        found = read_records(run / METRICS)
        gone = len(records) - len(found)
        wrong = any(record not in records for record in found)
        return "wrong" if wrong else "lines left out" if gone else "the same", gone

    return judge
