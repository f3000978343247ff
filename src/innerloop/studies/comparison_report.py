"""The report of a comparison: JSON, a page in Markdown with pictures beside it, and one HTML file that holds all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from innerloop.reporting import (
    Box,
    Cell,
    Facts,
    Gallery,
    Heading,
    Part,
    Picture,
    Table,
    digits,
    duration,
    how_made,
    html,
    markdown,
    percent,
    plain,
    points,
    size,
    write,
    write_json,
)
from innerloop.reporting.figures import DOTS, DOTTED, FRONTIER, OWN, Line, Panel, frontier, panels, png
from innerloop.studies.comparison import RULE, SHARE, Comparison, Entry, recommend, useful

RESULTS, PAGE, HTML = "comparison.json", "report.md", "report.html"
SUMMARY, LEARNING, MEMORY = "summary.png", "learning.png", "memory.png"
LINES = 6  # of a panel, at most
ARXIV = r"\d{4}\.\d{4,5}"


class Column(NamedTuple):
    """What is shown of every method.

    Attributes:
        value: of a method; None where it has none. A column without any is left out.
        text: of a value.
        meaning: how it was measured.
        best: which of the values is the best one, if any is.
        none: text where there is no value.
    """

    value: Callable[[Entry], Any]
    text: Callable[[Any], str]
    meaning: str
    best: Callable[[list[Any]], Any] | None = None
    none: str = "–"


COLUMNS = {
    "transductive": Column(
        lambda entry: entry.transductive,
        percent,
        "Test accuracy, the mean over the seeds, with the queries of a task predicted together, so that batch norm "
        "takes its statistics from all of them; the 95 % interval is that of the test tasks of all seeds or, from "
        "three seeds on where it is wider, that of the seeds.",
        max,
    ),
    "inductive": Column(
        lambda entry: entry.inductive, percent, "The same with each query predicted without the others.", max
    ),
    "below the best": Column(
        lambda entry: entry.behind if entry.behind.mean else None,
        points,
        "What the best method's test accuracy is above this one's, in points: the mean difference over test tasks, for "
        "trainings with the same seed; its interval is found like that of the accuracy.",
    ),
    "to target": Column(
        lambda entry: entry.reached,
        duration,
        "Outer steps until validation accuracy, averaged over three validations, stays above the target for five more, "
        "times the seconds of a meta-step: validations take no time here.",
        min,
        "never",
    ),
    "meta-step": Column(
        lambda entry: entry.meta_step.median,
        duration,
        "Time of the meta-gradient of one batch of tasks, the median of repetitions in a fresh process. Drawing tasks, "
        "the outer optimiser and logging come on top in training; no number here holds them.",
        min,
    ),
    "memory": Column(
        lambda entry: entry.memory,
        size,
        "Peak memory of one meta-step in a fresh process, above what model, tasks and libraries take: on a GPU what "
        "torch has allocated, otherwise what is resident.",
        min,
    ),
    "products": Column(
        lambda entry: entry.products,
        digits,
        "Curvature products in the meta-gradient of one task: Hessian-vector products and their like. 0 where it is "
        "exact and the graphs of the inner steps are kept instead.",
        min,
    ),
    "adaptation": Column(
        lambda entry: entry.adaptation.median,
        duration,
        "Time of adapting to one task, with no meta-gradient, the median of repetitions in the same process.",
        min,
    ),
    "outer steps": Column(
        lambda entry: entry.steps, lambda steps: f"{steps:,}", "Steps of training that the budget allowed."
    ),
    "each seed": Column(
        lambda entry: entry.seeds if len(entry.seeds) > 1 else None,
        lambda seeds: ", ".join(f"{100 * each:.1f}" for each in seeds),
        "Test accuracy of each seed, %: how much the training itself varies.",
    ),
}


def write_report(folder: Path, comparison: Comparison) -> None:
    """Write ``comparison.json``, ``report.html``, which needs no other file, ``report.md`` and its pictures."""
    write_json(folder / RESULTS, plain(comparison))
    fews = _fews(comparison)
    summary = Picture(
        SUMMARY,
        "Test accuracy against peak memory and against time, a point a method; the table has the numbers",
        "Test accuracy with its 95 % interval against what a method costs; methods that never stay above the target "
        "have no time.",
        png(summary_figure(comparison)),
    )
    learning = Picture(
        LEARNING,
        "Validation accuracy against seconds of meta-steps, a line a method",
        "Validation accuracy, the mean of the seeds, and the band from lowest to highest.",
        png(panels([_curves(comparison, few) for few in fews])),
    )
    memory = Picture(
        MEMORY,
        "Peak memory of a meta-step against the number of inner steps, a line a method",
        png=png(panels([_memory(few) for few in fews])),
    )
    for each in (summary, learning, memory):
        write(folder / each.file, each.png)
    found, shown = recommend(comparison), table(comparison)
    parts: list[Part] = [
        comparison.first_line,
        Box(found.first, found.rest),
        Gallery([summary]),
        f"The rule: {RULE}",
        Facts(_facts(comparison)),
        Heading("What was measured"),
        shown,
        *_by_name(comparison, "Without adaptation", _baselines),
        *_by_name(comparison, "Outer rates tried", _rates, "Bold: the one trained with."),
        Heading("Learning"),
        Gallery([learning]),
        Heading("Memory"),
        Gallery([memory]),
        *_by_name(comparison, "Settings that differ", _settings, "All other settings are the same.", prose=True),
        Heading("How it was measured"),
        Facts({name: column.meaning for name, column in COLUMNS.items() if name in shown.head}),
        *how_made(comparison.made),
    ]
    title = f"Comparison: {comparison.tasks}"
    write(folder / PAGE, markdown(title, parts))
    write(folder / HTML, html(title, parts))


def _facts(comparison: Comparison) -> dict[str, str]:
    return {
        "tasks": f"{comparison.tasks}; {comparison.test_tasks:,} test tasks a seed",
        "budget": f"{comparison.budget} for each of {len(comparison.entries)} methods",
        "target": f"{_target(comparison)} validation accuracy, {100 * SHARE:g} % of the best of all methods",
        "nearest neighbour on raw pixels": percent(comparison.nearest_neighbour),
        **{f"{name} could not be trained": why for name, why in comparison.failed.items()},
        **({"notes": "; ".join(comparison.notes)} if comparison.notes else {}),
    }


def summary_figure(comparison: Comparison) -> Figure:
    """Test accuracy against memory and against seconds to the target, the frontier and the recommendation marked."""
    memory = [float(max(entry.memory, 1)) for entry in comparison.entries]
    label = f"meta-steps to {_target(comparison)} validation accuracy, time"
    return panels(
        [
            _costs(comparison, memory, "peak memory of a meta-step", size),
            _costs(comparison, [entry.reached for entry in comparison.entries], label, duration),
        ]
    )


def _costs(comparison: Comparison, costs: Sequence[float | None], label: str, form: Callable[[float], str]) -> Panel:
    """A point for each method that has a cost; only what is better than raw pixels may lie on the frontier."""
    chosen, able = recommend(comparison).chosen, useful(comparison)
    lines, places = {}, []
    for entry, cost in zip(comparison.entries, costs, strict=True):
        mean, half = (100 * each for each in entry.accuracy)
        x = math.nan if cost is None else cost
        lines[entry.title] = Line([x], [mean], DOTS | {"marker": OWN, "markersize": 8}, [mean - half], [mean + half])
        if cost is not None and entry in able:
            places.append((cost, mean))
    if chosen:
        ring = DOTS | {"markersize": 16, "color": "black", "fillstyle": "none"}
        lines["recommended"] = lines[chosen.title]._replace(look=ring, low=None)
    best = frontier(places)
    look = FRONTIER | {"drawstyle": "steps-post", "marker": "o", "markersize": 13, "fillstyle": "none"}
    lines["frontier"] = Line([cost for cost, _ in best], [quality for _, quality in best], look)
    axes = {"xscale": "log", "xlabel": label, "ylabel": "test accuracy, %", "xlim": _limits(costs)}
    return Panel(lines, axes, _references(comparison), ticks={"x": form})


def _fews(comparison: Comparison) -> list[list[Entry]]:
    """At most six methods each, the most accurate first, so that their lines can be told apart."""
    order = sorted(comparison.entries, key=lambda entry: -entry.accuracy.mean)
    return [order[at : at + LINES] for at in range(0, len(order), LINES)]


def _references(comparison: Comparison) -> dict[str, tuple[float, dict[str, str]]]:
    """Accuracies that need no training: the nearest neighbour's, and chance."""
    levels = {"nearest neighbour on pixels": (100 * comparison.nearest_neighbour.mean, {"linestyle": "-."})}
    ways = re.search(r"(\d+)-way", comparison.tasks)
    return levels | ({"chance": (100 / int(ways[1]), dict(DOTTED))} if ways else {})


def _curves(comparison: Comparison, few: Sequence[Entry]) -> Panel:
    lines = {}
    for entry in few:
        x = [point.seconds for point in entry.curve]
        mean, low, high = 100 * np.array([point[2:] for point in entry.curve]).reshape(-1, 3).T
        look = {"marker": OWN, "markersize": 5, "markevery": max(1, len(x) // 6)}
        lines[entry.title] = Line(x, mean, look, low, high)
    axes = {"xlabel": "seconds of meta-steps", "ylabel": "validation accuracy, %"}
    levels = {f"target, {_target(comparison)}": (100 * comparison.target, {}), **_references(comparison)}
    return Panel(lines, axes, levels)


def _memory(few: Sequence[Entry]) -> Panel:
    lines = {
        entry.title: Line(list(entry.memory_at), [max(each, 1) for each in entry.memory_at.values()], {"marker": OWN})
        for entry in few
    }
    limits = _limits([max(memory, 1) for entry in few for memory in entry.memory_at.values()])
    axes = {"yscale": "log", "ylim": limits, "xlabel": "inner steps", "ylabel": "peak memory of a meta-step"}
    axes["xticks"] = sorted({steps for entry in few for steps in entry.memory_at})
    return Panel(lines, axes, ticks={"y": size})


def _limits(values: Sequence[float | None]) -> tuple[float, float]:
    """Limits of a logarithmic axis, a factor of 4 or more apart, so that near values look near."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=1.0), max(known, default=1.0)
    middle, half = math.sqrt(low * high), math.sqrt(max(high / low, 3)) * 1.2
    return middle / half, middle * half


def _target(comparison: Comparison) -> str:
    return f"{100 * comparison.target:.2f} %"


def table(comparison: Comparison) -> Table:
    """The methods and what was measured of each, the best of a column marked."""
    entries = comparison.entries
    columns: dict[str, list[Cell]] = {}
    for name, column in COLUMNS.items():
        values = [column.value(entry) for entry in entries]
        known = [value for value in values if value is not None]
        if known:
            best = column.text(column.best(known)) if column.best and len(entries) > 1 else None
            texts = [column.none if value is None else column.text(value) for value in values]
            columns[name] = [Cell(text, text == best) for text in texts]
    names = [Cell(entry.title, link=_link(entry.paper)) for entry in entries]
    rows = [list(row) for row in zip(names, *columns.values(), strict=True)]
    return Table(["method", *columns], rows, "Bold: the best of a column.")


def _by_name(
    comparison: Comparison,
    title: str,
    cells: Callable[[Entry], Mapping[str, Cell | str]],
    caption: str = "",
    prose: bool = False,
) -> list[Part]:
    """A section with a table whose columns are what the methods have by name; none where no method has any."""
    found = {entry.title: cells(entry) for entry in comparison.entries}
    names = list(dict.fromkeys(name for mine in found.values() for name in mine))
    rows = [[method, *(mine.get(name, "–") for name in names)] for method, mine in found.items() if mine]
    return [Heading(title), Table(["method", *names], rows, caption, prose)] if rows else []


def _baselines(entry: Entry) -> dict[str, Cell | str]:
    """What stands beside the adapted model, on a method's own features and on pixels, where that was measured."""
    found: dict[str, Cell | str] = {name: percent(each.accuracy) for name, each in entry.baselines.items()}
    return found and {"adapted": percent(entry.accuracy), **found}


def _rates(entry: Entry) -> dict[str, Cell | str]:
    """The outer rates that were tried for a method, lowest first, and how each did in validation."""
    best = max((found for found in entry.rates.values() if found is not None), default=math.nan)
    return {
        f"rate {place}": Cell(f"{rate}: {'diverged' if found is None else f'{100 * found:.1f} %'}", found == best)
        for place, (rate, found) in enumerate(entry.rates.items(), 1)
    }


def _settings(entry: Entry) -> dict[str, Cell | str]:
    """Where a method comes from and the settings in which it differs from others."""
    paper = Cell(re.sub(rf"^{ARXIV}$", r"arXiv \g<0>", entry.paper), link=_link(entry.paper))
    return {"source": paper, **entry.differs}


def _link(paper: str) -> str | None:
    """Where to read a paper, if its text holds an arXiv number."""
    number = re.search(ARXIV, paper)
    return number and f"https://arxiv.org/abs/{number[0]}"
