"""What an exact meta-gradient costs in plain gradients, on four models and as everything grows, by everyone.

    python benchmarks/costs.py              # the committed figures, about ten minutes on a quiet machine
    python benchmarks/costs.py --quick --out FOLDER

The unit is one plain gradient of the query examples of one task: its time, and what is live at its peak beyond model
and data. Five inner steps of gradient descent, everything adapts. Time is processor time on one thread, in turns,
the median of the rounds. Growth is the slope of a line through the logarithms.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import EXACT, PLAIN, absent, by_autograd, ordinary
from speed import Step, clocked, images, meta_step, plain_gradient, squared
from torch import nn
from transformer import Block, Pool, peak

import innerloop as il
from innerloop import reporting
from innerloop.curvature import second_order_kernels
from innerloop.training.allocator import keep_freed_memory

STEPS = 5
OURS = {
    "innerloop": {},
    "innerloop, memory=0": {"memory": 0},
    "innerloop, first order": {"meta_gradient": "first-order"},
}
WHAT = "seconds", "mib"
AXES = {
    "inner steps": ("steps", (1, 2, 4, 8, 16, 32)),
    "tasks": ("tasks", (1, 2, 4, 8, 16)),
    "parameters": ("filters", (8, 16, 32, 64, 128)),
    "ways": ("ways", (2, 5, 10, 20)),
    "shots": ("shots", (1, 2, 5, 10)),
}


class Case(NamedTuple):
    """A model, a batch of tasks and how it is learned."""

    model: nn.Module
    batch: il.Task
    lr: float
    loss: Any = F.cross_entropy
    steps: int = STEPS


def models(quick: bool) -> Iterator[tuple[str, Case]]:
    """Four models."""
    torch.manual_seed(0)
    line = il.Task(*((torch.rand(4, 10, 1) * 10 - 5, torch.randn(4, 10, 1)) for _ in range(2)))
    yield "MLP 1-40-40-1, 10 points", Case(il.models.MLP([1, 40, 40, 1]), line, 0.01, squared)
    filters = 8 if quick else 64
    conv = il.models.Conv4(in_channels=1, filters=filters)
    yield f"Conv4-{filters}, 28x28, 5-way 1-shot", Case(conv, images(1, 1, 28, 15), 0.1)
    widths = (8, 8, 8, 8) if quick else (32, 64, 128, 256)
    deep = il.models.ResNet12(ways=5, widths=widths)
    yield f"ResNet-12 {widths}, 32x32, 5-way 1-shot", Case(deep, images(1, 3, 32, 5), 0.01)
    width, depth = (16, 2) if quick else (128, 8)
    former = nn.Sequential(*(Block(width) for _ in range(depth)), Pool(), nn.Linear(width, 5))
    parts = ((torch.randn(1, 4, 128, width), torch.arange(4).unsqueeze(0)) for _ in range(2))
    yield f"transformer, {depth} blocks of width {width}, 4 x 128 tokens", Case(former, il.Task(*parts), 0.01)


def runners(case: Case, ours: dict[str, Any], others: dict[str, Any]) -> dict[str, Step]:
    """What is measured, by name; all but the first-order one give the same numbers, which speed.py asserts."""
    found: dict[str, Step] = {}
    for name, settings in ours.items():
        inner = il.SGD(lr=case.lr, steps=case.steps)
        found[name] = meta_step(il.MetaLearner(case.model, inner=inner, loss=case.loss, **settings), case.batch)
    for name, run in others.items():
        model = ordinary(case.model)

        def step(run: Any = run, model: nn.Module = model) -> None:
            model.zero_grad()
            with second_order_kernels():
                run(model, case.loss, case.batch, case.lr, case.steps)

        found[name] = step
    return found


def measured(case: Case, steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and peak MiB, by name; the plain gradient's under "unit"."""
    unit = plain_gradient(ordinary(case.model), il.Task(*(part[:1] for part in case.batch.query)), case.loss)  # type: ignore[arg-type]
    everyone = {"unit": unit, **steps}
    broken = {}
    for name, step in everyone.items():
        try:
            step()
            step()
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            broken[name] = str(error).splitlines()[0][:80]
    everyone = {name: step for name, step in everyone.items() if name not in broken}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(rounds):
        for name, step in everyone.items():
            times[name].append(clocked(step))
    found: dict[str, Any] = {
        name: {"seconds": statistics.median(times[name]), "mib": peak(step, "cpu")} for name, step in everyone.items()
    }
    return found | {name: {"error": why} for name, why in broken.items()}


def growth(quick: bool, rounds: int) -> dict[str, Any]:
    """Time and memory along every axis, from Conv4 with 32 filters, 4 tasks of 5 ways and 1 shot, 5 inner steps."""
    found = {}
    for title, (what, values) in AXES.items():
        rows = {}
        for value in values[:2] if quick else values:
            at = {"steps": STEPS, "tasks": 4, "filters": 32, "ways": 5, "shots": 1} | {what: value}
            torch.manual_seed(0)
            model = il.models.Conv4(in_channels=1, filters=at["filters"], ways=at["ways"])
            batch = images(at["tasks"], 1, 28, 5, at["shots"], at["ways"])
            case = Case(model, batch, 0.1, steps=at["steps"])
            ours = {name: settings for name, settings in OURS.items() if "first" not in name}
            size = sum(p.numel() for p in model.parameters()) if what == "filters" else value
            rows[str(size)] = measured(case, runners(case, ours, {PLAIN: by_autograd}), rounds)
        found[title] = rows
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Of a line by least squares through the logarithms."""
    x, y = ([math.log(max(point[axis], 1e-9)) for point in points] for axis in (0, 1))
    mean = statistics.mean(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def page(record: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    parts: list[reporting.Part] = [(__doc__ or "").split("\n\n")[2].replace("\n", " ")]
    for title, found in record["models"].items():
        unit, rows = found["unit"], []
        for name, each in found.items():
            if "error" in each:
                rows.append([name, f"does not run: {each['error']}", ""])
            elif name != "unit":
                rows.append([name, *(f"{each[what] / unit[what]:.3g}" for what in WHAT)])
        parts += [
            reporting.Heading(title),
            f"One plain gradient: {1e3 * unit['seconds']:.3g} ms, {unit['mib']:.3g} MiB.",
        ]
        parts.append(reporting.Table(["meta-gradient", "time", "peak memory"], rows))
    names = [name for name in next(iter(next(iter(record["growth"].values())).values())) if name != "unit"]
    rows = []
    for title, found in record["growth"].items():
        curves = [[(float(at), row[name][what]) for at, row in found.items()] for name in names for what in WHAT]
        first, *_, last = found
        rows.append([title, f"{int(first):,} to {int(last):,}", *(f"{slope(curve):.2f}" for curve in curves)])
    parts += [
        reporting.Heading("How cost grows"),
        (growth.__doc__ or "") + " An exponent of 1 is growth in proportion.",
    ]
    head = [f"{name}: {what}" for name in names for what in ("time", "memory")]
    parts.append(reporting.Table(["grows with", "from, to", *head], rows))
    parts.append("\n".join(f"* {name} {why}." for name, why in record["absent"].items()))
    return reporting.markdown("Costs in plain gradients", [*parts, f"Made by {reporting.made(record)}."])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few values, one round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of costs.json and costs.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own
    keep_freed_memory()
    rounds, gone = 1 if args.quick else 3, absent()
    others = {name: run for name, run in EXACT.items() if name not in gone}
    found = {}
    for title, case in models(args.quick):
        found[title] = measured(case, runners(case, OURS, others), rounds)
        print(title, {name: each.get("seconds") for name, each in found[title].items()}, flush=True)
    record = {"models": found, "growth": growth(args.quick, rounds), "absent": gone, **reporting.provenance()}
    reporting.write_json(args.out / "costs.json", record, indent=1)
    reporting.write(args.out / "costs.md", page(record))


if __name__ == "__main__":
    main()
