"""A comparison whose trainings are run elsewhere: written down as commands, and collected from what is there.

The commands share a folder and nothing else. Each begins its run, goes on with it where it was interrupted, and does
nothing where it is finished; so xargs, a Slurm array, Ray or Kubernetes may run them in any order, and again.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

from innerloop.files import write
from innerloop.studies.compare import MEASURED, Plan, begun, conclude, known_costs, measure, read_plan, trainings_of
from innerloop.studies.comparison import Comparison
from innerloop.studies.trainings import Training, steps_done, write_config
from innerloop.training.runs import RESULTS

COMMANDS = "commands.txt"


def write_plan(plan: Plan, folder: Path, progress: bool = True) -> list[str]:
    """Measure the methods and tune their outer rates, here and now, and write a command a training to ``commands.txt``.

    Args:
        plan: what is compared.
        folder: of the study, which all machines reach by this path.
        progress: as in `innerloop.studies.compare.compare`.

    Returns:
        The commands.

    Raises:
        ValueError: the folder holds another study.
        Failed: no method could be measured.
    """
    with begun(plan, folder, progress) as console:
        measure(plan, folder, console)
    commands = [_command(each) for each in trainings_of(plan, folder).values()]
    write(folder / COMMANDS, "".join(f"{command}\n" for command in commands))
    return commands


def collect(folder: Path) -> Comparison:
    """Make the report of a study from what is there; its notes say what is missing and what was timed where.

    Raises:
        FileNotFoundError: the folder holds no study, or no training is finished.
    """
    plan = read_plan(folder)
    failed = dict.fromkeys(plan.methods.keys() - known_costs(plan, folder), "its costs are not measured")
    trainings = trainings_of(plan, folder)
    missing = {each.folder: _missing(each) for each in trainings.values() if not (each.folder / RESULTS).exists()}
    if len(missing) == len(trainings):
        raise FileNotFoundError(f"no training in {folder} is finished; run the lines of {folder / COMMANDS} first")
    timed = Counter(_machine(file) for file in (folder / MEASURED).glob("*.json"))
    trained = Counter(_machine(each.folder / RESULTS) for each in trainings.values() if each.folder not in missing)
    notes = [f"timed on {_counted(timed)}; trained on {_counted(trained)}"]
    return conclude(plan, folder, trainings, failed, missing, notes)


def _command(training: Training) -> str:
    return shlex.join(["innerloop", "train", "--config", str(write_config(training)), "--out", str(training.folder)])


def _missing(training: Training) -> str:
    return f"not finished, {steps_done(training)} of {training.settings.steps} steps done: {_command(training)}"


def _machine(file: Path) -> str:
    made = json.loads(file.read_text(encoding="utf-8"))["machine"]
    return f"{made['gpu'] or made['processor']}, {made['threads']} threads"


def _counted(machines: Counter[str]) -> str:
    return " and ".join(f"{name} ({count})" for name, count in sorted(machines.items()))
