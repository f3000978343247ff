"""The report of a run: learning curve, adaptation curve and example tasks as PNG, and a page that shows them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learner import MetaLearner
from innerloop.problem import Task
from innerloop.reporting import (
    Code,
    Gallery,
    Heading,
    Part,
    Picture,
    how_made,
    markdown,
    percent,
    provenance,
    write,
)
from innerloop.reporting.figures import (
    BLUE,
    DASHED,
    DOTS,
    DOTTED,
    GREEN,
    GREY,
    RED,
    STYLE,
    Line,
    Panel,
    panels,
    save,
)
from innerloop.reporting.figures import confusion as draw_confusion
from innerloop.tasks import TaskSource
from innerloop.training.build import INK
from innerloop.training.checkpoints import save_weights
from innerloop.training.code import short
from innerloop.training.confusion import confusion
from innerloop.training.evaluation import Assessment, verdict
from innerloop.training.fit import Fitted
from innerloop.training.runs import ACCURACIES, RESULTS, save_results
from innerloop.training.settings import Settings
from innerloop.training.store import METRICS, Record, read_records

LEARNING, ADAPTATION, TASKS, REPORT = "learning_curve.png", "adaptation_curve.png", "tasks.png", "report.md"
CONFUSION = "confusion.png"
EXAMPLES, MOST_ROWS, MOST_SHOTS, MOST_QUERIES = 3, 5, 5, 10

PROTOCOL = {
    "transductive": "transductive (queries predicted together)",
    "inductive": "inductive (each query predicted alone)",
}
IMAGES = "A row a class: its name, support images, queries. Green: right; red: wrong, with the class predicted."
REGRESSION = "Black: support. Lines: the truth, and what is predicted for the queries before and after adaptation."
BOTH_PROTOCOLS = (
    "Transductive: the queries of a task are predicted together and batch norm takes its statistics from all of them, "
    "as in most papers. Inductive: it takes them from the support set, so that no query sees another."
)

Array = NDArray[np.float64]
Pair = tuple[Tensor, Tensor]


def write_report(
    folder: Path,
    settings: Settings,
    learner: MetaLearner,
    tasks: TaskSource,
    fitted: Fitted,
    assessment: Assessment,
    curve: Assessment,
    warnings: Sequence[str] = (),
) -> None:
    """Write ``results.json``, the pictures and ``report.md`` of a run that was trained and tested.

    For classification ``test.safetensors`` holds the accuracy of each test task under each protocol.

    Args:
        folder: of the run, with its ``metrics.jsonl``.
        settings: of the run.
        learner: with the weights that were tested.
        tasks: that it was tested on.
        fitted: how training ended.
        assessment: of the test.
        curve: of fewer test tasks, with curves.
        warnings: what is wrong with the run, a sentence each.
    """
    accuracies = {each.protocol: each.accuracies for each in assessment.protocols if each.accuracies is not None}
    if accuracies:
        save_weights(folder / ACCURACIES, accuracies)
    plot_learning(folder / LEARNING, read_records(folder / METRICS))
    plot_adaptation(folder / ADAPTATION, curve, tasks.ways)
    examples: list[Part] = []
    if plot_tasks(folder / TASKS, tasks, learner, "test", settings.dataset in INK):
        picture = Picture(TASKS, "Some test tasks", REGRESSION if tasks.ways is None else IMAGES)
        examples = [Heading("Some test tasks"), Gallery([picture])]
    if mistaken := confusion(tasks, "test", assessment.inductive.answers):
        save(folder / CONFUSION, draw_confusion(mistaken.classes, mistaken.counts))
        picture = Picture(CONFUSION, "A row a class, a column a guess")
        examples += [Heading("Which classes are taken for which"), Gallery([picture])]
    parts = [
        *(f"**Warning:** {text}." for text in warnings),
        Code(describe(assessment, settings, "test")),
        BOTH_PROTOCOLS,
        Heading("Training"),
        ending(folder, settings, fitted),
        Gallery([Picture(LEARNING, "Accuracy and loss over the outer steps")]),
        Heading("Adaptation"),
        f"The first {curve.inductive.tasks} test tasks, with 95 % intervals.",
        Gallery([Picture(ADAPTATION, "Score after each adaptation step")]),
        *examples,
        *how_made(provenance()),
        Code(json.dumps(asdict(settings), indent=2)),
    ]
    write(folder / REPORT, markdown(task_words(settings), parts))
    # Last, because a run that has results counts as done.
    results = {"training": fitted._asdict(), "warnings": list(warnings)}
    results |= {"test": summary(assessment), "curve": summary(curve)}
    save_results(folder / RESULTS, results | {"confusion": mistaken._asdict() if mistaken else None})


def task_words(settings: Settings) -> str:
    """What the tasks are, such as "glyphs, 5-way 1-shot"."""
    sizes = f"{f'{settings.ways}-way ' if settings.ways else ''}{f'{settings.shots}-shot' if settings.shots else ''}"
    return ", ".join(filter(None, (short(settings.dataset), sizes.strip())))


def slug(settings: Settings) -> str:
    """The same for names of files."""
    sizes = [f"{count}{unit}" for count, unit in ((settings.ways, "way"), (settings.shots, "shot")) if count]
    return "-".join([re.sub(r"[^\w.]+", "-", short(settings.dataset)), *sizes])


def ending(folder: Path, settings: Settings, fitted: Fitted) -> str:
    """How far training came, and how to go on where it stopped early."""
    done = f"{fitted.step:,} steps in {fitted.seconds / 60:.1f} minutes; best weights at step {fitted.best_step}."
    if fitted.skipped:
        done += f" Left out: {fitted.skipped} batches whose loss or gradient was not finite."
    if fitted.stopped == "steps":
        return done
    share, why, more = fitted.step / settings.steps, "validation got no better", "--patience none"
    if fitted.stopped == "minutes":
        why, more = "the time was up", f"--minutes {math.ceil(fitted.seconds / 60 / share)}"
    return (
        f"{done} That is {100 * share:.2g} % of the {settings.steps:,} steps planned: {why}. "
        f"To go on: innerloop train --resume {quote(str(folder))} {more}"
    )


def summary(assessment: Assessment) -> dict[str, Any]:
    """An assessment for JSON; each estimate is its mean and the half-width of its 95 % interval."""
    scores: dict[str, Any] = {}
    for each in assessment.protocols:
        scores[each.protocol] = each._asdict()
        for name in ("accuracies", "answers", "losses"):
            del scores[each.protocol][name]
        scores[each.protocol]["baselines"] = {name: found._asdict() for name, found in each.baselines.items()}
    if assessment.nearest_neighbour:
        scores |= {"verdict": verdict(assessment.protocols[0].baselines), "no_features": assessment.no_features}
    return scores | {"nearest_neighbour": assessment.nearest_neighbour}


def describe(assessment: Assessment, settings: Settings, split: str) -> str:
    """An assessment in a few lines of text."""
    first = assessment.protocols[0]
    lost = verdict(first.baselines)
    lines = [lost] if lost else []
    lines += [f"{first.tasks} {split} tasks, {task_words(settings)}, {first.steps} adaptation steps"]
    for scores in assessment.protocols:
        loss = f"loss {scores.loss.mean:.4g} ± {scores.loss.interval:.2g}"
        lines.append(f"  {PROTOCOL[scores.protocol]:<42}{percent(scores.accuracy) if scores.accuracy else loss}")
        lines += [f"    {name:<40}{percent(found.accuracy)}" for name, found in scores.baselines.items()]
    if assessment.no_features:
        lines.append(f"  no baseline on features: {assessment.no_features}")
    return "\n".join(lines)


def plot_learning(path: Path, records: Sequence[Record]) -> None:
    """Draw query accuracy (where there is one) and loss over the outer steps, in training and validation."""
    train, validation = ([record for record in records if record["kind"] == kind] for kind in ("train", "validation"))
    kept = [record for record in validation if record["best"]][-1:]
    shown: list[Panel] = []
    for quantity in ("accuracy", "loss") if "accuracy" in train[0] else ("loss",):
        scale, unit = (100, ", %") if quantity == "accuracy" else (1, "")
        # One batch says little: a dot for each of some sixty stretches of steps.
        stretch = max(1, len(train) // 60)
        steps, values = (_means(_column(train, name), stretch) for name in ("step", quantity))
        lines = {"training": Line(steps, scale * values, DOTS | {"color": GREY, "marker": "."})}
        if validation:
            steps, values = _column(validation, "step"), scale * _column(validation, quantity)
            half = scale * _column(validation, "interval") if not shown else np.zeros_like(values)
            lines["validation"] = Line(steps, values, {"color": BLUE}, values - half, values + half)
            ends = _column(kept, "step"), scale * _column(kept, quantity)
            lines["weights kept"] = Line(*ends, DOTS | {"color": BLUE, "markersize": 6})
        shown.append(Panel(lines, {"xlabel": "outer step", "ylabel": f"query {quantity}{unit}"}))
    save(path, panels(shown))


def plot_adaptation(path: Path, assessment: Assessment, ways: int | None) -> None:
    """Draw query accuracy, or loss for regression, after 0, 1, ... adaptation steps, with 95 % intervals.

    Args:
        path: where the PNG goes.
        assessment: scores that hold curves.
        ways: classes of a task; None for regression.
    """
    lines = {}
    for scores in assessment.protocols:
        curve, scale = (scores.loss_curve, 1) if scores.accuracy_curve is None else (scores.accuracy_curve, 100)
        assert curve is not None
        means, spread = scale * np.array(curve).T
        lines[scores.protocol] = Line(range(len(curve)), means, {"marker": "o"}, means - spread, means + spread)
    levels = {}
    if assessment.nearest_neighbour:
        levels["nearest neighbour"] = 100 * assessment.nearest_neighbour.mean, DASHED
    if ways is not None:
        levels["chance"] = 100 / ways, DOTTED
    names = {
        "xlabel": "adaptation steps",
        "xticks": range(0, len(means), -(-len(means) // 10)),
        "ylabel": "query loss" if ways is None else "query accuracy, %",
    }
    save(path, panels([Panel(lines, names, levels)], width=5.5))


def plot_tasks(
    path: Path, tasks: TaskSource, learner: MetaLearner | None, split: str = "test", ink: bool = False
) -> bool:
    """Draw the first tasks of a split and what a learner, if there is one, makes of their queries, predicted together.

    Args:
        path: where the PNG goes.
        tasks: of images, or regression on one number.
        learner: adapts and predicts; None draws the tasks alone.
        split: whose tasks.
        ink: draw 1 as black, for characters.

    Returns:
        Whether there is a picture: tasks of other shapes have none.
    """
    images = tasks.ways is not None and len(tasks.input_shape) == 3
    if not images and tasks.input_shape != (1,):
        return False
    batch = tasks.batch(split, 0, EXAMPLES)
    guesses = [learner.evaluate(batch, steps).outputs.float().cpu() for steps in (0, None)] if learner else []
    if not images:
        save(path, _numbers(split, batch, guesses))
        return True
    called = tasks.class_names(split, 0, EXAMPLES) or [list(map(str, range(tasks.ways or 0)))] * EXAMPLES
    (support, labels), (query, targets) = batch
    width, height = _grid_size(labels[0], targets[0])
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 * width + 0.2, EXAMPLES * (0.6 * height + 0.45)), layout="constrained")
        for index, axes in enumerate(figure.subplots(EXAMPLES)):
            title, found = f"{split} task {index}", None
            if guesses:
                found = guesses[-1][index].argmax(-1)
                title += f": {int((found == targets[index]).sum())} of {len(found)} queries right"
            shown, asked = (support[index], labels[index]), (query[index], targets[index])
            _draw_images(axes, shown, asked, found, ink, called[index])
            axes.set_title(title, loc="left", fontsize=10)
        save(path, figure)
    return True


def _numbers(split: str, batch: Task, guesses: Sequence[Tensor]) -> Figure:
    """Targets over inputs, and lines through what is predicted for the queries before and after adaptation."""
    shown = []
    for index in range(EXAMPLES):
        (support, known), (query, targets) = ([part[index].flatten() for part in pair] for pair in batch)
        x, order = torch.cat([support, query]).sort()
        lines = {"truth": Line(x, torch.cat([known, targets])[order], {"color": GREY})}
        x, order = query.sort()
        for values, style, name in zip(guesses, ":-", ("before adaptation", "after adaptation"), strict=False):
            lines[name] = Line(x, values[index].flatten()[order], {"color": BLUE, "linestyle": style})
        lines["support"] = Line(support, known, DOTS | {"color": "black", "markersize": 6})
        shown.append(Panel(lines, {"title": f"{split} task {index}"}))
    return panels(shown, columns=EXAMPLES, width=3.7)


def _draw_images(
    axes: Axes, support: Pair, query: Pair, guesses: Tensor | None, ink: bool, names: Sequence[str]
) -> None:
    """A row a class: its name, support, and queries, framed green where right, red and with the guess where not."""
    names = [name.rpartition("/")[2] for name in names]
    width, height = _grid_size(support[1], query[1])
    left = 0.5
    for (inputs, labels), most, found in ((support, MOST_SHOTS, None), (query, MOST_QUERIES, guesses)):
        for label in range(int(height)):
            bottom = height - 1 - label
            axes.text(0.25, bottom + 0.5, names[label][:12], ha="center", va="center", rotation=90, fontsize=6)
            for column, index in enumerate((labels == label).nonzero().flatten()[:most].tolist()):
                x, guess = left + column, None if found is None else int(found[index])
                picture = inputs[index].movedim(0, -1).squeeze(-1).numpy()
                extent = (x + 0.06, x + 0.94, bottom + 0.06, bottom + 0.94)
                axes.imshow(picture, extent=extent, cmap="gray_r" if ink else "gray", vmin=0, vmax=1)
                colour = GREY if guess is None else GREEN if guess == label else RED
                frame = Rectangle((x + 0.05, bottom + 0.05), 0.9, 0.9, fill=False, color=colour)
                frame.set_linewidth(0.6 if guess is None else 1.6)
                axes.add_patch(frame)
                if guess not in (None, label):
                    badge = {"facecolor": RED, "edgecolor": "none", "pad": 1.2}
                    corner = axes.text(x + 0.9, bottom + 0.1, names[guess][:9], color="white", fontsize=5, bbox=badge)
                    corner.set(ha="right", va="bottom")
        left += min(int((labels == 0).sum()), most) + 0.5
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")


def _grid_size(labels: Tensor, targets: Tensor) -> tuple[float, float]:
    """Width and height of a task's picture, in images."""
    ways = int(labels.max()) + 1
    shots, queries = min(len(labels) // ways, MOST_SHOTS), min(len(targets) // ways, MOST_QUERIES)
    return 0.5 + shots + 0.5 + queries, min(ways, MOST_ROWS)


def _column(records: Sequence[Record], name: str) -> Array:
    return np.array([record[name] for record in records], dtype=float)


def _means(values: Array, stretch: int) -> Array:
    return values[: len(values) // stretch * stretch].reshape(-1, stretch).mean(1)
