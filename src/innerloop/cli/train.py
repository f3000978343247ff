"""Meta-train a learner, test it on unseen classes, and leave a run folder with a report.

The defaults are the recipe of `make train`. Several processes: torchrun --nproc-per-node N -m innerloop train ...
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from innerloop.cli.arguments import add_settings, given_settings, usage_errors
from innerloop.errors import UsageError
from innerloop.learner import MetaLearner
from innerloop.tasks import TaskSource
from innerloop.training import processes
from innerloop.training.build import (
    arithmetic,
    build_learner,
    build_optimizer,
    build_tasks,
    choose_device,
    choose_threads,
    with_inner_rate,
)
from innerloop.training.checkpoints import load_checkpoint, take_weights
from innerloop.training.code import short
from innerloop.training.evaluation import assess
from innerloop.training.fit import BEST, LAST, fit, multi_step_weights
from innerloop.training.health import ailment, inner_losses, opening
from innerloop.training.methods import METHODS, method_settings
from innerloop.training.report import describe, ending, slug, task_words, write_report
from innerloop.training.runs import new_run, read_run
from innerloop.training.settings import SETTINGS, Settings, flag, read_config

# What may be given anew when a run is continued: nothing that would have changed the steps already taken.
FREE = ("steps", "minutes", "patience", "test_tasks", "device", "threads", "chunk_size", "compile")

USAGE = "[--out FOLDER] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="new folder for the run [runs/<what and when>]")
    parser.add_argument("--resume", metavar="FOLDER", type=Path, help="continue the run in this folder")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="settings in YAML, JSON or TOML; options win over it"
    )
    parser.add_argument(
        "--method", metavar="NAME",
        help=f"a method with its paper's settings; configuration and options win over it ({', '.join(METHODS)})",
    )  # fmt: skip
    add_settings(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, test and report."""
    with usage_errors():
        settings = _settings(arguments)
        device = choose_device(settings)
        most = torch.get_num_threads()
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
        optimizer, scheduler = build_optimizer(settings, learner)
        trial = _trial(settings, learner, tasks)
        trial()
        if settings.threads is None and device.type == "cpu":
            settings = replace(settings, threads=choose_threads(trial, most))
        begun = arguments.resume is not None and (arguments.resume / LAST).exists()
        fresh = None
        if settings.start_from is not None and not begun:
            fresh = take_weights(learner, Path(settings.start_from) / BEST)
        with arithmetic(settings):
            words, warning = opening(learner, tasks)
        folder = processes.agree(arguments.resume or arguments.out or _default_folder(settings))
        writes = processes.rank() == 0
        if begun:
            kinds = load_checkpoint(folder / LAST)["kinds"]  # a damaged one is refused here
            if kinds != {"optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__}:
                raise UsageError(f"{folder} was trained in Python: go on there, with il.fit(..., resume=True)")
        if writes and arguments.resume:
            settings.save(folder / SETTINGS)
        elif writes:
            new_run(folder, settings)
    if writes:
        size = sum(parameter.numel() for parameter in learner.parameters())
        threads = torch.get_num_threads()
        place = f"{device}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device
        shape = " x ".join(map(str, tasks.input_shape))
        print(
            f"{task_words(settings)}, inputs of {shape}: {short(settings.model)} with {size:,} meta-parameters on "
            f"{place}, into {folder}"
        )
        if fresh is not None:
            print(f"weights of {settings.start_from}" + (f"; left fresh: {fresh}" if fresh else ""))
        if words:
            print(words)
        if warning:
            print(f"warning: {warning}")

    try:
        with arithmetic(settings):
            fitted = fit(
                learner,
                tasks,
                steps=settings.steps,
                tasks_per_batch=settings.tasks_per_batch,
                optimizer=optimizer,
                scheduler=scheduler,
                clip=settings.clip,
                multi_step_loss=settings.multi_step_steps,
                first_order=settings.first_order_steps,
                validate_every=settings.validate_every,
                validation_tasks=settings.validation_tasks,
                patience=settings.patience,
                minutes=settings.minutes,
                folder=folder,
                resume=True,
                seed=settings.seed,
            )
            if writes:
                print(f"{ending(folder, settings, fitted)}\nnow the test")
            assessment = assess(learner, tasks, "test", settings.test_tasks, label="test")
            # Each point of the curve is one more pass over the queries: fewer tasks are enough for a picture.
            curve = assess(learner, tasks, "test", min(settings.test_tasks, 100), curve=True, label="curve")
            found = ailment(
                assessment.protocols[0], tasks.ways, inner_losses(learner, tasks, "test", settings.test_tasks)
            )
            warnings = [text for text in (warning, found) if text]
            if writes:
                write_report(folder, settings, learner, tasks, fitted, assessment, curve, warnings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; continue with: innerloop train --resume {folder}") from None
    if writes:
        print(describe(assessment, settings, "test"))
        if found:
            print(f"warning: {found}")
        print(f"report: {folder / 'report.md'}")
    processes.leave()


def _trial(settings: Settings, learner: MetaLearner, tasks: TaskSource) -> Callable[[], object]:
    """Takes the meta-gradient of one task, so that what does not go together is refused before there is a folder."""
    weights = multi_step_weights(learner.inner.steps, 0, 1) if settings.multi_step_loss else None
    mine, batch = copy.deepcopy(learner), tasks.batch("train", 0, 1)

    def trial() -> None:
        with arithmetic(settings):
            mine.meta_step(batch, step_weights=weights)

    return trial


def _settings(arguments: argparse.Namespace) -> Settings:
    given = given_settings(arguments)
    if arguments.resume is None:
        given = (read_config(arguments.config) if arguments.config else {}) | given
        preset = method_settings(arguments.method, given.get("dataset", Settings.dataset)) if arguments.method else {}
        return Settings(**preset | given)
    if arguments.out or arguments.config or arguments.method:
        raise UsageError("--resume takes its settings from the run folder; leave --out, --config and --method out")
    for name in given.keys() - set(FREE):
        raise UsageError(f"--{flag(name)} cannot change when a run is continued, only {', '.join(map(flag, FREE))} can")
    return read_run(arguments.resume, given)


def _default_folder(settings: Settings) -> Path:
    method = settings.meta_gradient.replace(":", "-")
    return Path("runs", f"{slug(settings)}-{method}-{datetime.now():%Y%m%d-%H%M%S}")
