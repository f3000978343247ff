"""Score a trained run: accuracy with its 95 % interval, transductive and inductive, after 0, 1, ... adaptation steps.

Tasks are like those of the run unless options say otherwise. With other ways than in training every class starts from
the mean of the trained head's rows. Results go into the run folder, as JSON and PNG.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from innerloop.choices import check_name
from innerloop.cli.arguments import add_settings, given_settings, usage_errors, writing_results
from innerloop.errors import UsageError
from innerloop.files import check_writable
from innerloop.tasks._episodes import SPLITS
from innerloop.training.build import SOURCE_OPTIONS, arithmetic, build_tasks
from innerloop.training.code import is_code
from innerloop.training.confusion import confusion
from innerloop.training.evaluation import assess, evaluate
from innerloop.training.report import describe, plot_adaptation, slug, summary
from innerloop.training.runs import load_learner, read_run, save_results
from innerloop.training.settings import SETTINGS, read_config

SIZES = ("ways", "shots", "queries")
FIELDS = ("model", "dataset", *SOURCE_OPTIONS, *SIZES, "test_steps", "seed", "device", "threads", "chunk_size")

USAGE = "RUN [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that innerloop train has written")
    parser.add_argument("--tasks", dest="test_tasks", default="1000", metavar="N", help="how many tasks [1000]")
    parser.add_argument("--split", default="test", help="which tasks (train, validation, test) [test]")
    add_settings(parser, FIELDS, run=True)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and write the results."""
    with usage_errors():
        check_name("split", arguments.split, SPLITS)
        given = given_settings(arguments)
        settings = read_run(arguments.run, given)
        if settings.dataset != read_config(arguments.run / SETTINGS)["dataset"]:
            sizes = SIZES if is_code(settings.dataset) else ()
            settings = replace(settings, **dict.fromkeys((*SOURCE_OPTIONS, *sizes)) | given)
        tasks = build_tasks(settings, [arguments.split])
        learner, trained = load_learner(arguments.run, settings, tasks.output_size)
        if tuple(trained["input_shape"]) != tasks.input_shape or (trained["ways"] is None) != (tasks.ways is None):
            raise UsageError(
                f"{arguments.run} was trained on inputs of shape {trained['input_shape']}, but {settings.dataset} has "
                f"{list(tasks.input_shape)}; choose a data set of the same shape and kind"
            )
        evaluate(learner, tasks, arguments.split, 1)  # a model that does not fit the tasks is refused here
        check_writable(arguments.run)
    kept = arguments.run / "evaluate.partial.jsonl"
    with arithmetic(settings):
        assessment = assess(learner, tasks, arguments.split, settings.test_tasks, curve=True, kept=kept)
    name = f"evaluate-{slug(settings)}-{arguments.split}"
    mistaken = confusion(tasks, arguments.split, assessment.inductive.answers)
    results = {
        "run": str(arguments.run),
        "settings": given,
        "head": trained["head"],
        arguments.split: summary(assessment),
        "confusion": mistaken._asdict() if mistaken else None,
    }
    print(trained["head"])
    print(describe(assessment, settings, arguments.split))
    with writing_results():
        save_results(arguments.run / f"{name}.json", results)
        plot_adaptation(arguments.run / f"{name}.png", assessment, tasks.ways)
        kept.unlink(missing_ok=True)
    print(f"results: {arguments.run / name}.json, .png")
