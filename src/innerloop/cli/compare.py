"""Train methods side by side on the same tasks, model and budget, and say which to use.

Every method has its paper's settings (innerloop train --method), unless an option here sets one for all of them, or
--set for one of them; its outer rate is tuned first (--tune). Writes report.html, report.md, comparison.json and all
runs to a folder; an interrupted comparison goes on with --resume. --plan leaves the trainings to other machines,
--collect reports on what they did.
"""

from __future__ import annotations

import argparse
import re
import signal
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from innerloop.cli.arguments import add_settings, given_settings, usage_errors, whole_numbers
from innerloop.errors import Stopped, UsageError
from innerloop.studies.compare import (
    CHOSEN,
    MEMORY_STEPS,
    METHODS,
    MINUTES,
    OWN,
    Plan,
    carry_out,
    plan,
    read_plan,
)
from innerloop.studies.comparison import Comparison, recommend
from innerloop.studies.comparison_report import HTML
from innerloop.studies.plan import COMMANDS, collect, write_plan
from innerloop.studies.tuning import BUDGET, RATES
from innerloop.training.choices import seconds
from innerloop.training.methods import METHODS as KNOWN
from innerloop.training.settings import Settings, flag

USAGE = "[--methods NAME,NAME,...] [--budget TIME] [options]"
OTHERWISE = dict.fromkeys(CHOSEN, "the method's") | {"steps": "as many as --budget allows", "threads": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="new folder [runs/compare-<what and when>]")
    parser.add_argument("--resume", metavar="FOLDER", type=Path, help="go on with the comparison in this folder")
    parser.add_argument(
        "--methods", metavar="NAME,...",
        help=f"{', '.join(f'{name}:{each.example}' if each.example else name for name, each in KNOWN.items())} "
        f"[{','.join(METHODS)}]",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="TIME",
        help="of meta-steps for each method and seed, such as 90s, 10m or 1h; --steps N bounds by steps instead "
        f"[{MINUTES:g}m]",
    )  # fmt: skip
    parser.add_argument("--seeds", metavar="N", type=int, help="trainings of each method [1]")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="trainings at once; timings are taken alone [1]"
    )
    parser.add_argument(
        "--set", metavar="METHOD.SETTING=VALUE", action="append",
        help=f"a setting of one method, such as maml.inner-lr=0.1; may be given again ({', '.join(map(flag, CHOSEN))})",
    )  # fmt: skip
    parser.add_argument(
        "--memory-steps", metavar="N,N,...",
        help=f"inner steps at which memory is measured [{','.join(map(str, MEMORY_STEPS))}]",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true", default=None,
        help="measure and tune, and write commands.txt to the folder, a training a line, for other machines",
    )  # fmt: skip
    parser.add_argument(
        "--collect", metavar="FOLDER", type=Path, help="report on what the commands of --plan have done so far"
    )
    parser.add_argument(
        "--tune", metavar="N", type=int,
        help=f"outer rates tried for each method on validation tasks, in {100 * BUDGET:g} %% of a training's steps "
        f"together; 0 takes each method's own [{RATES}]",
    )  # fmt: skip
    add_settings(parser, {each.name for each in fields(Settings)} - {*OWN, "minutes"}, otherwise=OTHERWISE)


def run(arguments: argparse.Namespace) -> None:
    """Measure, train, test and report."""
    with usage_errors():
        if arguments.plan:
            found = _plan(arguments)
            folder = arguments.out or _default_folder(found)
            commands = write_plan(found, folder)
            print(f"{len(commands)} trainings: {folder / COMMANDS}; then: innerloop compare --collect {folder}")
            return
        if arguments.collect:
            _refuse_all_but(arguments, "collect")
            _tell(collect(arguments.collect), arguments.collect)
            return
        if arguments.resume:
            found, folder = _resumed(arguments), arguments.resume
        else:
            found = _plan(arguments)
            folder = arguments.out or _default_folder(found)
        try:
            comparison = carry_out(found, folder, arguments.jobs)
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            raise Stopped(number, f"stopped; go on with: innerloop compare --resume {folder}") from None
    _tell(comparison, folder)


def _tell(comparison: Comparison, folder: Path) -> None:
    for name, why in comparison.failed.items():
        print(f"{name} could not be trained: {why}")
    for note in comparison.notes:
        print(note)
    print(comparison.first_line)
    choice = recommend(comparison)
    print(choice.first, choice.rest)
    print(f"report: {folder / HTML}")


def _resumed(arguments: argparse.Namespace) -> Plan:
    _refuse_all_but(arguments, "resume")
    return read_plan(arguments.resume)


def _refuse_all_but(arguments: argparse.Namespace, option: str) -> None:
    free = ("command", option, "jobs")
    if given := [name for name, value in vars(arguments).items() if value is not None and name not in free]:
        raise UsageError(f"--{option} takes all from the folder; leave --{flag(given[0])} out")


def _plan(arguments: argparse.Namespace) -> Plan:
    given = given_settings(arguments)
    if arguments.budget is not None:
        given["minutes"] = _minutes(arguments.budget)
    if arguments.memory_steps is not None:
        given["memory_steps"] = whole_numbers("--memory-steps", arguments.memory_steps)
    if arguments.set is not None:
        given["changes"] = _changes(arguments.set)
    given |= {name: getattr(arguments, name) for name in ("seeds", "tune") if getattr(arguments, name) is not None}
    return plan(METHODS if arguments.methods is None else _names(arguments.methods), **given)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _minutes(text: str) -> float:
    found = seconds(text)
    if found is None:
        raise UsageError(f"--budget is {text!r}; give a number and its unit, such as 90s, 10m or 1h")
    return found / 60


def _changes(given: list[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    for text in given:
        found = re.fullmatch(r"(.+)\.([\w-]+)=(.*)", text)
        if not found:
            raise UsageError(f"--set {text!r}; write METHOD.SETTING=VALUE, such as maml.inner-lr=0.1")
        changes.setdefault(found[1], {})[found[2].replace("-", "_")] = found[3]
    return changes


def _default_folder(found: Plan) -> Path:
    first = next(iter(found.methods.values()))
    return Path("runs", f"compare-{first.dataset}-{datetime.now():%Y%m%d-%H%M%S}")
