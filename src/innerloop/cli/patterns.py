"""Find the blocks whose adaptation is fastest within a quality budget.

Every pattern of moving blocks is judged on validation tasks and timed. The fastest is taken of those at most the
tolerance below full adaptation, with the whole 95 % interval of the difference. It is confirmed on test tasks and
written to pattern.json in the run folder, beside a table and a picture. More tasks make the interval narrower.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from shlex import quote

import torch

from innerloop.cli.arguments import add_settings, given_settings, names, usage_errors, whole_numbers
from innerloop.errors import UsageError
from innerloop.files import check_writable
from innerloop.studies.patterns import CHOICE, PAGE, confirmation, movable_blocks, save_study, study, title
from innerloop.training.build import arithmetic, build_tasks
from innerloop.training.runs import load_learner, read_run
from innerloop.training.settings import SETTINGS

USAGE = "RUN [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that innerloop train has written")
    parser.add_argument(
        "--tolerance", metavar="X", type=float, default=1.0,
        help="accuracy that may be lost against full adaptation, in percentage points [1.0]",
    )  # fmt: skip
    parser.add_argument(
        "--steps", dest="numbers", metavar="N,N,...", type=whole_numbers, default=[1, 5, 10],
        help="numbers of adaptation steps; the run's own, else the largest, is the one deployed [1,5,10]",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", dest="count", metavar="N", type=int, default=600, help="validation tasks, and test tasks [600]"
    )
    parser.add_argument(
        "--repetitions", metavar="N", type=int, default=100, help="adaptations timed for each pattern [100]"
    )
    parser.add_argument("--inductive", action="store_true", help="predict each query without seeing the others")
    parser.add_argument(
        "--parts", metavar="NAME,...", type=names, default=[],
        help="the model's blocks in forward order, where it does not declare them: names of sub-modules",
    )  # fmt: skip
    add_settings(parser, ("model", "dataset", "data", "device", "threads", "chunk_size"), run=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure, choose, confirm and write."""
    with usage_errors():
        settings = read_run(arguments.run, given_settings(arguments))
        check_writable(arguments.run)
        tasks = build_tasks(settings, ("validation", "test"))
        learner, _ = load_learner(arguments.run, settings, tasks.output_size)
        parts = arguments.parts or list(getattr(learner.adapts, "parts", ()))
        try:
            movable_blocks(learner, parts)
        except ValueError as error:
            if not learner.rates and learner.few_shot.start is None:
                raise
            plain = learner.meta_gradient.joint or not learner.inner.steps
            still = " --inner-steps 5 --meta-gradient unrolled --batch-norm batch" if plain else ""
            given = quote(str(arguments.run / SETTINGS))
            again = f"innerloop train --config {given} --adapts everything --start none{still} --out NEW"
            raise UsageError(f"{error}; write {again}") from error
        kept = arguments.run / "patterns.partial.jsonl"
        asked = {name: getattr(arguments, name) for name in ("tolerance", "count", "repetitions", "inductive")}
        asked["parts"] = parts
        with arithmetic(settings):
            sections = study(learner, tasks, arguments.numbers, **asked, progress=partial(print, flush=True), kept=kept)
    notes = {
        "run": str(arguments.run),
        **asked,
        "device": str(next(learner.parameters()).device),
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
    }
    section = save_study(arguments.run, sections, learner.inner.adaptation_steps, notes)
    kept.unlink()
    for each in sections:
        print(f"{title(each)}: {confirmation(each)}")
    print(f"{section.chosen.pattern} in {section.steps} steps: {arguments.run / CHOICE}; all: {arguments.run / PAGE}")
