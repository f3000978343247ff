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
from pathlib import Path
from shlex import quote

from innerloop.cli.arguments import add_settings, default_folder, given_settings, names, usage_errors, whole_numbers
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
        "--methods", metavar="NAME,...", type=names,
        help=f"{', '.join(f'{name}:{each.example}' if each.example else name for name, each in KNOWN.items())} "
        f"[{','.join(METHODS)}]",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="TIME", type=_minutes,
        help="of meta-steps for each method and seed, such as 90s, 10m or 1h; --steps N bounds by steps instead "
        f"[{MINUTES:g}m]",
    )  # fmt: skip
    parser.add_argument("--seeds", metavar="N", type=int, help="trainings of each method [1]")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="trainings at once; timings are taken alone [1]"
    )
    parser.add_argument(
        "--set", metavar="METHOD.SETTING=VALUE", type=_change, action="append",
        help=f"a setting of one method, such as maml.inner-lr=0.1; may be given again ({', '.join(map(flag, CHOSEN))})",
    )  # fmt: skip
    parser.add_argument(
        "--memory-steps", metavar="N,N,...", type=whole_numbers,
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
        if arguments.collect:
            _refuse_all_but(arguments, "collect")
            _tell(collect(arguments.collect), arguments.collect)
            return
        if arguments.resume:
            _refuse_all_but(arguments, "resume")
            found, folder = read_plan(arguments.resume), arguments.resume
        else:
            found = _plan(arguments)
            dataset = next(iter(found.methods.values())).dataset
            folder = arguments.out or default_folder(f"compare-{dataset}")
        if arguments.plan:
            commands = write_plan(found, folder)
            print(f"{len(commands)} trainings: {folder / COMMANDS}; then:")
            print(f"innerloop compare --collect {quote(str(folder))}")
            return
        try:
            comparison = carry_out(found, folder, arguments.jobs)
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            raise Stopped(number, f"stopped; go on with: innerloop compare --resume {quote(str(folder))}") from None
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


def _refuse_all_but(arguments: argparse.Namespace, option: str) -> None:
    free = ("command", option, "jobs")
    if given := [name for name, value in vars(arguments).items() if value is not None and name not in free]:
        raise UsageError(f"--{option} takes all from the folder; leave --{flag(given[0])} out")


def _plan(arguments: argparse.Namespace) -> Plan:
    changes: dict[str, dict[str, str]] = {}
    for method, name, value in arguments.set or ():
        changes.setdefault(method, {})[name] = value
    options = {name: getattr(arguments, name) for name in ("methods", "memory_steps", "seeds", "tune")}
    given = {name: value for name, value in (options | {"minutes": arguments.budget}).items() if value is not None}
    return plan(**given_settings(arguments), **given, changes=changes)


def _minutes(text: str) -> float:
    found = seconds(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}; give a number and its unit, such as 90s, 10m or 1h")
    return found / 60


def _change(text: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"(.+)\.([\w-]+)=(.*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; write METHOD.SETTING=VALUE, such as maml.inner-lr=0.1")
    return found[1], found[2].replace("-", "_"), found[3]
