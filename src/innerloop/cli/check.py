"""Compare estimators of the meta-gradient with the exact one, on your own model and tasks.

RUN is a folder that innerloop train has written, checked with fresh weights and with its trained ones; a settings file
(YAML, JSON, TOML) is checked with fresh weights. The table and check.json say how far each estimator is from
the exact meta-gradient, task by task, and a sentence each says why and what helps.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from innerloop.choices import META_GRADIENT, check_name, make
from innerloop.cli.arguments import add_settings, given_settings, usage_errors, writing_results
from innerloop.errors import Failed, UsageError
from innerloop.files import check_writable
from innerloop.studies.check import ESTIMATORS, NO_STEP, Check, check, table
from innerloop.studies.costs import peak, save_tasks
from innerloop.tasks._episodes import SPLITS
from innerloop.training.build import arithmetic, build_learner, build_tasks, with_inner_rate
from innerloop.training.report import task_words
from innerloop.training.runs import load_learner, read_run, save_results
from innerloop.training.settings import Settings, read_config
from innerloop.training.store import resumable

FIELDS = ("model", "dataset", "data", "inner_lr", "inner_steps", "precision", "seed", "device", "threads")

USAGE = "RUN_OR_SETTINGS [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("what", metavar="RUN_OR_SETTINGS", type=Path, help="folder of a run, or settings file")
    parser.add_argument(
        "--estimators", metavar="NAMES", help=f"separated by commas [{','.join(ESTIMATORS)}, and the run's]"
    )
    parser.add_argument("--tasks", type=int, default=32, metavar="N", help="how many tasks [32]")
    parser.add_argument("--split", default="train", help="which tasks (train, validation, test) [train]")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where the results go [the run, or the current folder]"
    )
    add_settings(parser, FIELDS, run=True)


def run(arguments: argparse.Namespace) -> None:
    """Check, write and print the results."""
    console = Console(highlight=False)
    with usage_errors():
        check_name("split", arguments.split, SPLITS)
        if arguments.tasks < 1:
            raise UsageError(f"--tasks is {arguments.tasks}; a check needs 1 or more")
        if not arguments.what.exists():
            raise UsageError(f"{arguments.what} does not exist; give a run folder or a settings file")
        trained = arguments.what.is_dir()
        given = given_settings(arguments)
        if trained:
            settings = read_run(arguments.what, given)
        else:
            settings = replace(Settings(**read_config(arguments.what)), **given)
        if trained and "inner_lr" in given and settings.inner.startswith("learned-rates"):
            raise UsageError("--inner-lr changes nothing in a run that has learned its rates; leave it out")
        if not settings.inner_steps:
            raise UsageError(f"{NO_STEP} (--inner-steps)")
        estimators = _names(arguments.estimators) or list(dict.fromkeys([*ESTIMATORS, settings.meta_gradient]))
        for name in estimators:
            make("estimator", META_GRADIENT, name)
        tasks = build_tasks(settings, [arguments.split])
        settings = with_inner_rate(settings, tasks)
        fresh = build_learner(settings, tasks.input_shape, tasks.output_size, regression=tasks.ways is None)
        learners = {"fresh weights": fresh}
        if trained:
            learners["trained weights"] = load_learner(arguments.what, settings, tasks.output_size)[0]
        folder = arguments.out or (arguments.what if trained else Path())
        if not folder.is_dir():
            raise UsageError(f"--out {folder} is no folder; make it first, or name another")
        check_writable(folder)
    checks, kept = {}, folder / "check.partial.jsonl"
    for point, learner in learners.items():
        with arithmetic(settings), Console(stderr=True).status(f"{point}: {arguments.tasks} tasks"):
            checks[point] = check(learner, tasks, estimators, arguments.tasks, arguments.split, kept)
    if all(row.memory is None for found in checks.values() for row in found.rows):
        with Console(stderr=True).status("memory"):
            checks = _with_memory(checks, settings, arguments.split, kept)
    for point, found in checks.items():
        about = f"{point}: {found.tasks} {arguments.split} tasks, {task_words(settings)}\n{found.geometry}"
        console.print(about, soft_wrap=True, markup=False)
        console.print(table(found))
        for row in found.rows:
            console.print(row.sentence, soft_wrap=True, markup=False)
        console.print()
    with writing_results():
        save_results(folder / "check.json", {"settings": asdict(settings), **{p: asdict(c) for p, c in checks.items()}})
        kept.unlink(missing_ok=True)
    console.print("median (10-90 % of the tasks); one task at a time", soft_wrap=True)
    console.print(f"results: {folder / 'check.json'}", soft_wrap=True, markup=False)


def _with_memory(checks: dict[str, Check], settings: Settings, split: str, kept: Path) -> dict[str, Check]:
    """With the peak memory of each estimator, measured in fresh processes; it does not depend on the weights."""
    alone = replace(settings, tasks_per_batch=1)
    names = [row.name for row in next(iter(checks.values())).rows if not row.refused]
    with TemporaryDirectory() as scratch, resumable(kept, repr((alone, split, names))) as (sizes, keep):
        file = Path(scratch, "task.safetensors")
        save_tasks(file, alone, split)
        for place, name in enumerate(names):
            try:
                if place not in sizes:
                    sizes[place] = {"bytes": torch.tensor(peak(replace(alone, meta_gradient=name), file))}
                    keep(place, sizes[place])
            except Failed as error:
                print(f"the memory of {name} could not be measured: {error}", file=sys.stderr)
    memory = {names[place]: int(found["bytes"]) for place, found in sizes.items()}
    return {
        point: replace(found, rows=[replace(row, memory=memory.get(row.name)) for row in found.rows])
        for point, found in checks.items()
    }


def _names(text: str | None) -> list[str]:
    """The estimators of a list such as ``window:5,mixed:1=0.2,5=0.8``: numbers and name=value are arguments."""
    return [] if text is None else re.split(r",\s*(?=[A-Za-z][A-Za-z0-9-]*(?:[:,]|$))", text.strip())
