"""Meta-train a learner, test it on unseen classes, and leave a run folder with a report.

The defaults are the recipe of `make train`. Several processes: torchrun --nproc-per-node N -m innerloop train ...
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from innerloop.children import has_parent
from innerloop.cli.arguments import add_settings, default_folder, given_settings, usage_errors
from innerloop.errors import Failed, Stopped, UsageError
from innerloop.learner import MetaLearner
from innerloop.tasks import TaskSource
from innerloop.training import processes
from innerloop.training.build import (
    arithmetic,
    build_learner,
    build_optimizer,
    build_outer,
    build_tasks,
    choose_device,
    choose_threads,
    with_inner_rate,
)
from innerloop.training.checkpoints import take_weights
from innerloop.training.code import is_code, remember, short
from innerloop.training.evaluation import assess
from innerloop.training.fit import fit, replay
from innerloop.training.health import ailment, inner_losses, opening
from innerloop.training.methods import METHODS, method_settings, unasked
from innerloop.training.report import describe, ending, slug, task_words, write_report
from innerloop.training.runs import RESULTS, is_run_of, keep_open, new_folder, read_run
from innerloop.training.session import multi_step_weights
from innerloop.training.settings import SETTINGS, Settings, flag, read_config
from innerloop.training.store import BEST, load_newest, locked

# What may be given anew when a run is continued: nothing that would have changed the steps already taken.
FREE = (
    "steps", "minutes", "patience", "test_tasks", "outer_lr", "clip", "on_nonfinite", "checkpoint_every",
    "keep_checkpoints", "device", "threads", "chunk_size", "compile",
)  # fmt: skip
PATIENCE = 60.0  # seconds in which a training of an earlier, killed comparison has to end

USAGE = "[--out FOLDER] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="new folder for the run [runs/<what and when>]")
    parser.add_argument("--resume", metavar="FOLDER", type=Path, help="continue the run in this folder")
    parser.add_argument(
        "--replay", metavar=("RUN", "STEP"), nargs=2, help="compute one step of a run again and say what is in it"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="settings in YAML, JSON or TOML; options win over it"
    )
    parser.add_argument(
        "--method", metavar="NAME",
        help="a method with its paper's settings; configuration and options win over it; without it or an option of a "
        f"method, pretrained for colour pictures ({', '.join(METHODS)})",
    )  # fmt: skip
    add_settings(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, test and report."""
    if arguments.replay:
        with usage_errors():
            print(_replay(arguments))
        return
    with ExitStack() as stack:
        with usage_errors():
            settings, most = _settings(arguments), torch.get_num_threads()
            asked = settings
            if arguments.out is arguments.resume is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                raise UsageError("a run that torchrun restarts needs a folder that it finds again: give --out FOLDER")
            again = bool(arguments.out) and is_run_of(arguments.out, settings)
            if again and (arguments.out / RESULTS).exists():
                print(f"finished before; report: {arguments.out / 'report.md'}")
                return
            if again:
                settings = read_run(arguments.out)  # with what was measured for it
            settings, learner, tasks, outer = _built(settings)
            trial = _trial(settings, learner, tasks)
            try:
                trial()
            except (RuntimeError, AssertionError, TypeError) as error:
                raise UsageError(
                    f"an outer step on one task fails: {str(error).splitlines()[0]}; another model, size or optimizer "
                    "may do"
                ) from error
            if settings.threads is None and choose_device(settings).type == "cpu":
                settings = replace(settings, threads=choose_threads(trial, most))
            begun, fresh = arguments.resume and _begun(arguments.resume, settings, outer), None
            if settings.start_from is not None and not begun:
                fresh = take_weights(learner, Path(settings.start_from) / BEST)
            with arithmetic(settings):
                words, warning = opening(learner, tasks)
            name = f"{slug(settings)}-{settings.meta_gradient.replace(':', '-')}"
            folder = processes.agree(arguments.resume or arguments.out or default_folder(name))
            writes = processes.rank() == 0
            if writes:
                new = not arguments.resume and not again
                if new:
                    new_folder(folder)
                stack.enter_context(locked(folder, PATIENCE if has_parent() else 0.0))
                settings.save(folder / SETTINGS)
                if new:
                    keep_open(folder, asked)
                remember(*filter(is_code, (settings.model, settings.dataset)))
        if writes:
            _announce(settings, learner, tasks, folder)
            if fresh is not None:
                print(f"weights of {settings.start_from}" + (f"; left fresh: {fresh}" if fresh else ""))
            if words:
                print(words)
            if warning:
                print(f"warning: {warning}")
        command = f"innerloop train --resume {quote(str(folder))}"
        try:
            _train(settings, learner, tasks, outer, folder, warning)
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            raise Stopped(number, f"stopped; continue with: {command}") from None
        except Failed as error:
            raise Failed(f"{error}; continue with: {command}") from error
        except OSError as error:
            raise Failed(f"{error}; the last checkpoint is whole: mend that, then continue with: {command}") from error
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
    processes.leave()


def _built(settings: Settings) -> tuple[Settings, MetaLearner, TaskSource, dict[str, Any]]:
    """The learner and its tasks, what was measured for them, and what the outer loop is told to train and to replay."""
    device = choose_device(settings)
    if settings.threads or device.type == "cpu":
        torch.set_num_threads(settings.threads or 1)  # until it is known what pays
    processes.join(device)
    with processes.rank_0_first():
        tasks = build_tasks(settings)
    processes.check_batch(settings.tasks_per_batch)  # before there is a folder
    if settings.dataset == "folder":
        settings = replace(settings, size=tasks.input_shape[-1])  # also where it was left to the images
    settings = processes.agree(with_inner_rate(settings, tasks))
    trained_on = settings.method()[2].trains_on(tasks)
    learner = build_learner(settings, tasks.input_shape, trained_on.output_size, regression=tasks.ways is None)
    return settings, learner, tasks, build_outer(settings, learner)


def _begun(folder: Path, settings: Settings, outer: dict[str, Any]) -> bool:
    """Whether a folder holds steps already, which these settings can continue."""
    states = load_newest(folder)  # a damaged one is refused here
    if states is None:
        return False
    done = states["progress"]["step"]
    if done > settings.steps:
        raise ValueError(f"{folder} has done {done} outer steps; --steps {settings.steps} is less: give {done} or more")
    if any(states["identity"][name] != type(outer[name]).__name__ for name in ("optimizer", "scheduler")):
        raise UsageError(f"{folder} was trained in Python: go on there, with il.fit(..., resume=True)")
    return True


def _announce(settings: Settings, learner: MetaLearner, tasks: TaskSource, folder: Path) -> None:
    size = sum(parameter.numel() for parameter in learner.parameters())
    device, threads = choose_device(settings), torch.get_num_threads()
    place = f"{device}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device
    shape = " x ".join(map(str, tasks.input_shape))
    print(
        f"{task_words(settings)}, inputs of {shape}: {short(settings.model)} with {size:,} meta-parameters on "
        f"{place}, into {folder}"
    )
    if (reach := learner.meta_gradient.reach) > learner.inner.steps:
        what = f"{settings.meta_gradient} reaches back {reach} inner steps"
        print(f"innerloop: {what} and there are {learner.inner.steps}: it takes them all", file=sys.stderr)


def _train(
    settings: Settings, learner: MetaLearner, tasks: TaskSource, outer: dict[str, Any], folder: Path, warning: str
) -> None:
    writes = processes.rank() == 0
    with arithmetic(settings):
        fitted = fit(
            learner,
            tasks,
            steps=settings.steps,
            validate_every=settings.validate_every,
            validation_tasks=settings.validation_tasks,
            patience=settings.patience,
            minutes=settings.minutes,
            folder=folder,
            resume=True,
            checkpoint_every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            on_nonfinite=settings.on_nonfinite,
            **outer,
        )
        if writes:
            print(f"{ending(folder, settings, fitted)}\nnow the test")
        kept = folder / "test.partial.jsonl"
        assessment = assess(learner, tasks, "test", settings.test_tasks, label="test", kept=kept)
        # Each point of the curve is one more pass over the queries: fewer tasks are enough for a picture.
        few = min(settings.test_tasks, 100)
        curve = assess(learner, tasks, "test", few, curve=True, label="curve", kept=kept)
        found = ailment(assessment.protocols[0], tasks.ways, inner_losses(learner, tasks, "test", settings.test_tasks))
        if writes:
            print(describe(assessment, settings, "test"))
            if found:
                print(f"warning: {found}")
            warnings = [text for text in (warning, found) if text]
            write_report(folder, settings, learner, tasks, fitted, assessment, curve, warnings)
            kept.unlink(missing_ok=True)
            print(f"report: {folder / 'report.md'}")


def _replay(arguments: argparse.Namespace) -> str:
    folder, step = Path(arguments.replay[0]), arguments.replay[1]
    if not (step.isascii() and step.isdecimal() and int(step) > 0):
        raise UsageError(f"--replay RUN {step!r}; give a step of the run, a whole number from 1 on")
    settings, learner, tasks, outer = _built(read_run(folder, given_settings(arguments)))
    with arithmetic(settings):
        return replay(learner, tasks, int(step), folder=folder, **outer)


def _trial(settings: Settings, learner: MetaLearner, tasks: TaskSource) -> Callable[[], object]:
    """Takes an outer step on one task, so that what does not go together is refused before there is a folder."""
    weights = multi_step_weights(learner.inner.steps, 0, 1) if settings.multi_step_loss else None
    mine, batch = copy.deepcopy(learner), tasks.batch("train", 0, 1)
    mine.compiler = None  # which takes half a minute, and a lone task has a shape that the run does not see again
    optimizer, _ = build_optimizer(settings, mine)

    def trial() -> None:
        with arithmetic(settings):
            optimizer.zero_grad()
            mine.meta_step(batch, step_weights=weights, task_ids=[0] if mine.carry == "task" else None)
            optimizer.step()

    return trial


def _settings(arguments: argparse.Namespace) -> Settings:
    given = given_settings(arguments)
    if arguments.resume is None:
        given = (read_config(arguments.config) if arguments.config else {}) | given
        dataset = given.get("dataset", Settings.dataset)
        preset = method_settings(arguments.method, dataset) if arguments.method else unasked(dataset, given)
        return Settings(**preset | given)
    if arguments.out or arguments.config or arguments.method:
        raise UsageError("--resume takes its settings from the run folder; leave --out, --config and --method out")
    for name in given.keys() - set(FREE):
        raise UsageError(f"--{flag(name)} cannot change when a run is continued, only {', '.join(map(flag, FREE))} can")
    return read_run(arguments.resume, given)
