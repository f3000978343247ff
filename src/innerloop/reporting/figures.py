"""Figures: panels of lines and points that look the same everywhere."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from innerloop.reporting._files import write

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#d9720a", "#2a9d4a", "#d43a2f", "#808080"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#7d55b0", GREY, "#a0792c", "#c2588f")
MARKERS, OWN = "os^DvPX<>ph*", "own"  # the marker of a name, as its colour
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
DASHED, DOTTED = {"linestyle": "--"}, {"linestyle": ":"}
MARKED: dict[str, Any] = {"marker": "o"}
DOTS = MARKED | {"linestyle": ""}
FRONTIER = {"color": GREY, "zorder": 1}


class Line(NamedTuple):
    """A line of a panel, or points.

    Attributes:
        x: ``[n]``.
        y: ``[n]``, NaN where there is none.
        look: as `Axes.plot` takes it; colour, and the marker `OWN`, go by the name's place in the figure.
        low: lower end of an interval, ``[n]``; drawn as a band about a line and as bars about points.
        high: its upper end.
    """

    x: ArrayLike
    y: ArrayLike
    look: Mapping[str, Any] = {}
    low: ArrayLike | None = None
    high: ArrayLike | None = None


class Panel(NamedTuple):
    """What one pair of axes shows.

    Attributes:
        lines: by name; ``_name`` looks like ``name`` and is not in the legend.
        axes: as `Axes.set` takes it: labels, scales, limits, ticks, title.
        levels: horizontal lines, by name, with their looks.
        notes: text beside a point, as (x, y, text).
        ticks: of logarithmic axes, how their numbers are written, by ``"x"`` or ``"y"``.
    """

    lines: Mapping[str, Line]
    axes: Mapping[str, Any] = {}
    levels: Mapping[str, tuple[float, Mapping[str, Any]]] = {}
    notes: Sequence[tuple[float, float, str]] = ()
    ticks: Mapping[str, Callable[[float], str]] = {}


def panels(shown: Sequence[Panel], columns: int = 2, width: float = 4.6, height: float = 3.5) -> Figure:
    """Panels in rows, with one legend above them.

    A name has the same colour and marker in all panels.

    Args:
        shown: one panel or more.
        columns: panels side by side, at most.
        width: of a panel, in inches.
        height: of a panel, in inches.
    """
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    names = list(dict.fromkeys(name.lstrip("_") for panel in shown for name in panel.lines))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, shown, strict=False):
            _draw(axes, panel, names)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        handles = {
            name: handle for axes in grid for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            beside = max(1, int(72 * width * columns / (6 * max(map(len, handles)) + 36)))
            figure.set_figheight(height * rows + 0.2 * -(-len(handles) // beside))
            figure.legend(handles.values(), handles, loc="outside upper center", ncols=beside, fontsize=9)
    return figure


def _draw(axes: Axes, panel: Panel, names: list[str]) -> None:
    for name, line in panel.lines.items():
        place = names.index(name.lstrip("_"))
        look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "markersize": 4, "label": name, **line.look}
        if look.get("marker") == OWN:
            look["marker"] = MARKERS[place % len(MARKERS)]
        x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
        axes.plot(x, y, **look)
        if line.low is None or line.high is None:
            continue
        low, high = (np.asarray(end, dtype=float) for end in (line.low, line.high))
        if look.get("linestyle") == "":
            spread = np.nan_to_num([y - low, high - y])
            # in front, since many an interval is shorter than its marker
            axes.errorbar(x, y, spread, fmt="none", zorder=3, ecolor=look["color"], elinewidth=1.2, capsize=3)
        else:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    for name, (value, own) in panel.levels.items():
        level: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "label": name, **own}
        axes.axhline(value, **level)
    for left, bottom, text in panel.notes:
        axes.annotate(text, (left, bottom), (3, 6), textcoords="offset points", fontsize=8, rotation=45)
    axes.set(**panel.axes)
    for which, form in panel.ticks.items():
        limits = low, high = getattr(axes, f"get_{which}lim")()
        marks = nice_numbers(low, high, 2 if form(2**20).endswith("iB") else 10)
        getattr(axes, f"{which}axis").set_minor_locator(NullLocator())
        axes.set(**{f"{which}ticks": marks, f"{which}ticklabels": [form(mark) for mark in marks]})
        axes.set(**{f"{which}lim": limits})


def nice_numbers(low: float, high: float, base: int) -> list[float]:
    """Five numbers or so for a logarithmic axis: powers of the base, with some between them where there is room."""
    exponents = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    found: list[float] = []
    for factors in ((1, 1.5), (1,)) if base == 2 else ((1, 2, 5), (1,)):
        found = [factor * float(base) ** exponent for exponent in exponents for factor in factors]
        found = [mark for mark in found if low <= mark <= high]
        if len(found) <= 6:
            break
    return found[:: 1 + len(found) // 7]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, quality) those than which no other is both as cheap and as good, from the cheapest on."""
    found: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or quality > found[-1][1]:
            found.append((cost, quality))
    return found


def confusion(names: Sequence[str], counts: ArrayLike) -> Figure:
    """Which class was taken for which.

    Args:
        names: of the classes.
        counts: ``[classes, classes]``; row: the class, column: what was predicted.
    """
    values = np.asarray(counts, dtype=float)
    shares = values / np.maximum(values.sum(1, keepdims=True), 1)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        few = len(names) <= 20
        side = 1.8 + (0.34 if few else 0.16) * len(names)
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(values > 0) if few else ():
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{values[row, column]:g}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=9 if few else 7)
        axes.set_yticks(range(len(names)), names, fontsize=9 if few else 7)
        axes.set(xlabel="predicted", ylabel="class")
        figure.colorbar(image, label="of the class, %")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a file's content."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for each
        figure.savefig(content, format="png", dpi=STYLE["savefig.dpi"])
    return content.getvalue()


def save(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    write(path, png(figure))
