"""Methods side by side: the same tasks, model and budget, and what each costs (arXiv 2412.12030, section 5, widened).

First every method is measured alone, one process after another: seconds and peak memory of a meta-step, curvature
products, adaptation. Then a few outer rates are tried for each in short trainings. A budget of time becomes a number
of outer steps by that measurement, so that whatever else runs on the machine later, other trainings of the study too,
changes no timing; nor any result, for all is computed on one thread unless settings name more. Then every method is
trained and tested with every seed, by `innerloop train`, in a run folder of its own.
"""

from __future__ import annotations

import inspect
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from torch import Tensor

from innerloop.errors import Diverged, Failed
from innerloop.reporting import provenance, student
from innerloop.studies import tuning
from innerloop.studies.comparison import SHARE, Comparison, Entry, Point, recommend
from innerloop.studies.comparison_report import write_report
from innerloop.studies.costs import Cost, cost, save_tasks
from innerloop.studies.trainings import Training, train_all
from innerloop.tasks import SOURCES
from innerloop.training.baselines import PIXELS
from innerloop.training.build import build_tasks
from innerloop.training.checkpoints import load_weights
from innerloop.training.evaluation import Baseline, Estimate, verdict
from innerloop.training.methods import OF_METHOD, method, method_settings
from innerloop.training.report import task_words
from innerloop.training.runs import ACCURACIES, RESULTS, save_results
from innerloop.training.settings import Settings, flag
from innerloop.training.store import BEST, METRICS, locked, read_records

METHODS = (
    "maml", "fomaml", "anil", "imaml-head", "memory-reduced", "window:2", "reptile", "boil", "protonet", "proto-anil",
    "proto-maml", "ridge", "pretrained", "mamf",
)  # fmt: skip
STUDY, MEASURED, RUNS = "study.json", "measured", "runs"
MINUTES = 5.0
MEMORY_STEPS = (1, 5, 20)
VALIDATIONS = 12
SMOOTHING, STAYS = 3, 5  # validations averaged, and validations after it for which a target must hold

# What a method chooses; the comparison holds all else equal.
CHOSEN = (*OF_METHOD, "optimizer", "outer_lr", "schedule", "train_shots")

# What the comparison sets itself, from its own numbers.
OWN = ("seed", "validate_every")


@dataclass(frozen=True)
class Plan:
    """What is compared, and how long.

    Attributes:
        methods: settings by the name of the method, steps and seed aside.
        minutes: of meta-steps that each method has; None where ``steps`` bounds it.
        seeds: trainings of each method, with seeds 0, 1, ...
        memory_steps: numbers of inner steps at which memory is measured, besides the method's own.
        notes: what a reader of the results must know of the settings.
        tune: outer rates tried for each method; 0 takes its own.
    """

    methods: dict[str, Settings]
    minutes: float | None
    seeds: int
    memory_steps: list[int]
    notes: list[str]
    tune: int

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Plan:
        """The plan that was written to the study's folder, from which it can be continued."""
        methods = {name: Settings(**settings) for name, settings in found["methods"].items()}
        return cls(**{**found, "methods": methods})


def plan(
    methods: Sequence[str] = METHODS,
    *,
    minutes: float | None = None,
    seeds: int = 1,
    memory_steps: Sequence[int] = MEMORY_STEPS,
    tune: int = tuning.RATES,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Plan:
    """Check and complete what is to be compared.

    Args:
        methods: names of `innerloop.training.methods.METHODS`, with an argument behind a colon where one takes it.
        minutes: of meta-steps for each method; None takes ``steps``, the same for all, if the settings have that, and 5
            minutes otherwise.
        seeds: trainings of each method.
        memory_steps: numbers of inner steps at which memory is measured, besides each method's own.
        tune: outer rates tried for each method on validation tasks before it is trained, around its own, which the
            settings may set; 0 takes its own.
        changes: settings of single methods, by the method's name, that win over all others; only what a method
            chooses, `CHOSEN`.
        **settings: for all methods, winning over what the methods set; see `innerloop.training.settings.Settings`.
            ``threads`` is 1 where it is not given.

    Raises:
        ValueError: unknown methods or settings, values out of range, the same method twice, changes to a method that is
            not compared or to what must be equal, or both minutes and steps.
    """
    changes = changes or {}
    if len(set(methods)) < len(methods) or not methods:
        raise ValueError(f"methods are {', '.join(methods) or 'none'}; name each once")
    if odd := sorted(changes.keys() - set(methods)):
        raise ValueError(f"{odd[0]!r} is changed but not compared; methods are {', '.join(methods)}")
    for name, own in changes.items():
        if odd := sorted(own.keys() - set(CHOSEN)):
            raise ValueError(
                f"{flag(odd[0])} of {name} alone cannot be changed, or the methods are not compared on equal terms; a "
                f"method may have its own {', '.join(map(flag, CHOSEN))}"
            )
    if odd := sorted(settings.keys() & set(OWN)):
        raise ValueError(f"{flag(odd[0])} is the comparison's business: give the number of seeds, or leave it out")
    if seeds < 1:
        raise ValueError(f"{seeds} seeds; give 1 or more")
    if tune < 0 or tune == 1:
        raise ValueError(f"{tune} outer rates to tune by; give 2 or more, or 0 to take each method's own")
    if odd_numbers := [number for number in memory_steps if number < 1]:
        raise ValueError(f"memory at {odd_numbers[0]} inner steps; give 1 or more")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"a budget of {minutes} minutes; it must be above 0")
    if minutes is not None and "steps" in settings:
        raise ValueError("a budget of time and steps both bound the training; give one of them")
    if "steps" not in settings:
        minutes = minutes or MINUTES
    dataset = settings.get("dataset", Settings.dataset)
    if dataset in SOURCES and "ways" not in inspect.signature(SOURCES[dataset]).parameters:
        raise ValueError(f"{dataset} is regression; methods are compared by accuracy, so they need classes")
    settings.setdefault("threads", 1)
    found, overridden = {}, set()
    for name in methods:
        own = {"dataset": dataset, **method_settings(name, dataset)}
        chosen = {**own, **settings, **changes.get(name, {})}
        try:
            found[name] = Settings(**chosen)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {name}: {error}") from error
        paper = Settings(**own)
        overridden |= {each for each in settings if getattr(found[name], each) != getattr(paper, each)}
    start = settings.get("start_from")
    if start is not None and not (Path(start) / BEST).is_file():
        raise ValueError(f"start-from {start} holds no {BEST}: name a run folder that innerloop train has written")
    notes = [
        f"{flag(each)}={settings[each]} is set for all methods: they no longer are what their names say"
        for each in CHOSEN
        if each in overridden
    ]
    return Plan(found, minutes, seeds, list(memory_steps), notes, tune)


def compare(
    methods: Sequence[str] = METHODS,
    *,
    folder: str | Path,
    minutes: float | None = None,
    seeds: int = 1,
    jobs: int = 1,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Train, test and measure methods side by side, and write the report to a folder.

    Called again with the same folder and plan, an interrupted study goes on where it stopped.

    Args:
        methods: names as for ``innerloop train --method``, such as ``"maml"`` or ``"window:5"``.
        folder: where ``report.html``, ``report.md``, ``comparison.json``, the figures and all runs go.
        minutes: of meta-steps for each method and seed; None takes ``steps``, the same for all, if the settings have
            that, and 5 minutes otherwise.
        seeds: trainings of each method.
        jobs: trainings at once. Timings are taken before, alone, and do not depend on it.
        progress: show a progress bar; where there is no terminal, a line now and then.
        **options: ``memory_steps``, ``tune``, ``changes`` and settings, as `plan` takes them.

    Returns:
        What was found; ``failed`` names the methods that could not be measured or trained, ``notes`` single seeds.

    Raises:
        ValueError: what `plan` refuses, or a folder that holds another study.
        Diverged: no method could be trained.
        Failed: no method could be measured, or a training ended with an error other than divergence; what is done is
            kept, and the study can be continued.

    Example:
        >>> il.compare(["maml", "anil", "window:5"], folder="study", minutes=10, seeds=3, dataset="glyphs")
    """
    return carry_out(plan(methods, minutes=minutes, seeds=seeds, **options), Path(folder), jobs, progress)


def carry_out(plan: Plan, folder: Path, jobs: int = 1, progress: bool = True) -> Comparison:
    """Do what a plan says, or the rest of it; as `compare`."""
    if jobs < 1:
        raise ValueError(f"{jobs} jobs; give 1 or more")
    with begun(plan, folder, progress) as console:
        failed = measure(plan, folder, console)
        diverged = train_all(list(trainings_of(plan, folder).values()), jobs, console)
        return conclude(plan, folder, failed, diverged)


@contextmanager
def begun(plan: Plan, folder: Path, progress: bool = True) -> Iterator[Console]:
    """Within the block the folder is that of the plan's study and no other process's; gives where to tell of it."""
    _check(folder, plan)
    console = Console(highlight=False, soft_wrap=True, quiet=not progress)
    for note in plan.notes if progress else ():
        print(note, file=sys.stderr)
    if not (folder / STUDY).exists():  # the folder stays free where the data cannot be read
        build_tasks(replace(next(iter(plan.methods.values())), train_shots=None))
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not (folder / STUDY).exists():
            save_results(folder / STUDY, {"plan": asdict(plan)})
        console.print(
            f"study: {folder}; an interrupted one goes on with innerloop compare --resume {quote(str(folder))}",
            markup=False,
        )
        yield console


def measure(plan: Plan, folder: Path, console: Console) -> dict[str, str]:
    """Measure what each method costs and try its outer rates, unless that is done.

    Returns:
        The methods whose costs could not be measured, and why.

    Raises:
        Failed: that is all of them.
    """
    failed = {}
    (folder / MEASURED).mkdir(exist_ok=True)
    with TemporaryDirectory() as scratch:
        for name, settings in plan.methods.items():
            file, tasks = _file(folder, name), Path(scratch, f"{settings.train_shots}.safetensors")
            if file.exists():
                continue
            console.print(f"measuring {name}", markup=False)
            try:
                if not tasks.exists():
                    save_tasks(tasks, settings)
                found = cost(settings, tasks, plan.memory_steps)
            except (Failed, ValueError) as error:
                failed[name] = f"its costs could not be measured: {error}"
                console.print(f"{name}: {failed[name]}", markup=False)
                continue
            if plan.tune:
                console.print(f"tuning {name}", markup=False)
                found = found._replace(rates=tuning.search(settings, plan.tune, _steps(plan, name, found)))
            save_results(file, found._asdict())
    if len(failed) == len(plan.methods):
        raise Failed(_none_left(failed))
    return failed


def known_costs(plan: Plan, folder: Path) -> dict[str, Cost]:
    """What is known of each method, as far as it has been measured."""
    files = {name: _file(folder, name) for name in plan.methods}
    return {name: Cost.of(_read(file)) for name, file in files.items() if file.exists()}


def trainings_of(plan: Plan, folder: Path) -> dict[tuple[str, int], Training]:
    """The trainings of a study, by method and seed, at the outer rates found, of all methods that were measured."""
    found = {}
    costs = known_costs(plan, folder)
    for name, settings in _tuned(plan, costs).items():
        steps = _steps(plan, name, costs[name])
        often = math.ceil(steps / VALIDATIONS)
        for seed in range(plan.seeds):
            run = folder / RUNS / _folder_name(name) / f"seed-{seed}"
            own = replace(settings, steps=steps, validate_every=often, seed=seed)
            found[name, seed] = Training(run, f"{name}, seed {seed}", own, costs[name].meta_step.median)
    return found


def conclude(
    plan: Plan, folder: Path, failed: dict[str, str], left_out: Mapping[Path, str], more: Sequence[str] = ()
) -> Comparison:
    """Write the report of the trainings that are finished.

    Args:
        plan: of the study.
        folder: of the study.
        failed: the methods that could not be measured, and why.
        left_out: by the folder of each training that is not finished, why.
        more: notes for the reader.

    Raises:
        Diverged: none is finished.
    """
    costs, trainings = known_costs(plan, folder), trainings_of(plan, folder)
    plan = replace(plan, methods=_tuned(plan, costs))
    kept: dict[str, dict[int, Path]] = {}
    notes = [*plan.notes, *more]
    for name, mine in costs.items():
        runs = {seed: trainings[name, seed].folder for seed in range(plan.seeds)}
        lost = {seed: left_out[run] for seed, run in runs.items() if run in left_out}
        if len(lost) == len(runs):
            failed[name] = lost[0]
            continue
        kept[name] = {seed: run for seed, run in runs.items() if seed not in lost}
        notes += [f"{name}: seed {seed} is left out: {why}" for seed, why in lost.items()]
        unknown = [steps for steps in plan.memory_steps if steps not in mine.memory_at]
        notes += [f"{name}: memory at {steps} inner steps could not be measured" for steps in unknown]
    tried = {name: sorted(map(float, costs[name].rates)) for name in kept if len(costs[name].rates) > 1}
    if edge := [name for name, rates in tried.items() if plan.methods[name].outer_lr in (rates[0], rates[-1])]:
        notes.append(
            f"the best outer rate of {', '.join(edge)} is the lowest or the highest that was tried: --tune "
            f"{plan.tune + 2} tries more"
        )
    if not kept:
        raise Diverged(_none_left(failed))
    # the command that began the study tells more than one that resumed it
    before = _read(folder / STUDY)
    made = provenance() | {"command": before["command"]}
    made["commit"] = " to ".join(dict.fromkeys(filter(None, (before["commit"], made["commit"])))) or None
    made["machine"]["threads"] = next(iter(plan.methods.values())).threads or made["machine"]["threads"]
    comparison = _collect(plan, kept, costs, failed, notes, made)
    write_report(folder, comparison)
    return comparison


def _none_left(failed: Mapping[str, str]) -> str:
    return f"no method could be trained; {'; '.join(f'{name}: {why}' for name, why in failed.items())}"


def read_plan(folder: Path) -> Plan:
    """The plan of a study.

    Raises:
        FileNotFoundError: the folder holds no study.
    """
    if not (folder / STUDY).is_file():
        raise FileNotFoundError(f"{folder} holds no comparison (no {STUDY}); name one that innerloop compare has begun")
    return Plan.of(_read(folder / STUDY)["plan"])


def _check(folder: Path, plan: Plan) -> None:
    """Refuse a folder that holds anything but this study."""
    if (folder / STUDY).is_file():
        if read_plan(folder) != plan:
            raise ValueError(
                f"{folder} holds another comparison; continue it with --resume {folder}, or name a new folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something that is not a comparison; name a new folder")


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _folder_name(method: str) -> str:
    return method.replace(":", "-").replace("/", "-")


def _file(folder: Path, method: str) -> Path:
    return folder / MEASURED / f"{_folder_name(method)}.json"


def _tuned(plan: Plan, costs: Mapping[str, Cost]) -> dict[str, Settings]:
    """The settings of each method that was measured, at the best of the outer rates tried."""
    methods = {name: plan.methods[name] for name in costs}
    return {name: replace(own, outer_lr=tuning.best(costs[name].rates, own.outer_lr)) for name, own in methods.items()}


def _tuning_words(count: int, settings: Settings) -> str:
    return (
        f"Tuned, for every method alike: the outer rate, {count} values a factor of {tuning.FACTOR:g} apart around "
        f"its own or what --set gives, on {settings.validation_tasks} validation tasks, in {tuning.BUDGET:.0%} of the "
        "outer steps of a training, on top of the budget."
    )


def _steps(plan: Plan, name: str, mine: Cost) -> int:
    """Outer steps of a training, given what the method costs."""
    return plan.methods[name].steps if plan.minutes is None else max(1, int(60 * plan.minutes / mine.meta_step.median))


def _collect(
    plan: Plan,
    kept: Mapping[str, Mapping[int, Path]],
    costs: Mapping[str, Cost],
    failed: dict[str, str],
    notes: list[str],
    made: dict[str, Any],
) -> Comparison:
    """From the run folders of each method, by their seeds, to what they show together."""
    accuracies = {name: {seed: _accuracies(run) for seed, run in runs.items()} for name, runs in kept.items()}
    best = max(accuracies, key=lambda name: statistics.fmean(each.mean().item() for each in accuracies[name].values()))
    curves = {name: _curve(list(runs.values()), costs[name].meta_step.median) for name, runs in kept.items()}
    target = SHARE * max(point.accuracy for curve in curves.values() for point in curve)
    differing = [
        each.name for each in fields(Settings) if len({getattr(plan.methods[name], each.name) for name in kept}) > 1
    ]
    entries = []
    for name, runs in kept.items():
        settings, known, mine = plan.methods[name], method(name), costs[name]
        found = [_read(run / RESULTS) for run in runs.values()]
        tests = [each["test"] for each in found]
        main = "transductive" if "transductive" in tests[0] else "inductive"

        def over_seeds(values: Iterable[Sequence[float]]) -> Estimate:
            return _over_seeds([Estimate(*each) for each in values])

        entries.append(
            Entry(
                method=name,
                title=name.replace(":", " ") if ":" in name else known.title,
                paper=known.paper,
                differs={flag(each): str(getattr(settings, each)).lower() for each in differing},
                steps=found[0]["training"]["step"],
                transductive=over_seeds(test[main]["accuracy"] for test in tests) if main == "transductive" else None,
                inductive=over_seeds(test["inductive"]["accuracy"] for test in tests),
                seeds=[test[main]["accuracy"][0] for test in tests],
                behind=_difference(accuracies[best], accuracies[name]),
                curve=curves[name],
                reached=time_to(curves[name], target),
                memory=mine.memory_at[settings.inner_steps],
                baselines={
                    each: Baseline(
                        accuracy=over_seeds(test[main]["baselines"][each]["accuracy"] for test in tests),
                        difference=over_seeds(test[main]["baselines"][each]["difference"] for test in tests),
                    )
                    for each in tests[0][main]["baselines"]
                },
                **mine._asdict(),
            )
        )
    first = next(iter(plan.methods.values()))
    comparison = Comparison(
        tasks=task_words(first),
        budget=_budget(plan, first.steps),
        test_tasks=first.test_tasks,
        target=target,
        nearest_neighbour=entries[0].baselines[PIXELS].accuracy,
        entries=entries,
        failed=failed,
        notes=notes,
        made=made,
        tuned=_tuning_words(plan.tune, first) if plan.tune else "",
    )
    chosen = recommend(comparison).chosen
    lost = verdict(chosen.baselines) if chosen else None
    return comparison._replace(notes=[f"{chosen.title}: {lost}", *notes]) if chosen and lost else comparison


def _budget(plan: Plan, steps: int) -> str:
    if plan.minutes is None:
        return f"{steps:,} outer steps"
    seconds = 60 * plan.minutes
    return f"{seconds:g} seconds of meta-steps" if seconds < 300 else f"{plan.minutes:g} minutes of meta-steps"


def _curve(folders: Sequence[Path], seconds: float) -> list[Point]:
    """The validations of all seeds of a method, together; ``seconds`` of one meta-step."""
    runs = [
        {each["step"]: each["accuracy"] for each in read_records(folder / METRICS) if each["kind"] == "validation"}
        for folder in folders
    ]
    return [
        Point(step, step * seconds, statistics.fmean(found), min(found), max(found))
        for step in runs[0]
        if len(found := [run[step] for run in runs if step in run]) == len(runs)
    ]


def _accuracies(folder: Path) -> Tensor:
    """The test accuracy of each task of a run, transductive where there is that."""
    found, _ = load_weights(folder / ACCURACIES)
    return found["transductive" if "transductive" in found else "inductive"]


def _difference(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> Estimate:
    """The mean difference of two methods' accuracies, by seed: task by task over the seeds that both have."""
    if both := sorted(first.keys() & second.keys()):
        return _over_seeds([Estimate.of(first[seed] - second[seed]) for seed in both])
    one, other = (_over_seeds([Estimate.of(each) for each in found.values()]) for found in (first, second))
    return Estimate(one.mean - other.mean, math.hypot(one.interval, other.interval))


def _over_seeds(found: Sequence[Estimate]) -> Estimate:
    """The mean over the seeds of what was estimated for each.

    Its 95 % interval is that of the test tasks of all seeds together or, from three seeds on where it is wider, that of
    the seeds themselves (Student's t).
    """
    means = [each.mean for each in found]
    over_tasks = math.hypot(*(each.interval for each in found)) / len(found)
    over_seeds = student(means) if len(means) >= 3 else 0.0
    return Estimate(statistics.fmean(means), max(over_tasks, over_seeds))


def time_to(curve: Sequence[Point], target: float) -> float | None:
    """Seconds at the first validation from which the accuracy, averaged over three, stays above a target for five more.

    None if never; towards the end of the curve as many are averaged and asked as there are. (The measure of arXiv
    2412.12030, smoothing and staying after its authors' notes.)
    """
    means = [
        statistics.fmean(point.accuracy for point in curve[max(0, place - SMOOTHING + 1) : place + 1])
        for place in range(len(curve))
    ]
    for place, point in enumerate(curve):
        if all(mean >= target for mean in means[place : place + STAYS + 1]):
            return point.seconds
    return None
