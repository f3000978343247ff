"""Lambda patterns: which blocks need adapting (Khabarlak, arXiv 2206.05930).

Claims: with the right blocks, adaptation is about three times faster at a minimal loss of accuracy, and one adaptation
step gains accuracy. Measured: all 32 patterns of a Conv4 that was meta-trained by MAML, on the same validation tasks,
each adaptation timed with everything computed in every step and with the frozen prefix computed once; the fastest
within a tolerance is confirmed on test tasks. Of the paper only the abstract was at hand: its patterns, tolerances,
network, device and tables are not known.

The models are trained first, by `innerloop train`, into runs/, unless they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import COLOURS, ROOT, Part, Results, made, percent, run, table
from matplotlib.figure import Figure

import innerloop as il
from innerloop.studies.patterns import Row, study, times_of, with_pattern
from innerloop.training.runs import SETTINGS

TOLERANCES = 0.5, 1.0, 2.0  # percentage points
CEILING = 2.78  # times faster without reuse, by the multiply-adds of a Conv4 with 32 filters at 32 x 32
TRAINING = {
    1: "--steps 2400 --validate-every 150",
    5: "--steps 900 --validate-every 150",
}
SIZES, CEILING_STEPS = ((1, 32), (1, 64), (5, 32), (5, 64)), 10  # shots and filters; inner steps
STUDY = {1: "--tasks 300", 5: "--tasks 80 --repetitions 20"}
RECIPE = (
    "--dataset cifar_fs --shots {shots} --adapts everything --inner sgd --inner-lr 0.1 --inner-steps 5 --filters 32 "
    "--threads 1 --outer-lr 2e-3 --validation-tasks 100 --test-tasks 600 "
)


def innerloop(*arguments: str) -> None:
    """The command, its output shown."""
    subprocess.run([sys.executable, "-m", "innerloop", *arguments], check=True, cwd=ROOT)


def patterns(arguments: argparse.Namespace, shots: int) -> Results:
    """Train, unless that is done, and study all patterns with the command."""
    run_folder, data = f"runs/cifar-fs-{shots}-shot", os.path.relpath(arguments.data, ROOT)
    folder = ROOT / run_folder
    if not (folder / "results.json").exists():
        if (folder / SETTINGS).exists():
            innerloop("train", "--resume", run_folder)
        else:
            options = (RECIPE.format(shots=shots) + TRAINING[shots]).split()
            innerloop("train", "--out", run_folder, "--data", data, *options)
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    options = ["--tolerance", "1.0", "--steps", "1,5,10", *STUDY[shots].split()]
    innerloop("patterns", run_folder, "--data", data, *options, *threads)
    found = json.loads((folder / "patterns.json").read_text("utf-8"))
    training = json.loads((folder / "results.json").read_text("utf-8"))
    keep = ("training", "test", "command")
    return {"shots": shots, "trained": {key: training[key] for key in keep}, **found}


def ceiling(arguments: argparse.Namespace, sizes: Sequence[tuple[int, int]] = SIZES, count: int = 100) -> Results:
    """How much faster a pattern can be on this machine: a step cannot take less than its forward pass."""
    rows = []
    for shots, filters in sizes:
        torch.manual_seed(0)
        learner = il.MetaLearner(il.models.Conv4(3, 5, filters, size=32), inner=il.SGD(lr=0.01, steps=CEILING_STEPS))
        support = torch.rand(5 * shots, 3, 32, 32), torch.arange(5).repeat_interleave(shots)
        runs = {
            "11111": with_pattern(learner, il.Blocks("11111")).adapted_parameters,
            "00011": with_pattern(learner, il.Blocks("00011"), reuse_prefix=False).adapted_parameters,
            "00001": with_pattern(learner, il.Blocks("00001"), reuse_prefix=False).adapted_parameters,
            "00011, reused": with_pattern(learner, il.Blocks("00011")).adapted_parameters,
            "00001, reused": with_pattern(learner, il.Blocks("00001")).adapted_parameters,
            "forward alone": partial(passes, learner.model),
        }
        times = times_of(list(runs.values()), [support], count)
        seconds = {name: time.median for name, time in zip(runs, times, strict=True)}
        rows.append({"shots": shots, "filters": filters, "seconds": seconds})
    return {"steps": CEILING_STEPS, "repetitions": count, "rows": rows}


def quick_ceiling(arguments: argparse.Namespace) -> Results:
    """The least of the sizes."""
    found = ceiling(arguments, [(1, 32)], 20)
    seconds = found["rows"][0]["seconds"]
    assert seconds["11111"] > 1.3 * seconds["forward alone"], f"a full step is more than its forward pass: {seconds}"
    assert seconds["00001"] > 0.9 * seconds["forward alone"], f"no step is less than its forward pass: {seconds}"
    assert seconds["11111"] > 3 * seconds["00001, reused"], f"reuse should save most of the time: {seconds}"
    return found


@torch.no_grad()
def passes(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """As many forward passes as an adaptation has."""
    for _ in range(CEILING_STEPS):
        model(inputs)


def quick(arguments: argparse.Namespace) -> Results:
    """The same on glyphs, after a minute's training less."""
    torch.manual_seed(0)
    tasks = il.tasks.glyphs(ways=5, shots=1, queries=5)
    learner = il.MetaLearner(il.models.Conv4(1, 5, filters=8), inner=il.SGD(lr=0.2, steps=3))
    optimizer = torch.optim.Adam(learner.parameters(), lr=5e-3)
    il.fit(learner, tasks, steps=60, tasks_per_batch=8, optimizer=optimizer, validation_tasks=0, progress=False)
    (section,) = study(learner, tasks, [3], tolerance=1.0, count=60, repetitions=30)
    full, *others = section.rows
    head = next(row for row in others if row.pattern == "00001")
    predicted, measured = full.cost / head.cost, full.time_reusing.median / head.time_reusing.median
    assert 2.5 < predicted < 3, f"by its multiply-adds 00001 is {predicted:.2f} times as fast as 11111"
    assert measured > 1.5, f"with its prefix reused 00001 was {measured:.2f} times as fast as 11111"
    lost = 100 * (full.accuracy.mean - section.chosen.accuracy.mean)
    assert lost <= 1.0, f"the choice {section.chosen.pattern} lost {lost:.2f} points"
    assert full.time_reusing.median >= section.chosen.time_reusing.median, f"the choice {section.chosen} is slower"
    print(f"00001: {predicted:.2f} times as fast predicted, {measured:.2f} measured with reuse")
    rows = [_plain(row) for row in section.rows]
    chosen = {"steps": 3, "chosen": section.chosen.pattern, "rows": rows, "test": _estimates(section.test._asdict())}
    return {"shots": 1, "sections": [chosen]}


def _plain(row: Row) -> Results:
    return row._asdict() | {"time": row.time._asdict(), "time_reusing": row.time_reusing._asdict()}


def _estimates(found: Results) -> Results:
    return {key: list(value) for key, value in found.items()}


def draw(results: Results) -> Figure:
    """Accuracy over adaptation time, a panel a number of steps."""
    sections = results["sections"]
    figure = Figure(figsize=(4 * len(sections) + 1, 3.8), layout="constrained")
    panels = figure.subplots(1, len(sections), sharey=True, squeeze=False)[0]
    for axes, section in zip(panels, sections, strict=True):
        moving = [row for row in section["rows"] if "1" in row["pattern"]]
        for key, colour, label in (
            ("time", "#808080", "everything each step"),
            ("time_reusing", COLOURS[0], "prefix reused"),
        ):
            axes.plot(
                [1000 * row[key]["median"] for row in moving], [100 * row["accuracy"][0] for row in moving], "o",
                color=colour, markersize=4, fillstyle="full" if key == "time_reusing" else "none", label=label,
            )  # fmt: skip
        for row in moving:
            if row["pattern"] in (section["chosen"], "11111"):
                place = 1000 * row["time_reusing"]["median"], 100 * row["accuracy"][0]
                axes.plot(*place, "o", color=COLOURS[1], markersize=8, fillstyle="none")
                axes.annotate(row["pattern"], place, (4, 6), textcoords="offset points", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.2)
        axes.set_xlabel("time of one adaptation, ms")
        axes.set_title(f"{section['steps']} {'step' if section['steps'] == 1 else 'steps'}", loc="left", fontsize=10)
    panels[0].set_ylabel("validation accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def fastest(section: Results, tolerance: float, time: str) -> Results:
    """The fastest pattern at most so many points below full adaptation on the validation tasks."""
    full = section["rows"][0]
    able = [
        row for row in section["rows"]
        if "1" in row["pattern"] and 100 * (full["accuracy"][0] - row["accuracy"][0]) <= tolerance
    ]  # fmt: skip
    return min(able, key=lambda row: row[time]["median"])


def faster(full: Results, row: Results, time: str, cost: str) -> str:
    """How many times as fast as full adaptation: measured, and by multiply-adds."""
    return f"{full[time]['median'] / row[time]['median']:.2f} ({full[cost] / row[cost]:.2f})"


def bounds(found: Results) -> str:
    """What the machine allows, in words and a table."""
    rows, worst = [], 1.0
    for row in found["rows"]:
        seconds = row["seconds"]
        most, head = (seconds["11111"] / seconds[name] for name in ("forward alone", "00001"))
        worst = min(worst, head / most)
        ratios = [f"{seconds['11111'] / seconds[name]:.2f}" for name in seconds if name != "11111"]
        rows.append([f"{row['shots']}-shot, {row['filters']} filters", f"{1000 * seconds['11111']:.0f}", *ratios])
    names = [name for name in found["rows"][0]["seconds"] if name != "11111"]
    return (
        f"What this machine allows: {found['steps']} steps, random weights, medians of {found['repetitions']}; how "
        "many times as long full adaptation takes. Its forward passes alone take far more than the third that "
        "multiply-adds give them, so the ceiling without reuse is the last column, not "
        f"{CEILING}; 00001 reaches at least {100 * worst:.0f} % of it.\n\n" + table(["", "full, ms", *names], rows)
    )


def page(results: dict[str, Results]) -> str:
    """The README of the folder."""
    rows, choices, lines = [], [], []
    studies = {name: found for name, found in results.items() if "sections" in found}
    for found in studies.values():
        shots = f"{found['shots']}-shot"
        for section in found["sections"]:
            full, steps = section["rows"][0], section["steps"]
            chosen = next(row for row in section["rows"] if row["pattern"] == section["chosen"])
            plain = faster(full, chosen, "time", "cost")
            reusing = faster(full, chosen, "time_reusing", "cost_reusing")
            rows.append(
                [
                    f"{shots}, {steps} {'step' if steps == 1 else 'steps'}", f"**{section['chosen']}**", plain, reusing,
                    percent(section["test"]["full"]), percent(section["test"]["chosen"]),
                    percent(section["test"]["difference"], "+"),
                ]
            )  # fmt: skip
            picks = [fastest(section, tolerance, "time_reusing")["pattern"] for tolerance in TOLERANCES]
            choices.append([rows[-1][0], *picks])
            if steps == 1:
                best = max(
                    (row for row in section["rows"] if "1" in row["pattern"]), key=lambda row: row["accuracy"][0]
                )
                none = section["rows"][-1]
                lines.append(
                    f"* One step, {shots}: the best pattern on validation tasks is {best['pattern']}, "
                    f"{percent(best['difference'], '+')} points against full adaptation, which has "
                    f"{percent(full['accuracy'])} % (no adaptation {percent(none['accuracy'])} %)."
                )
        last = found["sections"][-1]
        head_alone = next(row for row in last["rows"] if row["pattern"] == "00001")
        lines.append(
            f"* Times faster, {shots}, 00001 in {last['steps']} steps (by multiply-adds): "
            f"{faster(last['rows'][0], head_alone, 'time', 'cost')} with everything computed in every step, "
            f"{faster(last['rows'][0], head_alone, 'time_reusing', 'cost_reusing')} with reuse."
        )
    tasks, repetitions = (
        " and ".join(str(found[key]) for found in studies.values() if key in found) for key in ("tasks", "repetitions")
    )
    pictures = "\n".join(f"![Accuracy over adaptation time, {name}]({name}.png)" for name in studies)
    head = [
        "",
        "pattern chosen",
        "times faster (predicted)",
        "with reuse (predicted)",
        "full, test %",
        "chosen, test %",
        "difference, points",
    ]
    return f"""# Lambda patterns (arXiv 2206.05930)

Only the abstract of the paper was at hand, so its patterns, tolerances, device and tables cannot be compared with.
Known differences: the CIFAR-FS images are lossy (5 bits of luma, half the chroma resolution); the models were trained
on one CPU thread for minutes, and are well below published MAML; timings are of one task at a time on that CPU.

| claim of the abstract | here |
| --- | --- |
| about 3 times faster, minimal loss | "times faster"; without reuse at most {CEILING} by multiply-adds, see below |
| much better accuracy with one step | "One step" below |

{table(head, rows)}

Chosen on {tasks} validation tasks, the fastest within 1 point of full adaptation, and confirmed on as many test tasks;
each time is the median of {repetitions} adaptations. By tolerance:

{table(["", *(f"{tolerance:g} points" for tolerance in TOLERANCES)], choices)}

{chr(10).join(lines)}

{bounds(results["ceiling"]) if "ceiling" in results else ""}

{pictures}

`python experiments/lambda_patterns/run.py` trains the models, if they are not in `runs/`, and measures.

{made(results)}
"""


PARTS = {
    "ceiling": Part(ceiling, None, quick_ceiling),
    "one_shot": Part(lambda arguments: patterns(arguments, 1), draw, quick),
    "five_shot": Part(lambda arguments: patterns(arguments, 5), draw, None),
}

if __name__ == "__main__":
    run(__doc__, Path(__file__).parent, PARTS, page)
