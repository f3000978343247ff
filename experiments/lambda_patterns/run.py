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

from common import COLOURS, ROOT, Part, Results, details, percent, run, table, verdict
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import innerloop as il
from innerloop.studies.patterns import Row, study, times_of, with_pattern
from innerloop.training.runs import SETTINGS

TOLERANCES = 0.5, 1.0, 2.0  # percentage points
ABOUT_THREE = 2.5  # times faster, at least
HOW = "`python experiments/lambda_patterns/run.py` trains the models, if they are not in `runs/`, and measures."
MAML = {1: "58.9 ± 1.9", 5: "71.5 ± 1.0"}  # 5-way CIFAR-FS, of other work: github.com/cainiaomyf/FSL-Insight
SUFFIXES = [("1" * moving).zfill(5) for moving in range(1, 6)]
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
    run_folder = f"runs/cifar-fs-{shots}-shot"
    folder = ROOT / run_folder
    data = ["--data", os.path.relpath(arguments.data, ROOT)] if arguments.data else []
    if not (folder / "results.json").exists():
        if (folder / SETTINGS).exists():
            innerloop("train", "--resume", run_folder)
        else:
            options = (RECIPE.format(shots=shots) + TRAINING[shots]).split()
            innerloop("train", "--out", run_folder, *data, *options)
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    options = ["--tolerance", "1.0", "--steps", "1,5,10", *STUDY[shots].split()]
    innerloop("patterns", run_folder, *data, *options, *threads)
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
    figure = Figure(figsize=(4 * len(sections) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
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
        places = [
            (1000 * row["time_reusing"]["median"], 100 * row["accuracy"][0], row["pattern"])
            for row in moving if row["pattern"] in SUFFIXES or row["pattern"] == section["chosen"]
        ]  # fmt: skip
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + 0.3 * (top - bottom))
        for rank, (x, y, pattern) in enumerate(sorted(places)):
            chosen = pattern == section["chosen"]
            axes.plot(
                x, y, "o", color=COLOURS[1], markersize=8, fillstyle="none",
                label="chosen" if chosen else None, alpha=1 if chosen else 0,
            )  # fmt: skip
            axes.annotate(
                pattern, (x, y), (x, 0.99 - 0.055 * (rank % 4)), textcoords=axes.get_xaxis_transform(), fontsize=8,
                ha="center", va="top", color=COLOURS[1] if chosen else "black",
                arrowprops={"arrowstyle": "-", "color": "#c0c0c0", "linewidth": 0.8, "shrinkB": 3},
            )  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.1)
        left, right = axes.get_xlim()
        of_decade = (1, 2, 3, 5) if right > 5 * left else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
        ticks = [digit * 10**power for power in range(-1, 5) for digit in of_decade]
        axes.set_xticks([tick for tick in ticks if left <= tick <= right])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("time of one adaptation, ms")
        axes.set_title(f"{section['steps']} {'step' if section['steps'] == 1 else 'steps'}", loc="left", fontsize=10)
    panels[0].set_ylabel("validation accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def row_of(section: Results, pattern: str) -> Results:
    return next(row for row in section["rows"] if row["pattern"] == pattern)


def fastest(section: Results, tolerance: float) -> str:
    """The fastest pattern at most so many points below full adaptation on the validation tasks."""
    full = section["rows"][0]
    able = [
        row for row in section["rows"]
        if "1" in row["pattern"] and 100 * (full["accuracy"][0] - row["accuracy"][0]) <= tolerance
    ]  # fmt: skip
    return min(able, key=lambda row: row["time_reusing"]["median"])["pattern"]


def faster(section: Results, pattern: str, of: str) -> float:
    """How many times as fast as full adaptation, of a time or a cost."""
    full, row = section["rows"][0], row_of(section, pattern)
    return full[of]["median"] / row[of]["median"] if "time" in of else full[of] / row[of]


def case_of(found: Results, section: Results) -> str:
    return f"{found['shots']}-shot, {section['steps']} {'step' if section['steps'] == 1 else 'steps'}"


def between(values: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def forward_share(found: Results) -> list[float]:
    """Of the time of full adaptation."""
    return [row["seconds"]["forward alone"] / row["seconds"]["11111"] for row in found["rows"]]


def claims(results: dict[str, Results]) -> list[list[str]]:
    """Claim, published, here, verdict, likely cause."""
    pairs = [(found, section) for found in results.values() if "sections" in found for section in found["sections"]]
    if not pairs:
        return []
    times = {
        of: {case_of(*pair): faster(pair[1], pair[1]["chosen"], of) for pair in pairs}
        for of in ("time", "time_reusing")
    }
    cause, rows = "", []
    if "ceiling" in results:
        shares = forward_share(results["ceiling"])
        cause = (
            f"forward passes, which no pattern saves, take {between([100 * share for share in shares], '.0f')} % of "
            f"full adaptation on this CPU: at most {between([1 / share for share in shares], '.1f')} times"
        )
    plain = list(times["time"].values())
    holds = all(value >= ABOUT_THREE for value in plain)
    rows.append(
        ["adaptation is faster, everything computed in each step", "about 3 times", f"{between(plain, '.2f')} times",
         verdict(holds), "" if holds else cause]
    )  # fmt: skip
    several = [(found, section) for found, section in pairs if section["steps"] > 1]
    if several:
        reused = [times["time_reusing"][case_of(*pair)] for pair in several]
        once = [value for case, value in times["time_reusing"].items() if case.endswith("1 step")]
        least = min(section["steps"] for _, section in several)
        rows.append(
            ["adaptation is faster, blocks below the moving ones computed once (exact, ours)", "about 3 times",
             f"{between(reused, '.1f')} times from {least} steps on"
             + (f"; {between(once, '.1f')} in one step" if once else ""),
             f"{verdict(all(value >= ABOUT_THREE for value in reused))} from {least} steps on",
             "nothing below the moving blocks changes between steps; one step has nothing to reuse"]
        )  # fmt: skip
        lose = [pair for pair in several if sum(pair[1]["test"]["difference"]) < 0]
        tasks = " and ".join(dict.fromkeys(f"{found['tasks']}" for found, _ in lose if "tasks" in found))
        rows.append(
            ["the loss of accuracy is minimal", "minimal",
             "points: " + "; ".join(f"{percent(pair[1]['test']['difference'], '+')} ({case_of(*pair)})"
                                    for pair in several),
             f"no loss shown in {len(several) - len(lose)} of {len(several)}"
             + (f"; {', '.join(case_of(*pair) for pair in lose)} loses" if lose else ""),
             f"chosen on {tasks} tasks, too few to tell one point" if lose else ""]
        )  # fmt: skip
    for found, section in pairs:
        if section["steps"] == 1:
            test, none = section["test"], section["rows"][-1]
            mean, interval = test["difference"]
            best = max((row for row in section["rows"] if "1" in row["pattern"]), key=lambda row: row["accuracy"][0])
            rows.append(
                [f"one step gains accuracy, {found['shots']}-shot", "much better",
                 f"{section['chosen']}: {percent(test['difference'], '+')} points, from {100 * test['full'][0]:.1f} to "
                 f"{100 * test['chosen'][0]:.1f} % (guessing: 20); best in validation: {best['pattern']}",
                 verdict(mean > interval) + (", near guessing" if mean > interval else ""),
                 f"one step undershoots: {100 * section['rows'][0]['accuracy'][0]:.1f} % in validation, "
                 f"{100 * none['accuracy'][0]:.1f} before any"]
            )  # fmt: skip
    for found in results.values():
        if "trained" in found:
            training, test = found["trained"]["training"], found["trained"]["test"]
            rows.append(
                [f"MAML itself, test %, {found['shots']}-shot", f"{MAML[found['shots']]} (other work)",
                 f"{percent(test['transductive']['accuracy'])}; nearest neighbour on pixels "
                 f"{percent(test['nearest_neighbour'])}", "far below",
                 f"{training['step']:,} outer steps, {training['seconds'] / 60:.0f} minutes on one thread"]
            )  # fmt: skip
    return rows


def bounds(found: Results) -> str:
    """What the machine allows."""
    rows = []
    for row in found["rows"]:
        seconds = row["seconds"]
        ratios = [f"{seconds['11111'] / seconds[name]:.2f}" for name in seconds if name != "11111"]
        rows.append([f"{row['shots']}-shot, {row['filters']} filters", f"{1000 * seconds['11111']:.0f}", *ratios])
    names = [name for name in found["rows"][0]["seconds"] if name != "11111"]
    return (
        f"**What this machine allows**: how many times as long full adaptation takes, {found['steps']} steps, random "
        f"weights, medians of {found['repetitions']}. The last column bounds what can be had without reuse.\n\n"
        + table(["", "full, ms", *names], rows)
    )


def page(results: dict[str, Results]) -> str:
    """The README of the folder."""
    studies = {name: found for name, found in results.items() if "sections" in found}
    rows = [
        [
            case_of(found, section), f"**{section['chosen']}**",
            *(f"{faster(section, section['chosen'], time):.2f} ({faster(section, section['chosen'], cost):.2f})"
              for time, cost in (("time", "cost"), ("time_reusing", "cost_reusing"))),
            percent(section["test"]["full"]), percent(section["test"]["chosen"]),
            percent(section["test"]["difference"], "+"),
            " / ".join(fastest(section, tolerance) for tolerance in TOLERANCES),
        ]
        for found in studies.values() for section in found["sections"]
    ]  # fmt: skip
    tasks, repetitions, tolerance = (
        " and ".join(dict.fromkeys(f"{found[key]:g}" for found in studies.values() if key in found))
        for key in ("tasks", "repetitions", "tolerance")
    )
    minutes = " and ".join(
        f"{found['trained']['training']['seconds'] / 60:.0f}" for found in studies.values() if "trained" in found
    )
    pictures = "\n".join(f"![Accuracy over adaptation time, {name}]({name}.png)" for name in studies)
    head = ["", "chosen", "times faster", "with reuse", "full, test %", "chosen, test %", "difference, points",
            f"within {' / '.join(f'{each:g}' for each in TOLERANCES)} points"]  # fmt: skip
    return f"""# Lambda patterns (arXiv 2206.05930)

**What differs from the paper.** Only its abstract was at hand: its patterns, tolerances, device and tables cannot be
compared with. The CIFAR-FS images are lossy (5 bits of luma, half the chroma resolution), the models were trained for
{minutes} minutes on one CPU thread, one seed each, and timings are of one task at a time on that CPU.

{table(["claim", "published", "here", "verdict", "likely cause"], claims(results))}

±: 95 % interval over tasks; of a difference, over its values on the same tasks.

**Patterns** (conv1 to conv4, linear; 1 adapts): the fastest within {tolerance} point of full adaptation on {tasks}
validation tasks, then tested on as many test tasks. Times faster: medians of {repetitions} adaptations, by
multiply-adds in brackets. Last column: the choice at other tolerances.

{table(head, rows)}

{bounds(results["ceiling"]) if "ceiling" in results else ""}

{pictures}

{details(results, HOW)}"""


PARTS = {
    "ceiling": Part(ceiling, None, quick_ceiling),
    "one_shot": Part(lambda arguments: patterns(arguments, 1), draw, quick),
    "five_shot": Part(lambda arguments: patterns(arguments, 5), draw, None),
}

if __name__ == "__main__":
    run(__doc__, Path(__file__).parent, PARTS, page)
