"""The report of a run: learning curve, adaptation curve and example tasks as PNG, and a page that shows them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from innerloop.files import write
from innerloop.learner import MetaLearner
from innerloop.tasks import TaskSource
from innerloop.training.build import INK
from innerloop.training.checkpoints import save_weights
from innerloop.training.code import short
from innerloop.training.confusion import confusion, plot_confusion
from innerloop.training.evaluation import Assessment, Estimate, verdict
from innerloop.training.fit import Fitted
from innerloop.training.runs import ACCURACIES, RESULTS, provenance, save_results
from innerloop.training.settings import Settings
from innerloop.training.store import METRICS, Record, read_records

BLUE, ORANGE, GREY, GREEN, RED = "#1f6fb4", "#d9720a", "#808080", "#2a9d4a", "#d43a2f"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
LEARNING, ADAPTATION, TASKS, REPORT = "learning_curve.png", "adaptation_curve.png", "tasks.png", "report.md"
CONFUSION = "confusion.png"
EXAMPLES, MOST_ROWS, MOST_SHOTS, MOST_QUERIES = 3, 5, 5, 10

PROTOCOL = {
    "transductive": "transductive (queries predicted together)",
    "inductive": "inductive (each query predicted alone)",
}
IMAGES = "A row a class: its name, support images, queries. Green: right; red: wrong, with the class predicted."
REGRESSION = "Black: support. Lines: the truth, and what is predicted for the queries before and after adaptation."
PAGE = """# {title}

{warnings}```
{scores}
```

Transductive: the queries of a task are predicted together and batch norm takes its statistics from all of them, as in
most papers. Inductive: it takes them from the support set, so that no query sees another.

## Training

{training}

![Accuracy and loss over the outer steps](learning_curve.png)

## Adaptation

The first {curve_tasks} test tasks, with 95 % intervals.

![Score after each adaptation step](adaptation_curve.png)
{examples}
## How it was made

{made}

```json
{settings}
```
"""

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
    examples = ""
    if plot_tasks(folder / TASKS, tasks, learner, "test", settings.dataset in INK):
        legend = REGRESSION if tasks.ways is None else IMAGES
        examples = f"\n## Some test tasks\n\n![Some test tasks]({TASKS})\n\n{legend}\n"
    if mistaken := confusion(tasks, "test", assessment.inductive.answers):
        plot_confusion(folder / CONFUSION, mistaken)
        examples += f"\n## Which classes are taken for which\n\n![A row a class, a column a guess]({CONFUSION})\n"
    page = PAGE.format(
        title=task_words(settings),
        scores=describe(assessment, settings, "test"),
        warnings="".join(f"**Warning:** {text}.\n\n" for text in warnings),
        training=ending(folder, settings, fitted),
        curve_tasks=curve.inductive.tasks,
        examples=examples,
        made="\n".join(f"* {key}: {value}" for key, value in _flat(provenance())),
        settings=json.dumps(asdict(settings), indent=2),
    )
    write(folder / REPORT, page)
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
    sizes = (f"{settings.ways}way", f"{settings.shots}shot") if settings.shots else ()
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
        f"To go on: innerloop train --resume {folder} {more}"
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
        text = (
            _percent(scores.accuracy)
            if scores.accuracy
            else f"loss {scores.loss.mean:.4g} ± {scores.loss.interval:.2g}"
        )
        lines.append(f"  {PROTOCOL[scores.protocol]:<42}{text}")
        lines += [f"    {name:<40}{_percent(found.accuracy)}" for name, found in scores.baselines.items()]
    if assessment.no_features:
        lines.append(f"  no baseline on features: {assessment.no_features}")
    return "\n".join(lines)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.2f} % ± {100 * estimate.interval:.2f}"


def _flat(tree: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield place + key, value


def plot_learning(path: Path, records: Sequence[Record]) -> None:
    """Draw query accuracy (where there is one) and loss over the outer steps, in training and validation."""
    train, validation = ([record for record in records if record["kind"] == kind] for kind in ("train", "validation"))
    quantities = ["accuracy", "loss"] if "accuracy" in train[0] else ["loss"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(quantities) + 0.5, 3.6), layout="constrained")
        for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
            scale = 100 if quantity == "accuracy" else 1
            steps, values = _column(train, "step"), scale * _column(train, quantity)
            # One batch says little: a dot for each of some sixty stretches of steps.
            stretch = max(1, len(steps) // 60)
            axes.plot(_means(steps, stretch), _means(values, stretch), ".", color=GREY, markersize=4, label="training")
            if validation:
                steps, values = _column(validation, "step"), scale * _column(validation, quantity)
                axes.plot(steps, values, color=BLUE, label="validation")
                if quantity == quantities[0]:
                    _band(axes, steps, values, scale * _column(validation, "interval"), BLUE)
                kept = [index for index, record in enumerate(validation) if record["best"]][-1:]
                axes.plot(steps[kept], values[kept], "o", color=BLUE, label="weights kept")
            axes.set_xlabel("outer step")
            axes.set_ylabel("query accuracy, %" if quantity == "accuracy" else "query loss")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.savefig(path)


def plot_adaptation(path: Path, assessment: Assessment, ways: int | None) -> None:
    """Draw query accuracy, or loss for regression, after 0, 1, ... adaptation steps, with 95 % intervals.

    Args:
        path: where the PNG goes.
        assessment: scores that hold curves.
        ways: classes of a task; None for regression.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.8), layout="constrained")
        axes = figure.subplots()
        for scores, colour in zip(assessment.protocols, (BLUE, ORANGE), strict=False):
            curve, scale = (scores.loss_curve, 1) if scores.accuracy_curve is None else (scores.accuracy_curve, 100)
            assert curve is not None
            steps, (means, spread) = np.arange(len(curve), dtype=float), scale * np.array(curve).T
            axes.plot(steps, means, "o-", color=colour, markersize=4, label=scores.protocol)
            _band(axes, steps, means, spread, colour)
        if assessment.nearest_neighbour:
            axes.axhline(100 * assessment.nearest_neighbour.mean, color=GREY, linestyle="--", label="nearest neighbour")
        if ways is not None:
            axes.axhline(100 / ways, color=GREY, linestyle=":", label="chance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("adaptation steps")
        axes.set_ylabel("query loss" if ways is None else "query accuracy, %")
        figure.legend(loc="outside upper center", ncols=2)
        figure.savefig(path)


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
    called = tasks.class_names(split, 0, EXAMPLES) or [[str(label) for label in range(tasks.ways or 0)]] * EXAMPLES
    (support, labels), (query, targets) = batch
    guesses = [learner.evaluate(batch, steps).outputs.float().cpu() for steps in (0, None)] if learner else []
    with mpl.rc_context(STYLE):
        if images:
            width, height = _grid_size(labels[0], targets[0])
            figure = Figure(figsize=(0.6 * width + 0.2, EXAMPLES * (0.6 * height + 0.45)), layout="constrained")
        else:
            figure = Figure(figsize=(11, 3.6), layout="constrained")
        shape = (EXAMPLES, 1) if images else (1, EXAMPLES)
        for index, axes in enumerate(figure.subplots(*shape)):
            title = f"task {index} of the {split} split"
            shown, asked = (support[index], labels[index]), (query[index], targets[index])
            before, after = (each[index] for each in guesses) if guesses else (None, None)
            if not images:
                _draw_numbers(axes, shown, asked, before, after)
            elif after is None:
                title = f"{split} task {index}"
                _draw_images(axes, shown, asked, None, ink, called[index])
            else:
                right = int((after.argmax(-1) == asked[1]).sum())
                title = f"{split} task {index}: {right} of {len(after)} queries right"
                _draw_images(axes, shown, asked, after.argmax(-1), ink, called[index])
            axes.set_title(title, loc="left", fontsize=10)
        if not images:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.savefig(path)
    return True


def _draw_numbers(axes: Axes, support: Pair, query: Pair, before: Tensor | None, after: Tensor | None) -> None:
    """Targets over inputs, ``[examples, 1]`` both, and lines through what is predicted for the queries."""
    x, order = torch.cat([support[0], query[0]]).flatten().sort()
    axes.plot(x, torch.cat([support[1], query[1]]).flatten()[order], color=GREY, label="truth")
    x, order = query[0].flatten().sort()
    for values, style, name in ((before, ":", "before adaptation"), (after, "-", "after adaptation")):
        if values is not None:
            axes.plot(x, values.flatten()[order], style, color=BLUE, label=name)
    axes.plot(support[0].flatten(), support[1].flatten(), "o", color="black", label="support")


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


def _band(axes: Axes, x: Array, middle: Array, half: Array, colour: str) -> None:
    axes.fill_between(x, middle - half, middle + half, color=colour, alpha=0.15, linewidth=0)
