"""Every method by name, at equal processor time and at equal tasks, each at the outer rate that validation prefers.

    python experiments/family/run.py                                        # one seed of all methods on all sets
    python experiments/family/run.py --seconds 8 --sets sinusoid --seeds 0 1 2 --methods maml alfa
    python experiments/family/run.py --page                                 # the page alone, from what is there

Every training runs on one thread for ``--seconds`` of processor time, counted in steps by a trial, or for the steps of
"equal tasks" where those are more; weights are tested at both points. Three outer rates, a third of the method's own,
its own and three times that, are tried first in a tenth of the steps each, with the first seed. Nothing is annealed but
what the method anneals. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import DATA, collect, estimate

from innerloop import reporting
from innerloop.errors import Diverged, Failed
from innerloop.learner import MetaLearner
from innerloop.reporting import verdict_of
from innerloop.studies import costs, tuning
from innerloop.tasks import Recurring, TaskSource
from innerloop.training.allocator import keep_freed_memory
from innerloop.training.build import build_learner, build_outer, build_tasks
from innerloop.training.evaluation import assess, evaluate
from innerloop.training.fit import fit
from innerloop.training.methods import METHODS, method_settings
from innerloop.training.settings import Settings

HERE = Path(__file__).parent
PHOTOS = {"dataset": "cifar_fs", "data": str(DATA / "cifarfs32.npz"), "filters": 16, "downsample": "stride"}
PHOTOS |= {"queries": 5, "tasks_per_batch": 2}
Row = dict[str, Any]
SETS: dict[str, Row] = {
    "cifar-fs-5-shot": PHOTOS | {"shots": 5},
    "cifar-fs-1-shot": PHOTOS | {"shots": 1},
    "sinusoid": {"dataset": "sinusoid", "model": "mlp", "tasks_per_batch": 16},
}
EQUAL = {"cifar-fs-5-shot": 100, "cifar-fs-1-shot": 100, "sinusoid": 200}  # outer steps of "equal tasks"
# What a network of three layers on a line takes in place of a method's own.
LINE: dict[str, Row] = {"reptile": {"train_shots": None}, "lambda": {"adapts": "blocks:001"}, "cavia": {"context": 5}}
REFERENCE, TRIAL, MARGIN = "maml", 10, 1.0
# What has no name of its own: a method and what differs. Of MAML++, each of its parts left out.
VARIANTS: dict[str, tuple[str, Row]] = {
    "mixed": ("truncated", {"meta_gradient": "mixed:1=0.5,5=0.5"}),
    "maml++ less batch norm a step": ("maml++", {"batch_norm": "batch"}),
    "maml++ less learned rates": ("maml++", {"inner": "sgd"}),
    "maml++ less multi-step loss": ("maml++", {"multi_step_loss": None}),
    "maml++ less first order": ("maml++", {"first_order": None}),
}
NAMES = [{"moml": "moml:100"}.get(name, name) for name in METHODS if name != "default"] + list(VARIANTS)


SHARED = "memory", "steps", "tried", "outer_lr"
HOW = """\
Accuracies are inductive. Differences from the reference are paired by task, with the wider of the 95 % intervals over
tasks and over seeds. Errors are compared in percent of the reference's. "shown": as good as the reference within one
point, or one percent. "contradicted": worse by more. One seed leaves it open. Nearest class mean and linear probe are
on the run's own features at equal time. Peak memory is that of an outer step; on lines it is too small to be told from
the libraries'. Outer rates are the best of three by 25 validation tasks of one seed. Most are at an end of the three:
other rates may change the order. Pictures are seen by Conv4 of 16 filters with strides, lines by an MLP."""


def settings_of(data: str, method: str, seed: int) -> Settings:
    """What all share wins over what a method sets."""
    dataset = SETS[data]["dataset"]
    name, other = VARIANTS.get(method, (method, {}))
    own = method_settings(name, dataset) | other
    own |= LINE.get(method, {}) if data == "sinusoid" else {}
    return Settings(**{**own, **SETS[data], "seed": seed, "threads": 1, "schedule": "constant"})


@lru_cache(maxsize=1)
def drawn(data: str, seed: int) -> TaskSource:
    """The tasks that all methods share; photographs take seconds to read."""
    return build_tasks(Settings(**SETS[data], seed=seed))


def trained(settings: Settings, tasks: TaskSource, keep: tuple[int, ...] = ()) -> tuple[MetaLearner, Any, Any]:
    """The learner, processor seconds after each step, and the weights after some steps."""
    outputs = settings.method()[2].trains_on(tasks).output_size
    learner = build_learner(settings, tasks.input_shape, outputs, regression=tasks.ways is None)
    outer = build_outer(settings, learner)
    began, clock, kept = time.process_time(), [0.0], {}

    def log(record: Row) -> None:
        clock.append(time.process_time() - began)
        if record["step"] in keep:
            kept[record["step"]] = deepcopy(learner.state_dict())

    fit(learner, tasks, steps=settings.steps, validation_tasks=0, progress=False, log=log, **outer)
    return learner, clock, kept


def prepared(settings: Settings, tasks: TaskSource, row: Row, count: int) -> Row:
    """What the seeds of a method share: steps, outer rate, and peak memory."""
    _, clock, _ = trained(replace(settings, steps=TRIAL), tasks)
    steps = max(1, int(row["seconds"] * (TRIAL - 2) / (clock[-1] - clock[2])))
    rates = tuning.rates(settings.outer_lr, tuning.RATES)
    short = max(1, int(tuning.BUDGET * max(steps, row["equal"]) / len(rates)))
    found: dict[str, float | None] = {}
    for rate in rates:
        try:
            learner, *_ = trained(replace(settings, outer_lr=rate, steps=short), tasks)
            quality = evaluate(learner, tasks, "validation", max(20, count // 4)).quality
        except Diverged:
            quality = math.nan
        found[str(rate)] = quality if math.isfinite(quality) else None
    memory = None
    if tasks.ways is not None:
        with TemporaryDirectory() as scratch:
            file = Path(scratch, "tasks.safetensors")
            costs.save_tasks(file, settings_of(row["data"], REFERENCE, row["seed"]))
            memory = costs.peak(settings, file)
    return {"steps": steps, "tried": found, "outer_lr": tuning.best(found, settings.outer_lr), "memory": memory}


def measured(row: Row, shared: Row | None, count: int) -> Row:
    """The row of a training, tested at both points; or why there is none."""
    try:
        settings = settings_of(row["data"], row["method"], row["seed"])
        tasks = drawn(row["data"], row["seed"])
        tasks = tasks.with_train_shots(settings.train_shots) if settings.train_shots else tasks
        tasks = Recurring(tasks, settings.recurring) if settings.recurring else tasks
        row |= shared or prepared(settings, tasks, row, count)
        points = row["steps"], row["equal"]
        settings = replace(settings, outer_lr=row["outer_lr"], steps=max(points))
        learner, clock, kept = trained(settings, tasks, keep=points)
    except (ValueError, Diverged, Failed) as error:
        return row | {"failed": str(error)}
    row["took"] = round(clock[row["steps"]], 2)
    for name, point in zip(("time", "tasks"), points, strict=True):
        learner.load_state_dict(kept[point])
        if name == "time":
            found = assess(learner, tasks, "test", count).inductive
            row["beside"] = {each: 100 * base.accuracy.mean for each, base in found.baselines.items()}
        else:
            found = evaluate(learner, tasks, "test", count, inductive=True)
        values = found.losses if found.accuracies is None else 100 * found.accuracies
        row[name] = [float(f"{value:.4g}") for value in values.tolist()]
    if tasks.ways is None:
        batch = tasks.batch("test", 0, count)
        mean = batch.support[1].mean(1, keepdim=True)
        row["beside"]["mean of the support set"] = (batch.query[1] - mean).square().mean().item()
    return row


def judged(rows: list[Row], reference: list[Row], point: str) -> list[str]:
    """What a method reaches, what it is ahead of the reference, and the verdict, over the seeds that both have."""
    mean, half = estimate([row[point] for row in rows])
    cells = [f"{mean:.3g} ± {half:.2g}"]
    theirs = {row["seed"]: row[point] for row in reference}
    pairs = [(row[point], theirs[row["seed"]]) for row in rows if row["seed"] in theirs]
    if not pairs or rows == reference:
        return [*cells, "–"]
    scale = -100 / statistics.mean(itertools.chain(*theirs.values())) if rows[0]["data"] == "sinusoid" else 1
    mean, half = estimate([[scale * (one - other) for one, other in zip(*both, strict=True)] for both in pairs])
    return [*cells, f"{mean:+.1f} ± {half:.1f}, {verdict_of(mean, half, MARGIN) if len(pairs) > 1 else 'open'}"]


def section(rows: list[Row]) -> Iterator[str]:
    """The lines on one set at one length, the best first."""
    good = [row for row in rows if "failed" not in row and math.isfinite(math.fsum(row["time"] + row["tasks"]))]
    of = {name: [row for row in good if row["method"] == name] for name in dict.fromkeys(row["method"] for row in good)}
    reached = {name: statistics.mean(itertools.chain(*(row["time"] for row in found))) for name, found in of.items()}
    *own, shared = good[0]["beside"] if good else [""]
    table = []
    for name in sorted(of, key=reached.__getitem__, reverse=rows[0]["data"] != "sinusoid"):
        found, first, reference = of[name], of[name][0], of.get(REFERENCE, [])
        seeds = "" if len(found) == max(map(len, of.values())) else f" ({len(found)} seeds)"
        memory = f"{first['memory'] / 2**20:.1f}" if first["memory"] else "–"
        table.append([
            name + seeds, f"{first['outer_lr']:g}", f"{1000 * first['took'] / first['steps']:.1f}", memory,
            str(first["steps"]), *judged(found, reference, "time"), *judged(found, reference, "tasks"),
            *(f"{statistics.mean(row['beside'][each] for row in found):.1f}" for each in own),
        ])  # fmt: skip
    head = ["method", "outer rate", "ms a step", "peak MiB", "steps", "equal time", f"against {REFERENCE}"]
    yield reporting.table([*head, "equal tasks", f"against {REFERENCE}", *own], table)
    if good:
        known = statistics.mean(row["beside"][shared] for row in of.get(REFERENCE, good))
        yield f"\nThe baseline that learns nothing, {shared}: {known:.3g}.\n"
    missing = [row for row in rows if row not in good]
    for name in dict.fromkeys(row["method"] for row in missing):
        mine = [row for row in missing if row["method"] == name]
        seeds = ", ".join(str(row["seed"]) for row in mine)
        reason = mine[0].get("failed", "a loss that is not finite").partition("; ")[0]
        yield f"* {name}, seed{'s' * (len(mine) > 1)} {seeds}: no number. {reason}"


def page(record: Row) -> str:
    """The tables."""
    title, _, how = (__doc__ or "").split("\n\n")
    lines = ["# The family", "", title, "", how.strip(), "", HOW, ""]
    for data, seconds in dict.fromkeys((row["data"], row["seconds"]) for row in record["rows"]):
        rows = [row for row in record["rows"] if (row["data"], row["seconds"]) == (data, seconds)]
        seeds, equal = len({row["seed"] for row in rows}), rows[0]["equal"]
        what = "mean squared error" if data == "sinusoid" else "accuracy in percent"
        lines += [f"## {data}: {what}, {seconds:g} s or {equal} steps, {seeds} seed{'s' * (seeds > 1)}", ""]
        lines += [*section(rows), ""]
    return "\n".join([*lines, "Made by " + reporting.made(record["made"]) + "."]) + "\n"


def main() -> None:
    """Measure what is not there, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="processor seconds of a training")
    parser.add_argument("--count", type=int, default=100, help="test tasks")
    parser.add_argument("--equal", type=int, help="outer steps of equal tasks [by the set]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    asked = [] if args.page else itertools.product(args.seeds, args.sets, args.methods)

    def measure(key: Row, rows: list[Row]) -> Row:
        alike = key | {"seed": None}
        known = (row for row in rows if alike.items() <= (row | {"seed": None}).items() and "outer_lr" in row)
        return measured(key, next(({name: row[name] for name in SHARED} for row in known), None), args.count)

    wanted = (
        {"data": data, "method": method, "seconds": args.seconds, "equal": args.equal or EQUAL[data], "seed": seed}
        for seed, data, method in asked
    )
    record = collect(args.out / "family.json", wanted, measure)
    reporting.write(args.out / "README.md", page(record))


if __name__ == "__main__":
    main()
