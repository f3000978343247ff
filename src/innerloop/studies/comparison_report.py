"""The report of a comparison: JSON, a page in Markdown with pictures beside it, and one HTML file that holds all."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from innerloop.studies.comparison import (
    RULE,
    Comparison,
    Entry,
    Point,
    Timing,
    digits,
    duration,
    percent,
    points,
    recommend,
    size,
)
from innerloop.training.evaluation import Baseline, Estimate
from innerloop.training.report import STYLE

RESULTS, PAGE, HTML = "comparison.json", "report.md", "report.html"
SUMMARY, LEARNING, MEMORY = "summary.png", "learning.png", "memory.png"
WIDTH, HEIGHT = 4.8, 3.8  # of a panel, in inches

INK = {False: "#1b1f24", True: "#e6e8eb"}
PAPER = {False: "#ffffff", True: "#15181c"}
QUIET = {False: "#6a6a6a", True: "#a0a6ad"}
GRID = {False: "#e6e6e6", True: "#30363d"}
# all of a contrast of 4.5 or more, since names are written in them
COLOURS = {
    False: ("#1f6fb4", "#b85c00", "#1e7d38", "#c62f25", "#7047a8", "#82601a", "#b0447a", "#0e757d"),
    True: ("#5aa9ec", "#f59a3e", "#5cc979", "#ff7a6e", "#b594e6", "#d3ab55", "#ec8fbe", "#4fc3cc"),
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")

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

ARXIV = r"\d{4}\.\d{4,5}"

T = TypeVar("T")
Array = NDArray[np.float64]


class Cell(NamedTuple):
    """Text of a table, whether it is the best of its column, and what it links to."""

    text: str
    best: bool = False
    link: str | None = None


class Table(NamedTuple):
    """Names of the columns, and rows whose first cell names the row."""

    head: list[str]
    rows: list[list[Cell]]


class Label(NamedTuple):
    """A name that belongs to a point of a panel, with the ends of the point's interval."""

    text: str
    x: float
    y: float
    low: float
    high: float
    bold: bool
    colour: str


class Picture(NamedTuple):
    """A panel: how to draw it, which returns labels yet to be placed; what it shows, in a line and in words."""

    draw: Callable[[Axes, Comparison, bool], list[Label]]
    caption: str
    alt: str


def write_report(folder: Path, comparison: Comparison) -> None:
    """Write ``comparison.json``, ``report.html``, which needs no other file, ``report.md`` and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(comparison), indent=2, allow_nan=False)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    sections = _sections(comparison)
    for name, pictures in sections.items():
        with _look(dark=False):
            _figure(comparison, pictures, dark=False).savefig(folder / name)
    (folder / PAGE).write_text(_markdown(comparison, sections), encoding="utf-8")
    (folder / HTML).write_text(_html(comparison, sections), encoding="utf-8")


def summary_figure(comparison: Comparison, dark: bool = False) -> Figure:
    """Test accuracy against memory and against seconds to the target, the frontier and the recommendation marked.

    Args:
        comparison: of one method or more.
        dark: for a dark page.
    """
    with _look(dark):
        return _figure(comparison, _summary(comparison), dark)


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
    transductive = values["transductive"]
    return Entry(
        **values
        | {
            "transductive": None if transductive is None else _floats(Estimate, transductive),
            "inductive": _floats(Estimate, values["inductive"]),
            "behind": _floats(Estimate, values["behind"]),
            "curve": [_floats(Point, point) for point in values["curve"]],
            "meta_step": _floats(Timing, values["meta_step"]),
            "memory_at": {int(steps): memory for steps, memory in values["memory_at"].items()},
            "adaptation": _floats(Timing, values["adaptation"]),
            "baselines": {
                name: Baseline(*(_floats(Estimate, each) for each in found.values()))
                for name, found in values.get("baselines", {}).items()
            },
        }
    )


def _floats(kind: Callable[..., T], values: dict[str, float | None]) -> T:
    return kind(**{name: math.nan if value is None else value for name, value in values.items()})


def _look(dark: bool) -> AbstractContextManager[None]:
    """Colours of a light or dark page; and SVG that is the same each time."""
    return mpl.rc_context(
        STYLE
        | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK[dark])
        | dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER[dark])
        | {"axes.edgecolor": QUIET[dark], "grid.color": GRID[dark], "svg.hashsalt": "innerloop"}
    )


def _sections(comparison: Comparison) -> dict[str, list[Picture]]:
    """The pictures by the file that holds them on the Markdown page."""
    sections = {SUMMARY: _summary(comparison), LEARNING: _learning(comparison)}
    if any(entry.memory_at for entry in comparison.entries):
        sections[MEMORY] = [_memory(comparison)]
    return sections


def _summary(comparison: Comparison) -> list[Picture]:
    def accuracies(other: Callable[[Entry], str]) -> str:
        return "; ".join(f"{entry.title} {percent(entry.accuracy)}, {other(entry)}" for entry in comparison.entries)

    return [
        Picture(
            _draw_memory_cost,
            "Test accuracy against the peak memory of a meta-step.",
            f"Test accuracy and peak memory of a meta-step. {accuracies(lambda entry: size(entry.memory))}.",
        ),
        Picture(
            _draw_step_cost,
            "Test accuracy against the time of a meta-step; most of these methods never stay above "
            f"{_target(comparison)} validation accuracy.",
            f"Test accuracy and time of a meta-step. {accuracies(lambda entry: duration(entry.meta_step.median))}.",
        )
        if 2 * sum(entry.reached is None for entry in comparison.entries) > len(comparison.entries)
        else Picture(
            _draw_time_cost,
            f"Test accuracy against the time until validation accuracy stays above {_target(comparison)}.",
            f"Test accuracy and seconds to {_target(comparison)} validation accuracy. {accuracies(_reached)}.",
        ),
    ]


def _learning(comparison: Comparison) -> list[Picture]:
    ends = "; ".join(
        f"{entry.title} ends at {100 * entry.curve[-1].accuracy:.2f} %" for entry in comparison.entries if entry.curve
    )
    return [
        Picture(
            partial(_draw_curves, by=by),
            f"Validation accuracy against {what}; mean of the seeds, and the band from lowest to highest.",
            f"Validation accuracy against {what}. {ends}.",
        )
        for by, what in (("step", "outer steps"), ("seconds", "seconds of meta-steps"))
    ]


def _memory(comparison: Comparison) -> Picture:
    values = (
        f"{entry.title} from {size(entry.memory_at[min(entry.memory_at)])} at {min(entry.memory_at)} to "
        f"{size(entry.memory_at[max(entry.memory_at)])} at {max(entry.memory_at)}"
        for entry in comparison.entries
        if entry.memory_at
    )
    return Picture(
        _draw_memory,
        "Peak memory of a meta-step against inner steps.",
        f"Peak memory of a meta-step against inner steps. {'; '.join(values)}.",
    )


def _figure(comparison: Comparison, pictures: Sequence[Picture], dark: bool) -> Figure:
    """Panels side by side with one legend below them."""
    width = WIDTH * len(pictures)
    figure = Figure(figsize=(width, HEIGHT), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(pictures), squeeze=False)[0]
    labels = [picture.draw(axes, comparison, dark) for axes, picture in zip(panels, pictures, strict=True)]
    handles = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(72 * width / (6 * max(map(len, handles)) + 36)))
    figure.set_figheight(HEIGHT + 0.19 * (len(handles) // columns))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9)
    figure.draw_without_rendering()  # the layout, which says how much place labels have
    for axes, each in zip(panels, labels, strict=True):
        _place(axes, each, dark)
    return figure


def _marks(comparison: Comparison, dark: bool) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Each method with its colour, line and marker, the same in all panels."""
    lines = itertools.product(("-", "-."), COLOURS[dark])
    looks = itertools.cycle(zip(lines, itertools.cycle(MARKERS), strict=False))
    for entry, ((line, colour), marker) in zip(comparison.entries, looks, strict=False):
        yield entry, {"color": colour, "linestyle": line, "marker": marker}


def _draw_memory_cost(axes: Axes, comparison: Comparison, dark: bool) -> list[Label]:
    costs = [float(max(entry.memory, 1)) for entry in comparison.entries]
    _cost_axis(axes, costs, _powers_of_two, size)
    axes.set_xlabel("peak memory of a meta-step")
    return _draw_costs(axes, comparison, dark, costs)


def _draw_step_cost(axes: Axes, comparison: Comparison, dark: bool) -> list[Label]:
    costs = [entry.meta_step.median for entry in comparison.entries]
    _cost_axis(axes, costs, _round_numbers, duration)
    axes.set_xlabel("time of a meta-step")
    return _draw_costs(axes, comparison, dark, costs)


def _cost_axis(
    axes: Axes,
    costs: list[float],
    ticks_of: Callable[[float, float], list[float]],
    text: Callable[[float], str],
) -> None:
    axes.set_xscale("log")
    low, high = _limits(costs)
    ticks = ticks_of(low, high)
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [text(tick) for tick in ticks])


def _draw_time_cost(axes: Axes, comparison: Comparison, dark: bool) -> list[Label]:
    """Methods that never reach the target, not all of them, stand in a column of their own at the right."""
    # nothing is reached before the end of the first step; and 0 has no place on this axis
    times = [
        None if entry.reached is None else max(entry.reached, entry.meta_step.median) for entry in comparison.entries
    ]
    reached = [time for time in times if time is not None]
    low, edge = _limits(reached)
    never = edge * (edge / low) ** 0.14
    high = edge * (edge / low) ** 0.28 if len(reached) < len(times) else edge
    ticks = _round_numbers(low, edge)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    if high > edge:
        axes.axvspan(edge, high, color=GRID[dark], alpha=0.5, linewidth=0)
        ticks.append(never)
    axes.set_xticks(ticks, ["never" if tick == never else digits(tick) for tick in ticks])
    axes.set_xlabel(f"seconds of meta-steps to {_target(comparison)} validation accuracy")
    return _draw_costs(axes, comparison, dark, times, never)


def _draw_costs(
    axes: Axes, comparison: Comparison, dark: bool, costs: Sequence[float | None], never: float = math.nan
) -> list[Label]:
    """A point a method; one without a cost stands at ``never``, and not on the frontier."""
    chosen = recommend(comparison).chosen
    labels = []
    for (entry, mark), cost in zip(_marks(comparison, dark), costs, strict=True):
        x, mean, half = cost or never, 100 * entry.accuracy.mean, 100 * entry.accuracy.interval
        axes.plot(x, mean, **mark | {"linestyle": ""}, markersize=8)
        # in front, since many an interval is shorter than its marker
        axes.errorbar(x, mean, half, fmt="none", ecolor=INK[dark], elinewidth=1, capsize=3, capthick=1, zorder=3)
        half = 0.0 if math.isnan(half) else half
        labels.append(Label(entry.title, x, mean, mean - half, mean + half, entry is chosen, mark["color"]))
        if entry is chosen:
            axes.plot(x, mean, "o", markersize=16, color=INK[dark], fillstyle="none", label="recommended")
    best = frontier([(label.x, label.y) for label, cost in zip(labels, costs, strict=True) if cost is not None])
    stairs = [point for left, right in itertools.pairwise(best) for point in (left, (right[0], left[1]))] + best[-1:]
    line = axes.plot(*np.reshape(stairs, (-1, 2)).T, color=QUIET[dark], zorder=1, label="frontier")[0]
    line.set(marker="o", markersize=13, fillstyle="none", markevery=2)  # rings round the points, not at the corners
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.15)
    axes.set_ylabel("test accuracy, %; bars: 95 % intervals")
    return labels


def _draw_curves(axes: Axes, comparison: Comparison, dark: bool, by: str) -> list[Label]:
    for entry, mark in _marks(comparison, dark):
        x = np.array([getattr(point, by) for point in entry.curve])
        mean, low, high = 100 * np.array([point[2:] for point in entry.curve]).reshape(-1, 3).T
        every = max(1, len(x) // 6)
        axes.plot(x, mean, markersize=5, linewidth=1.6, markevery=every, label=entry.title, **mark)
        axes.fill_between(x, low, high, color=mark["color"], alpha=0.15, linewidth=0)
    axes.axhline(100 * comparison.target, color=QUIET[dark], linestyle="--", label=f"target, {_target(comparison)}")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("outer step" if by == "step" else "seconds of meta-steps")
    axes.set_ylabel("validation accuracy, %")
    return []


def _draw_memory(axes: Axes, comparison: Comparison, dark: bool) -> list[Label]:
    shown = [(entry, mark) for entry, mark in _marks(comparison, dark) if entry.memory_at]
    for index, (entry, mark) in enumerate(shown):
        steps, memory = zip(*sorted(entry.memory_at.items()), strict=True)
        # where lines coincide the lower ones look out from under the upper ones
        width = 1.4 + 2.4 * (1 - (index + 1) / len(shown))
        axes.plot(steps, memory, markersize=4 + width, linewidth=width, label=entry.title, **mark)
    axes.set_yscale("log")
    low, high = _limits([max(memory, 1) for entry, _ in shown for memory in entry.memory_at.values()])
    ticks = _powers_of_two(low, high)
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [size(tick) for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("inner steps")
    axes.set_ylabel("peak memory of a meta-step")
    return []


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, accuracy) those than which no other is both as cheap and as accurate, from the cheapest on."""
    found: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((cost, accuracy))
    return found


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis, a factor of 4 or more apart, so that near values look near."""
    low, high = min(values), max(values)
    middle, half = math.sqrt(low * high), math.sqrt(max(high / low, 3)) * 1.2
    return middle / half, middle * half


def _powers_of_two(low: float, high: float) -> list[float]:
    """With 1.5 times them where that is not too many; of very many only some."""
    exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    for factors in ((1, 1.5), (1,)):
        ticks = [factor * 2.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 5:
            break
    return ticks[:: 1 + len(ticks) // 6]


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; of many only the powers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    return ticks


def _place(axes: Axes, labels: Sequence[Label], dark: bool) -> None:
    """Write each label beside its point, where it covers least of the others, of the points and of their intervals.

    Every label in turn takes the best of a ring of places around its point, given where the others are; a few rounds
    of this settle. A label that ends up far away is tied to its point by a line.
    """
    if not labels:
        return
    points = 72 / axes.figure.dpi  # of a pixel
    frame = np.array(axes.get_window_extent().extents) * points
    halo = [withStroke(linewidth=2.5, foreground=PAPER[dark])]
    texts, middles, sizes, radii, marks = [], [], [], [], []
    for label in labels:
        weight = "bold" if label.bold else "normal"
        text = axes.annotate(label.text, (label.x, label.y), (0, 0), textcoords="offset points", fontsize=9)
        text.set(ha="center", va="center", color=label.colour, weight=weight, path_effects=halo, in_layout=False)
        texts.append(text)
        box = text.get_window_extent()
        sizes.append(np.array([box.width, box.height]) * points)
        (x, y), (_, low), (_, high) = (
            axes.transData.transform((label.x, end)) * points for end in (label.y, label.low, label.high)
        )
        middles.append(np.array([x, y]))
        radius = 8 if label.bold else 5
        radii.append(radius)
        marks += [(x - radius, y - radius, x + radius, y + radius), (x - 1.5, low, x + 1.5, high)]

    for line in axes.lines:
        if line.get_linestyle() == "-":
            ends = axes.transData.transform(line.get_xydata()) * points
            marks += [(*np.minimum(a, b) - 1.5, *np.maximum(a, b) + 1.5) for a, b in itertools.pairwise(ends)]

    angles = np.arange(16) * math.tau / 16
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    distances = np.array([7, 12, 20, 30, 44, 60])
    offsets = [(ring * (distances[:, None, None] + extent / 2)).reshape(-1, 2) for extent in sizes]
    boxes = np.full((len(labels), 4), math.inf)
    chosen = [np.zeros(2)] * len(labels)
    for _, index in itertools.product(range(4), range(len(labels))):
        centre, half = middles[index] + offsets[index], sizes[index] / 2
        places = np.concatenate([centre - half, centre + half], 1)
        others = np.delete(boxes, index, 0)
        outside = np.maximum(frame[:2] - places[:, :2], 0).sum(1) + np.maximum(places[:, 2:] - frame[2:], 0).sum(1)
        cost = 4 * _overlap(places, others) + _overlap(places, np.array(marks)) + 200 * outside
        best = int(np.argmin(cost + np.repeat(distances, len(ring))))
        boxes[index], chosen[index] = places[best], offsets[index][best]
    for label, text, offset, extent, radius in zip(labels, texts, chosen, sizes, radii, strict=True):
        text.set_position((float(offset[0]), float(offset[1])))
        gap = np.maximum(np.abs(offset) - extent / 2, 0)
        if np.hypot(*gap) > radius + 6:
            end = np.clip(0, offset - extent / 2, offset + extent / 2)
            style = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": radius}
            tie = axes.annotate("", (label.x, label.y), tuple(end), textcoords="offset points", arrowprops=style)
            tie.set_in_layout(False)


def _overlap(places: Array, obstacles: Array) -> Array:
    """Area that obstacles ``[m, 4]`` take from each place ``[n, 4]``, both left, bottom, right, top."""
    low = np.maximum(places[:, None, :2], obstacles[None, :, :2])
    high = np.minimum(places[:, None, 2:], obstacles[None, :, 2:])
    return np.maximum(high - low, 0).prod(-1).sum(-1)


def _target(comparison: Comparison) -> str:
    return f"{100 * comparison.target:.2f} %"


def _reached(entry: Entry) -> str:
    return "never" if entry.reached is None else duration(entry.reached)


def table(comparison: Comparison) -> Table:
    """The methods and what was measured of each, the best of a column marked."""
    entries = comparison.entries
    columns: dict[str, list[Cell]] = {}

    def column(name: str, values: Sequence[float | None], texts: Sequence[str], sign: int = 1) -> None:
        """``sign`` -1 where less is better."""
        known = [(sign * value, text) for value, text in zip(values, texts, strict=True) if value is not None]
        best = max(known)[1] if known and len(entries) > 1 else None
        columns[name] = [Cell(text, text == best) for text in texts]

    if any(entry.transductive for entry in entries):
        found = [entry.transductive for entry in entries]
        column(
            "transductive", [each and each.mean for each in found], [percent(each) if each else "–" for each in found]
        )
    column("inductive", [entry.inductive.mean for entry in entries], [percent(entry.inductive) for entry in entries])
    if len(entries) > 1:
        shown = [points(entry.behind) if entry.behind.mean else "–" for entry in entries]
        columns["below the best"] = [Cell(text) for text in shown]
    column("to target", [entry.reached for entry in entries], [_reached(entry) for entry in entries], -1)
    timings = {
        "meta-step": [entry.meta_step.median for entry in entries],
        "adaptation": [entry.adaptation.median for entry in entries],
    }
    column("meta-step", timings["meta-step"], list(map(duration, timings["meta-step"])), -1)
    column("memory", [entry.memory for entry in entries], [size(entry.memory) for entry in entries], -1)
    column("products", [entry.products for entry in entries], [digits(entry.products) for entry in entries], -1)
    column("adaptation", timings["adaptation"], list(map(duration, timings["adaptation"])), -1)
    columns["outer steps"] = [Cell(f"{entry.steps:,}") for entry in entries]
    if any(len(entry.seeds) > 1 for entry in entries):
        columns["each seed"] = [Cell(", ".join(f"{100 * each:.1f}" for each in entry.seeds)) for entry in entries]
    names = [Cell(entry.title, link=_link(entry.paper)) for entry in entries]
    return Table(["method", *columns], [list(row) for row in zip(names, *columns.values(), strict=True)])


def _link(paper: str) -> str | None:
    """Where to read a paper, if its text holds an arXiv number."""
    number = re.search(ARXIV, paper)
    return number and f"https://arxiv.org/abs/{number[0]}"


def _settings(comparison: Comparison) -> Table:
    """Where methods come from and the settings in which they differ, a row a method."""
    names = list(dict.fromkeys(name for entry in comparison.entries for name in entry.differs))
    rows = [
        [
            Cell(entry.title),
            *(Cell(entry.differs.get(name, "–")) for name in names),
            Cell(re.sub(rf"^{ARXIV}$", r"arXiv \g<0>", entry.paper), link=_link(entry.paper)),
        ]
        for entry in comparison.entries
    ]
    return Table(["method", *names, "source"], rows)


def _made(comparison: Comparison) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {each}" for name, each in value.items() if each is not None)
        return str(value)

    return {name: text(value) for name, value in comparison.made.items() if value is not None}


def _measures(comparison: Comparison) -> dict[str, str]:
    return {name: MEASURES[name] for name in table(comparison).head if name in MEASURES}


def _facts(comparison: Comparison) -> str:
    return (
        f"{len(comparison.entries)} {'method' if len(comparison.entries) == 1 else 'methods'} on {comparison.tasks}, "
        f"{comparison.budget} each, tested on {comparison.test_tasks:,} tasks a seed. The target is "
        f"{_target(comparison)} validation accuracy, {100 * comparison.share:g} % of the best of all methods. Without "
        f"any learning, the nearest neighbour on raw pixels has {percent(comparison.nearest_neighbour)}."
        + "".join(f" {name} could not be trained: {why.rstrip('.')}." for name, why in comparison.failed.items())
        + "".join(f" {note.rstrip('.')}." for note in comparison.notes)
    )


def _recommendation(comparison: Comparison) -> tuple[str, str]:
    """Its first sentence and the others."""
    found = recommend(comparison)
    first = f"Recommended: {found.chosen.title}."
    return first, found.text.removeprefix(first).lstrip()


def _markdown(comparison: Comparison, sections: dict[str, list[Picture]]) -> str:
    shown = {
        name: f"![{' '.join(picture.alt for picture in pictures)}]({name})\n\n"
        + " ".join(picture.caption for picture in pictures)
        for name, pictures in sections.items()
    }
    chosen, reasons = _recommendation(comparison)
    parts = [
        f"# Comparison: {comparison.tasks}",
        _facts(comparison),
        f"**{chosen}** {reasons}",
        shown[SUMMARY],
        f"The rule: {RULE}",
        f"## What was measured\n\n{_markdown_table(table(comparison))}\n\nBold: the best of a column.",
        f"## Learning\n\n{shown[LEARNING]}",
        f"## Memory\n\n{shown[MEMORY]}" if MEMORY in shown else "",
        f"## Settings that differ\n\n{_markdown_table(_settings(comparison))}\n\nAll other settings are the same.",
        "## How it was measured\n\n" + "\n".join(f"* {name}: {text}" for name, text in _measures(comparison).items()),
        "## How it was made\n\n" + "\n".join(f"* {name}: {text}" for name, text in _made(comparison).items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_table(table: Table) -> str:
    def text(cell: Cell) -> str:
        escaped = cell.text.replace("|", r"\|")
        return f"**{escaped}**" if cell.best else f"[{escaped}]({cell.link})" if cell.link else escaped

    rows = [table.head, ["---"] * len(table.head), *(list(map(text, row)) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


STYLESHEET = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59626b; --paper: #ffffff; --line: #d5dae0;
  --tint: #f3f6f9; --accent: #0b5cad; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --quiet: #a5adb6; --paper: #15181c; --line: #363d45; --tint: #1f242a; --accent: #7cb8ff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
p, dl { max-width: 52rem; }
a { color: var(--accent); }
.choice { background: var(--tint); border-left: .3rem solid var(--accent); border-radius: .25rem;
  padding: .8rem 1rem; font-size: 1.06rem; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; max-width: 42rem; }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .4rem .65rem; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal;
  white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 600; }
.text td { text-align: left; white-space: normal; }
.text thead th { text-align: left; }
td b { background: var(--tint); border-radius: .2rem; padding: .05rem .3rem; margin: 0 -.3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 40rem) {
  th:first-child { max-width: 9rem; white-space: normal; }
  dl { display: block; }
  dt { margin-top: .5rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  html { font-size: 11px; }
  figure, tr, .choice { break-inside: avoid; }
  .scroll { overflow: visible; }
  .panels { grid-template-columns: 1fr 1fr; }
  table { font-size: 8px; }
  th, td { padding: .2rem .3rem; white-space: normal; }
}
"""

DOCUMENT = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p>$facts</p>
<p class="choice"><strong>$chosen</strong> $reasons</p>
$summary
<p class="quiet">The rule: $rule</p>
<h2>What was measured</h2>
$table
<h2>Learning</h2>
$learning
$memory
<h2>Settings that differ</h2>
$settings
<h2>How it was measured</h2>
$measures
<h2>How it was made</h2>
$made
</main>
</body>
</html>
""")


def _html(comparison: Comparison, sections: dict[str, list[Picture]]) -> str:
    panels = {
        name: f'<div class="panels">\n{"".join(_html_panel(comparison, picture) for picture in pictures)}</div>'
        for name, pictures in sections.items()
    }
    chosen, reasons = _recommendation(comparison)
    return DOCUMENT.substitute(
        title=_escape(f"Comparison: {comparison.tasks}"),
        style=STYLESHEET,
        facts=_escape(_facts(comparison)),
        chosen=_escape(chosen),
        reasons=_escape(reasons),
        summary=panels[SUMMARY],
        rule=_escape(RULE),
        table=_html_table(table(comparison), "Bold: the best of a column.", "numbers"),
        learning=panels[LEARNING],
        memory=f"<h2>Memory</h2>\n{panels[MEMORY]}" if MEMORY in panels else "",
        settings=_html_table(_settings(comparison), "All other settings are the same.", "text"),
        measures=_html_list(_measures(comparison)),
        made=_html_list(_made(comparison)),
    )


def _escape(text: str) -> str:
    """Text for HTML, in which numbers stay with their units."""
    return re.sub(r"(?<=\d) (?=[±%]|m?s\b|[KMG]iB)|(?<=±) ", "&nbsp;", escape(text))


def _html_panel(comparison: Comparison, picture: Picture) -> str:
    """A figure of its own, as SVG for light and for dark pages; paper is always light."""
    light, dark = (_data(comparison, picture, shade) for shade in (False, True))
    return (
        f'<figure>\n<picture>\n<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'<img src="{light}" width="{72 * WIDTH:.0f}" height="{72 * HEIGHT:.0f}" alt="{_escape(picture.alt)}">\n'
        f"</picture>\n<figcaption>{_escape(picture.caption)}</figcaption>\n</figure>\n"
    )


def _data(comparison: Comparison, picture: Picture, dark: bool) -> str:
    content = io.BytesIO()
    with _look(dark):
        _figure(comparison, [picture], dark).savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def _html_table(table: Table, caption: str, kind: str) -> str:
    def text(cell: Cell) -> str:
        content = _escape(cell.text)
        return f"<b>{content}</b>" if cell.best else f'<a href="{cell.link}">{content}</a>' if cell.link else content

    head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in table.head)
    rows = (
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>\n'
        for name, *cells in table.rows
    )
    # whoever has no mouse must be able to scroll too
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table">\n<table class="{kind}">\n'
        f"<caption>{_escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n"
        "</table>\n</div>"
    )


def _html_list(items: dict[str, str]) -> str:
    return (
        "<dl>\n"
        + "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>\n" for name, text in items.items())
        + "</dl>"
    )
