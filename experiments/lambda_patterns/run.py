"""Lambda patterns: which blocks need adapting (Khabarlak, arXiv 2206.05930).

Claims: with the right blocks, adaptation is about three times faster at a minimal loss of accuracy, and one adaptation
step gains accuracy. Measured: all 32 patterns of a Conv4 that was meta-trained by MAML, on the same validation tasks,
each adaptation timed with everything computed in every step and with the frozen prefix computed once; the fastest
within a tolerance, with its whole interval, is confirmed on test tasks. Of the paper only the abstract was at hand: its
patterns, tolerances, network, device and tables are not known.

The models are trained first, by `innerloop train`, into runs/, unless they are there. Their blocks begin as those of a
classifier of the training classes. ANIL goes on from there, and then MAML, nine tenths of the way first order.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, Part, Results, Section, innerloop, judged, page_of, references, run, trained_run
from matplotlib.figure import Figure

import innerloop as il
from innerloop.reporting import digits, percent, points, student, table, verdict_of
from innerloop.reporting.figures import DOTS, GREY, ORANGE, Line, Panel, panels
from innerloop.studies.patterns import Row, study, times_of, with_pattern

WAYS = 5
TOLERANCES = 0.5, 1.0, 2.0  # percentage points
ABOUT_THREE = 2.5  # times faster, at least
HEAD_ALONE, REUSED = "00001", "00001, reused"  # what the studies choose at five steps
OF_31 = 3.16 / 1.96  # by Bonferroni, what widens the interval of the best of 31 patterns
HOW = "`python experiments/lambda_patterns/run.py` trains the models, if they are not in `runs/`, and measures."
MAML = {1: "58.9 ± 1.9", 5: "71.5 ± 1.0"}  # 5-way CIFAR-FS, of other work: github.com/cainiaomyf/FSL-Insight
SUFFIXES = [("1" * moving).zfill(5) for moving in range(1, 6)]
FILTERS = {1: 64, 5: 32}  # of the models here, by shots; they have strides and five inner steps
SIZES = [
    (shots, filters, *how) for how in (("stride", 5), ("pool", 10)) for shots in (1, 5) for filters in (32, 64)
]  # shots, filters, downsampling, inner steps
BLOCKS, ROUNDS = 6, 10  # medians, and what each is of
STUDY = {1: "--tasks 600", 5: "--tasks 600 --repetitions 30"}
SHARED = "--dataset cifar_fs --filters {filters} --downsample stride --augment flip,crop --threads 1 "
FEATURES = SHARED + "--method pretrained --outer-lr 3e-3 --steps {steps} --validate-every 4000"
HEAD = SHARED + (
    "--method anil --shots {shots} --start-from runs/lambda/pretrained-{filters} --inner-lr 0.03 --outer-lr 2e-3 "
    "--steps 5000"
)
WHOLE = SHARED + (
    "--method maml --shots {shots} --start-from runs/lambda/anil-{shots}-shot --inner-lr 0.03 --first-order 0.9 "
    "--steps 2000 --validate-every 250"
)


def patterns(arguments: argparse.Namespace, shots: int) -> Results:
    """Train, unless that is done, and study all patterns with the command."""
    filters = FILTERS[shots]
    of = {"shots": shots, "filters": filters, "steps": 500 * filters}
    trained_run(f"lambda/pretrained-{filters}", FEATURES.format(**of), arguments.data)
    trained_run(f"lambda/anil-{shots}-shot", HEAD.format(**of), arguments.data)
    folder = trained_run(f"lambda/maml-{shots}-shot", WHOLE.format(**of), arguments.data)
    run_folder = str(folder.relative_to(ROOT))
    data = ["--data", os.path.relpath(arguments.data, ROOT)] if arguments.data else []
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    options = ["--tolerance", "1.0", "--steps", "1,5", *STUDY[shots].split()]
    innerloop("patterns", run_folder, *data, *options, *threads)
    found = json.loads((folder / "patterns.json").read_text("utf-8"))
    training = json.loads((folder / "results.json").read_text("utf-8"))
    keep = ("training", "test", "command")
    return listed({"shots": shots, "trained": {key: training[key] for key in keep}, **found})


def listed(value: Any) -> Any:
    """Results with every estimate as mean and interval."""
    if isinstance(value, dict):
        own = {key: listed(each) for key, each in value.items()}
        return [own["mean"], own["interval"]] if own.keys() == {"mean", "interval"} else own
    return [listed(each) for each in value] if isinstance(value, list) else value


def speed(_: argparse.Namespace, sizes: Sequence[tuple[int, int, Any, int]] = SIZES, blocks: int = BLOCKS) -> Results:
    """How much faster patterns are on this machine, by random weights: no step takes less than its forward pass."""
    rows = []
    for shots, filters, downsample, steps in sizes:
        torch.manual_seed(0)
        model = il.models.Conv4(3, 5, filters, downsample, size=32)
        learner = il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=steps))
        support = torch.rand(5 * shots, 3, 32, 32), torch.arange(5).repeat_interleave(shots)
        runs = {
            "11111": with_pattern(learner, il.Blocks("11111")).adapted_parameters,
            "00011": with_pattern(learner, il.Blocks("00011"), reuse_prefix=False).adapted_parameters,
            HEAD_ALONE: with_pattern(learner, il.Blocks("00001"), reuse_prefix=False).adapted_parameters,
            "00011, reused": with_pattern(learner, il.Blocks("00011")).adapted_parameters,
            REUSED: with_pattern(learner, il.Blocks("00001")).adapted_parameters,
            "forward alone": partial(passes, learner.model, steps),
        }
        medians = ([time.median for time in times_of(list(runs.values()), [support], ROUNDS)] for _ in range(blocks))
        seconds = dict(zip(runs, map(list, zip(*medians, strict=True)), strict=True))
        rows.append({"shots": shots, "filters": filters, "downsample": downsample, "steps": steps, "seconds": seconds})
    return {"rounds": ROUNDS, "rows": rows}


def quick_speed(arguments: argparse.Namespace) -> Results:
    """The least of the sizes."""
    found = speed(arguments, [(1, 32, "pool", 10)], 1)
    seconds = {name: medians[0] for name, medians in found["rows"][0]["seconds"].items()}
    assert seconds["11111"] > 1.3 * seconds["forward alone"], f"a full step is more than its forward pass: {seconds}"
    assert seconds["00001"] > 0.9 * seconds["forward alone"], f"no step is less than its forward pass: {seconds}"
    assert seconds["11111"] > 3 * seconds["00001, reused"], f"reuse should save most of the time: {seconds}"
    return found


@torch.no_grad()
def passes(model: torch.nn.Module, steps: int, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """As many forward passes as an adaptation has."""
    for _ in range(steps):
        model(inputs)


def quick(arguments: argparse.Namespace) -> Results:
    """The same on glyphs, after a minute's training less."""
    torch.manual_seed(0)
    tasks = il.tasks.glyphs(ways=5, shots=1, queries=5)
    learner = il.MetaLearner(il.models.Conv4(1, 5, filters=8), inner=il.SGD(lr=0.2, steps=3))
    optimizer = torch.optim.Adam(learner.parameters(), lr=5e-3)
    il.fit(learner, tasks, steps=60, tasks_per_batch=8, optimizer=optimizer, validation_tasks=0, progress=False)
    (section,) = study(learner, tasks, [3], tolerance=8.0, count=60, repetitions=30)
    full, *others = section.rows
    head = next(row for row in others if row.pattern == "00001")
    predicted, measured = full.cost / head.cost, full.time_reusing.median / head.time_reusing.median
    assert 2.5 < predicted < 3, f"by its multiply-adds 00001 is {predicted:.2f} times as fast as 11111"
    assert measured > 1.5, f"with its prefix reused 00001 was {measured:.2f} times as fast as 11111"
    none = next(row for row in others if row.pattern == "00000")
    gained = full.accuracy.mean - none.accuracy.mean
    assert gained > 0.2, f"adapting every block should gain accuracy over adapting none, not {100 * gained:.1f} points"
    lost, chosen = -section.test.difference.mean, section.chosen
    assert chosen.cost_reusing < full.cost / 2, f"the choice {chosen.pattern} should be cheaper than full adaptation"
    assert lost < 0.12, f"the choice {section.chosen.pattern} lost {100 * lost:.1f} points on test tasks"
    inputs, targets = (part[0] for part in tasks.batch("test", 0, 1).support)
    once, again = (
        with_pattern(learner, il.Blocks("00011"), reuse_prefix=reuse).adapted_parameters(inputs, targets)
        for reuse in (True, False)
    )
    apart = max(float((once[name] - again[name]).abs().max()) for name in again)
    assert apart < 1e-4, f"blocks below that are computed once should change nothing: {apart:.2g}"
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
    shown = []
    for section in results["sections"]:
        moving = [row for row in section["rows"] if "1" in row["pattern"]]

        def of(rows: list[Results], time: str, **look: object) -> Line:
            mean, half = zip(*([100 * each for each in row["accuracy"]] for row in rows), strict=True)
            ends = ([at + sign * by for at, by in zip(mean, half, strict=True)] for sign in (-1, 1))
            return Line([1000 * row[time]["median"] for row in rows], mean, DOTS | look, *ends)

        chosen = [row_of(section, section["chosen"])]
        lines = {
            "everything each step": of(moving, "time", color=GREY, fillstyle="none"),
            "prefix reused": of(moving, "time_reusing"),
            "chosen": of(chosen, "time_reusing", color=ORANGE, markersize=9, fillstyle="none"),
        }
        named = [row for row in moving if row["pattern"] in SUFFIXES or row in chosen]
        notes = [(1000 * row["time_reusing"]["median"], 100 * row["accuracy"][0], row["pattern"]) for row in named]
        axes = {"xscale": "log", "xlabel": "time of one adaptation, ms", "ylabel": "validation accuracy, %"}
        pixels = results["trained"]["test"]["nearest_neighbour"][0] if "trained" in results else None
        levels = references(WAYS, pixels)
        shown.append(Panel(lines, axes | {"title": steps_of(section)}, levels, notes, ticks={"x": digits}))
    return panels(shown, columns=3, width=4, height=4)


def steps_of(section: Results) -> str:
    return f"{section['steps']} {'step' if section['steps'] == 1 else 'steps'}"


def row_of(section: Results, pattern: str) -> Results:
    return next(row for row in section["rows"] if row["pattern"] == pattern)


def fastest(section: Results, tolerance: float) -> str:
    """The fastest pattern at most so many points below full adaptation on the validation tasks, as `study` chooses."""
    able = [
        row for row in section["rows"]
        if "1" in row["pattern"] and 100 * (row["difference"][0] - row["difference"][1]) >= -tolerance
    ]  # fmt: skip
    return min(able, key=lambda row: row["time_reusing"]["median"])["pattern"]


HEADER = """# Lambda patterns (arXiv 2206.05930)

**What differs from the paper.** Only an abstract could be read: its patterns, tolerances, device and tables cannot be
compared with. The CIFAR-FS images are lossy (5 bits of luma, half the chroma resolution). Conv4 has strides in place of
pooling. The blocks of each model begin as those of a classifier of the training classes. ANIL goes on from there for
5,000 steps of 4 tasks, and then MAML for 2,000, nine tenths of the way first order; one seed each. So the head had
learned to adapt alone, which may favour it. Timings are of one task at a time on one CPU thread. Faster: how many times
as fast as full adaptation in as many steps. ±: 95 % interval over tasks; of a difference, over its values on the same
tasks; of a speed, over ratios of medians, each of as many rounds as the page says."""


def speed_section(found: Results) -> Section:
    """What the machine allows, and what the paper claims of it: over all sizes, since any one would be our choice."""
    names = [name for name in found["rows"][0]["seconds"] if name != "11111"]
    faster, rows = {name: [] for name in names}, []
    for row in found["rows"]:
        full = row["seconds"]["11111"]
        for name in names:
            ratios = [a / b for a, b in zip(full, row["seconds"][name], strict=True)]
            faster[name].append((statistics.fmean(ratios), student(ratios)))
        pooled = "strides" if row["downsample"] == "stride" else "pools"
        rows.append(
            [f"{row['shots']}-shot, {row['filters']} filters, {pooled}, {row['steps']} steps",
             f"{1000 * statistics.median(full):.0f}", *("{:.2f} ± {:.2f}".format(*faster[name][-1]) for name in names)]
        )  # fmt: skip
    claims = []
    for name, words in ((HEAD_ALONE, "everything computed in each step"), (REUSED, "blocks below computed once")):
        verdicts = {verdict_of(mean - ABOUT_THREE, half, 0.0) for mean, half in faster[name]}
        means = [mean for mean, _ in faster[name]]
        here = f"{min(means):.2f} to {max(means):.2f} times, the head alone"
        scale = f"Conv4 in {len(rows)} sizes, 1 and 5 shots, random weights"
        verdict = judged(verdicts.pop() if len(verdicts) == 1 else "open")
        claims.append([f"adaptation is about three times faster ({words})", "about 3 times", here, scale, verdict])
    return claims, (
        f"**What this machine allows**: how many times as long full adaptation takes, random weights. "
        f"{len(full)} medians of {found['rounds']} rounds, in turns. The last column bounds what can be had without "
        "reuse.\n\n" + table(["", "full, ms", *names], rows)
    )


def patterns_section(found: Results) -> Section:
    """Every number of steps: the choice, and what the paper claims of it."""
    name, claims, rows = f"{found['shots']}-shot", [], []
    for section in found["sections"]:
        test, chosen = section["test"], section["chosen"]
        rows.append(
            [steps_of(section), f"**{chosen}**",
             *(f"{section['rows'][0][cost] / row_of(section, chosen)[cost]:.2f}" for cost in ("cost", "cost_reusing")),
             *(percent(test[key], unit="") for key in ("full", "chosen")), percent(test["difference"], "+", ""),
             *(fastest(section, tolerance) for tolerance in TOLERANCES)]
        )  # fmt: skip
    own = found["trained"]["test"]["transductive"]["accuracy"] if "trained" in found else None
    model = f"a MAML of {100 * own[0]:.0f} %" if own else "glyphs"
    scale = f"CIFAR-FS, {FILTERS[found['shots']]} filters, {model}, 1 seed"
    for section in found["sections"]:
        case = f"{name}, {steps_of(section)}"
        if section["steps"] > 1:
            words, published = f"{case}: the loss of accuracy is minimal", "minimal"
            here = f"{points(section['test']['difference'], '+')} ({section['chosen']})"
        else:
            words, published = f"{case} gains accuracy", "much better"
            full, *others = section["rows"]
            best = max(others, key=lambda row: row["accuracy"][0])
            mean, half = (100 * each for each in best["difference"])
            here = f"{mean:+.2f} ± {OF_31 * half:.2f} points ({best['pattern']}, in validation, the best of 31)"
            here += f", from {percent(full['accuracy'])}; guessing: 20 %"
        claims.append([words, published, here, scale, "open"])  # a single training
    if own:
        here = f"{percent(own)}; raw pixels: {percent(found['trained']['test']['nearest_neighbour'])}"
        claims.append([f"{name}: MAML itself", f"{MAML[found['shots']]} % (other work)", here, scale, "open"])
    head = ["", "chosen", "faster", "with reuse", "full, test %", "chosen, test %", "difference, points",
            *(f"within {each:g}" for each in TOLERANCES)]  # fmt: skip
    return claims, (
        f"**Patterns, {name}** (conv1 to conv4, linear; 1 adapts): the fastest within a tolerance of full adaptation on"
        " validation tasks, then tested on as many test tasks. Faster: by multiply-adds. Last columns: the choice at "
        "tolerances in points.\n\n" + table(head, rows)
    )


def page(results: dict[str, Results]) -> str:
    """The README of the folder."""
    sections = {"speed": speed_section, "one_shot": patterns_section, "five_shot": patterns_section}
    return page_of(HEADER, sections, results, HOW, plain=("speed",))


PARTS = {
    "speed": Part(speed, None, quick_speed),
    "one_shot": Part(lambda arguments: patterns(arguments, 1), draw, quick),
    "five_shot": Part(lambda arguments: patterns(arguments, 5), draw, None),
}

if __name__ == "__main__":
    run(__doc__, Path(__file__).parent, PARTS, page)
