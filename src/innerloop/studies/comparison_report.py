"""The report of a comparison: JSON, a page in Markdown with pictures beside it, and one HTML file that holds all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

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
    Timing,
    digits,
    duration,
    how_made,
    html,
    markdown,
    percent,
    points,
    size,
    write_bytes,
    write_json,
    write_text,
)
from innerloop.reporting.figures import DOTS, DOTTED, FRONTIER, OWN, Line, Panel, frontier, panels, png
from innerloop.studies.comparison import RULE, Comparison, Entry, Point, recommend, useful
from innerloop.training.evaluation import Baseline, Estimate

RESULTS, PAGE, HTML = "comparison.json", "report.md", "report.html"
SUMMARY, LEARNING, MEMORY = "summary.png", "learning.png", "memory.png"
LINES = 6  # of a panel, at most
ARXIV = r"\d{4}\.\d{4,5}"

MEASURES = {
    "transductive": "Test accuracy, the mean over the seeds, with the queries of a task predicted together, so that "
    "batch norm takes its statistics from all of them; the 95 % interval is that of the test tasks of all seeds or, "
    "from three seeds on where it is wider, that of the seeds.",
    "inductive": "The same with each query predicted without the others.",
    "below the best": "What the best method's test accuracy is above this one's, in points: the mean difference "
    "over test tasks, for trainings with the same seed; its interval is found like that of the accuracy.",
    "to target": "Outer steps until validation accuracy, averaged over three validations, stays above the target for "
    "five more, times the seconds of a meta-step: validations take no time here.",
    "meta-step": "Time of the meta-gradient of one batch of tasks, the median of repetitions in a fresh process with "
    "nothing else of the comparison beside it. Drawing the tasks, clipping, the step of the outer optimiser and "
    "logging come on top in training, much the same for all methods; no number here holds them.",
    "memory": "Peak memory of one meta-step in a fresh process, above what model, tasks and libraries take: on a GPU "
    "what torch has allocated, otherwise what is resident.",
    "products": "Curvature products in the meta-gradient of one task: Hessian-vector products and their like. 0 where "
    "it is exact and the graphs of the inner steps are kept instead.",
    "adaptation": "Time of adapting to one task, with no meta-gradient, the median of repetitions in the same process.",
    "outer steps": "Steps of training that the budget allowed.",
    "each seed": "Test accuracy of each seed, %: how much the training itself varies.",
}

T = TypeVar("T")


def write_report(folder: Path, comparison: Comparison) -> None:
    """Write ``comparison.json``, ``report.html``, which needs no other file, ``report.md`` and its pictures."""
    write_json(folder / RESULTS, _plain(comparison))
    summary = Picture(
        SUMMARY,
        "Test accuracy against peak memory and against time, a point a method; the table has the numbers",
        "Test accuracy with its 95 % interval against what a method costs; methods that never stay above the target, "
        "unless those are most, are in the table alone.",
        png(summary_figure(comparison)),
    )
    learning = Picture(
        LEARNING,
        "Validation accuracy against outer steps and against seconds, a line a method",
        "Validation accuracy, the mean of the seeds, and the band from lowest to highest.",
        png(panels([_curves(comparison, few, by) for few in _fews(comparison) for by in ("step", "seconds")])),
    )
    pictures = [summary, learning]
    if any(entry.memory_at for entry in comparison.entries):
        alt = "Peak memory of a meta-step against the number of inner steps, a line a method"
        pictures.append(Picture(MEMORY, alt, "", png(panels([_memory(few) for few in _fews(comparison)]))))
    for each in pictures:
        write_bytes(folder / each.file, each.png)
    title, parts = f"Comparison: {comparison.tasks}", _parts(comparison, *pictures)
    write_text(folder / PAGE, markdown(title, parts))
    write_text(folder / HTML, html(title, parts))


def _parts(comparison: Comparison, summary: Picture, learning: Picture, *memory: Picture) -> list[Part]:
    found, shown = recommend(comparison), table(comparison)
    return [
        comparison.first_line,
        Box(found.first, found.rest),
        Gallery([summary]),
        f"The rule: {RULE}",
        Facts(_facts(comparison)),
        Heading("What was measured"),
        shown,
        *_baselines(comparison),
        *_rates(comparison),
        Heading("Learning"),
        Gallery([learning]),
        *(part for part in (Heading("Memory"), Gallery(memory)) if memory),
        Heading("Settings that differ"),
        _settings(comparison),
        Heading("How it was measured"),
        Facts({name: MEASURES[name] for name in shown.head if name in MEASURES}),
        *how_made(comparison.made),
    ]


def _facts(comparison: Comparison) -> dict[str, str]:
    return {
        "tasks": f"{comparison.tasks}; {comparison.test_tasks:,} test tasks a seed",
        "budget": f"{comparison.budget} for each of {len(comparison.entries)} methods",
        "target": f"{_target(comparison)} validation accuracy, {100 * comparison.share:g} % of the best of all methods",
        "nearest neighbour on raw pixels": percent(comparison.nearest_neighbour),
        **{f"{name} could not be trained": why for name, why in comparison.failed.items()},
        **({"notes": "; ".join(comparison.notes)} if comparison.notes else {}),
    }


def read(path: Path) -> Comparison:
    """The comparison of a ``comparison.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not what `write_report` writes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; innerloop compare writes it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Comparison(
            **values
            | {
                "nearest_neighbour": _floats(Estimate, values["nearest_neighbour"]),
                "entries": [_entry(each) for each in values["entries"]],
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no comparison ({error}); write it anew with innerloop compare") from error


def _plain(value: Any) -> Any:
    """Named tuples as objects, and NaN, which JSON has not, as null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _entry(values: dict[str, Any]) -> Entry:
    parts = dict.fromkeys(("transductive", "inductive", "behind"), Estimate)
    found = {name: values[name] and _floats(kind, values[name]) for name, kind in parts.items()}
    found |= {name: _floats(Timing, values[name]) for name in ("meta_step", "adaptation")}
    found["curve"] = [_floats(Point, point) for point in values["curve"]]
    found["memory_at"] = {int(steps): memory for steps, memory in values["memory_at"].items()}
    found["baselines"] = {
        name: Baseline(*(_floats(Estimate, each) for each in known.values()))
        for name, known in values.get("baselines", {}).items()
    }
    return Entry(**values | found)


def _floats(kind: Callable[..., T], values: dict[str, float | None]) -> T:
    return kind(**{name: math.nan if value is None else value for name, value in values.items()})


def summary_figure(comparison: Comparison) -> Figure:
    """Test accuracy against memory and against seconds to the target, the frontier and the recommendation marked.

    Where most methods never reach the target, the time of a meta-step stands in place of the seconds.
    """
    entries = comparison.entries
    memory = [float(max(entry.memory, 1)) for entry in entries]
    steps = [entry.meta_step.median for entry in entries]
    if 2 * sum(entry.reached is None for entry in entries) > len(entries):
        times, label = list[float | None](steps), "time of a meta-step"
    else:
        # nothing is reached before the end of the first step; and 0 has no place on this axis
        times = [
            e.reached if e.reached is None else max(e.reached, step) for e, step in zip(entries, steps, strict=True)
        ]
        label = f"meta-steps to {_target(comparison)} validation accuracy, time"
    return panels(
        [
            _costs(comparison, memory, "peak memory of a meta-step", size),
            _costs(comparison, times, label, duration),
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


def _curves(comparison: Comparison, few: Sequence[Entry], by: str) -> Panel:
    lines = {}
    for entry in few:
        x = [getattr(point, by) for point in entry.curve]
        mean, low, high = 100 * np.array([point[2:] for point in entry.curve]).reshape(-1, 3).T
        look = {"marker": OWN, "markersize": 5, "markevery": max(1, len(x) // 6)}
        lines[entry.title] = Line(x, mean, look, low, high)
    label = "outer step" if by == "step" else "seconds of meta-steps"
    axes = {"xlabel": label, "ylabel": "validation accuracy, %"}
    levels = {f"target, {_target(comparison)}": (100 * comparison.target, {}), **_references(comparison)}
    return Panel(lines, axes, levels)


def _memory(few: Sequence[Entry]) -> Panel:
    lines = {}
    for place, entry in enumerate(few):
        steps = sorted(entry.memory_at)
        # where lines coincide the lower ones look out from under the upper ones
        width = 4 - 2.6 * (place + 1) / len(few)
        look = {"marker": OWN, "linewidth": width, "markersize": 4 + width}
        lines[entry.title] = Line(steps, [max(entry.memory_at[each], 1) for each in steps], look)
    limits = _limits([max(memory, 1) for entry in few for memory in entry.memory_at.values()])
    axes: dict[str, Any] = {
        "yscale": "log",
        "ylim": limits,
        "xlabel": "inner steps",
        "ylabel": "peak memory of a meta-step",
    }
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

    def column(name: str, value: Callable[[Entry], float | None], text: Callable[[Entry], str], sign: int) -> None:
        """``sign`` -1 where less is better."""
        known = [(sign * found, text(entry)) for entry in entries if (found := value(entry)) is not None]
        best = max(known)[1] if known and len(entries) > 1 else None
        columns[name] = [Cell(each, each == best) for each in map(text, entries)]

    def cost(name: str, value: Callable[[Entry], float | None], form: Callable[[float], str], none: str = "") -> None:
        column(name, value, lambda entry: none if (found := value(entry)) is None else form(found), -1)

    for name in ("transductive", "inductive") if any(entry.transductive for entry in entries) else ("inductive",):
        column(name, partial(_mean, name), partial(_estimate, name), 1)
    if len(entries) > 1:
        columns["below the best"] = [Cell(points(each.behind) if each.behind.mean else "–") for each in entries]
    cost("to target", attrgetter("reached"), duration, "never")
    cost("meta-step", attrgetter("meta_step.median"), duration)
    cost("memory", attrgetter("memory"), size)
    cost("products", attrgetter("products"), digits)
    cost("adaptation", attrgetter("adaptation.median"), duration)
    columns["outer steps"] = [Cell(f"{entry.steps:,}") for entry in entries]
    if any(len(entry.seeds) > 1 for entry in entries):
        columns["each seed"] = [Cell(", ".join(f"{100 * each:.1f}" for each in entry.seeds)) for entry in entries]
    names = [Cell(entry.title, link=_link(entry.paper)) for entry in entries]
    rows = [list(row) for row in zip(names, *columns.values(), strict=True)]
    return Table(["method", *columns], rows, "Bold: the best of a column.")


def _baselines(comparison: Comparison) -> list[Part]:
    """What stands beside the adapted model, on each method's own features and on pixels, where that was measured."""
    names = list(dict.fromkeys(name for entry in comparison.entries for name in entry.baselines))
    rows = [
        [
            entry.title,
            percent(entry.accuracy),
            *(percent(found[name].accuracy) if name in found else "–" for name in names),
        ]
        for entry in comparison.entries
        for found in [entry.baselines]
    ]
    return [Heading("Without adaptation"), Table(["method", "adapted", *names], rows)] if names else []


def _rates(comparison: Comparison) -> list[Part]:
    """The outer rates that were tried for each method, lowest first, and how each did in validation."""
    rows: list[list[Cell | str]] = []
    for entry in (each for each in comparison.entries if each.rates):
        best = max((found for found in entry.rates.values() if found is not None), default=math.nan)
        cells = [
            Cell(f"{rate}: {'diverged' if found is None else f'{100 * found:.1f} %'}", found == best)
            for rate, found in entry.rates.items()
        ]
        rows.append([entry.title, *cells])
    head = ["method", *(f"rate {place}" for place in range(1, max(map(len, rows), default=1)))]
    return [Heading("Outer rates tried"), Table(head, rows, "Bold: the one trained with.")] if rows else []


def _mean(name: str, entry: Entry) -> float | None:
    estimate = getattr(entry, name)
    return estimate and float(estimate.mean)


def _estimate(name: str, entry: Entry) -> str:
    estimate = getattr(entry, name)
    return percent(estimate) if estimate else "–"


def _link(paper: str) -> str | None:
    """Where to read a paper, if its text holds an arXiv number."""
    number = re.search(ARXIV, paper)
    return number and f"https://arxiv.org/abs/{number[0]}"


def _settings(comparison: Comparison) -> Table:
    """Where methods come from and the settings in which they differ, a row a method."""
    names = list(dict.fromkeys(name for entry in comparison.entries for name in entry.differs))
    rows: list[list[Cell | str]] = [
        [
            entry.title,
            *(entry.differs.get(name, "–") for name in names),
            Cell(re.sub(rf"^{ARXIV}$", r"arXiv \g<0>", entry.paper), link=_link(entry.paper)),
        ]
        for entry in comparison.entries
    ]
    return Table(["method", *names, "source"], rows, "All other settings are the same.", prose=True)
