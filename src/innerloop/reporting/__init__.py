"""The one room for tables, figures, pages, number formats, provenance, timers and files; it knows no learner.

Figures are in `innerloop.reporting.figures`, which loads matplotlib.
"""

from innerloop.reporting._files import plain, write, write_json
from innerloop.reporting._measure import Timing, in_fresh_process, in_turns, peak_memory, time_of
from innerloop.reporting._numbers import digits, duration, percent, points, size
from innerloop.reporting._pages import (
    Bars,
    Box,
    Cell,
    Code,
    Facts,
    Gallery,
    Heading,
    Part,
    Picture,
    Table,
    how_made,
    html,
    markdown,
    table,
)
from innerloop.reporting._provenance import made, provenance
from innerloop.reporting._verdict import paired, student, verdict, verdict_of

__all__ = [
    "Bars", "Box", "Cell", "Code", "Facts", "Gallery", "Heading", "Part", "Picture", "Table", "Timing", "digits",
    "duration", "how_made", "html", "in_fresh_process", "in_turns", "made", "markdown", "paired", "peak_memory",
    "percent", "plain", "points", "provenance", "size", "student", "table", "time_of", "verdict", "verdict_of", "write",
    "write_json",
]  # fmt: skip
