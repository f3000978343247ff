"""A comparison whose trainings are run elsewhere: written down as commands, and collected from what is there.

The commands share a folder and nothing else. Each begins its run, goes on with it where it was interrupted, and does
nothing where it is finished; so xargs, a Slurm array, Ray or Kubernetes may run them in any order, and again.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from innerloop.files import write
from innerloop.studies.compare import MEASURED, Plan, begun, conclude, known_costs, measure, read_plan, trainings_of
from innerloop.studies.comparison import Comparison
from innerloop.studies.trainings import Training, command
from innerloop.training.runs import RESULTS
from innerloop.training.store import METRICS, last_step

COMMANDS = "commands.txt"


def write_plan(plan: Plan, folder: Path) -> list[str]:
    """Measure the methods and tune their outer rates, here and now, and write a command a training to ``commands.txt``.

    Args:
        plan: what is compared.
        folder: of the study, which all machines reach by this path.

    Returns:
        The commands.

    Raises:
        ValueError: the folder holds another study.
        Failed: no method could be measured.
    """
    with begun(plan, folder) as console:
        measure(plan, folder, console)
    commands = [shlex.join(command(each)) for each in trainings_of(plan, folder).values()]
    write(folder / COMMANDS, "".join(f"{each}\n" for each in commands))
    return commands


def collect(folder: Path) -> Comparison:
    """Make the report of a study from what is there; its notes say what is missing and what was timed where.

    Raises:
        FileNotFoundError: the folder holds no study, or no training is finished.
    """
    plan = read_plan(folder)
    failed = dict.fromkeys(plan.methods.keys() - known_costs(plan, folder), "its costs are not measured")
    trainings = trainings_of(plan, folder).values()
    done = [each.folder / RESULTS for each in trainings if (each.folder / RESULTS).exists()]
    if not done:
        raise FileNotFoundError(f"no training in {folder} is finished; run the lines of {folder / COMMANDS} first")
    missing = {each.folder: _missing(each) for each in trainings if each.folder / RESULTS not in done}
    notes = [f"timed on {_machines((folder / MEASURED).glob('*.json'))}; trained on {_machines(done)}"]
    return conclude(plan, folder, failed, missing, notes)


def _missing(training: Training) -> str:
    steps = f"{last_step(training.folder / METRICS)} of {training.settings.steps} steps done"
    return f"not finished, {steps}: {shlex.join(command(training))}"


def _machines(files: Iterable[Path]) -> str:
    """What the results in some files were made on, and how many on each."""
    made = [json.loads(file.read_text(encoding="utf-8"))["machine"] for file in files]
    count = Counter(f"{each['gpu'] or each['processor']}, {each['threads']} threads" for each in made)
    return " and ".join(f"{name} ({number})" for name, number in sorted(count.items()))
