"""A page is a title and a list of parts; the same parts make Markdown and one HTML file that needs no other.

A part is text (a paragraph), a `Heading`, `Box`, `Table`, `Bars`, `Facts`, `Code` or `Gallery`. Text is plain: HTML
escapes it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup, escape


class Heading(NamedTuple):
    """Begins a section."""

    text: str


class Box(NamedTuple):
    """What a reader must not miss: a first sentence in bold, and what follows from it."""

    first: str
    rest: str = ""


class Cell(NamedTuple):
    """Text of a table, whether it stands out (the best of its column), and what it links to."""

    text: str
    best: bool = False
    link: str | None = None


class Table(NamedTuple):
    """Names of the columns, and rows whose first cell names the row.

    Attributes:
        head: a name a column.
        rows: as many cells each; a string is a `Cell` that does not stand out.
        caption: a sentence below it.
        prose: cells are words, not numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    prose: bool = False


class Facts(NamedTuple):
    """Names and what is to be said of each."""

    items: Mapping[str, Any]


class Bars(NamedTuple):
    """Shares in [0, 1], each with its name and a bar as long."""

    shares: Mapping[str, float]


class Code(NamedTuple):
    """Text to be shown as it is."""

    text: str


class Picture(NamedTuple):
    """A PNG.

    Attributes:
        file: its name beside a Markdown page.
        alt: what it shows, for those who do not see it.
        caption: a line below it.
        png: its content, which an HTML page holds itself.
        frame: ``"right"`` (green), ``"wrong"`` (red) or nothing.
    """

    file: str
    alt: str
    caption: str = ""
    png: bytes = b""
    frame: str = ""

    @property
    def source(self) -> str:
        """The picture itself as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Gallery(NamedTuple):
    """Pictures side by side; small ones are thumbnails, in as many columns as there is room for."""

    pictures: Sequence[Picture]
    small: bool = False


Part = str | Heading | Box | Table | Bars | Facts | Code | Gallery


def html(title: str, parts: Sequence[Part]) -> str:
    """A page as one HTML file: pictures inside, no scripts, light or dark as the reader has it."""
    named = [(type(part).__name__, part) for part in parts]
    return _template().render(title=title, parts=named, cell=_cell)


def markdown(title: str, parts: Sequence[Part]) -> str:
    """A page in Markdown, whose pictures are files beside it."""
    return "\n\n".join([f"# {title}", *map(_markdown, parts)]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *([_marked(_cell(each)) for each in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def how_made(provenance: Mapping[str, Any]) -> list[Part]:
    """The last section of a page: what it was made with."""
    items = {
        name: ", ".join(f"{key} {each}" for key, each in value.items() if each is not None)
        if isinstance(value, dict)
        else value
        for name, value in provenance.items()
        if value is not None
    }
    return [Heading("How it was made"), Facts(items)]


def _markdown(part: Part) -> str:
    match part:
        case Heading():
            return f"## {part.text}"
        case Box():
            return f"**{part.first}** {part.rest}".rstrip()
        case Table():
            return table(part.head, part.rows) + (f"\n\n{part.caption}" if part.caption else "")
        case Bars():
            return table(["", "%"], [[name, f"{100 * share:.1f}"] for name, share in part.shares.items()])
        case Facts():
            return "\n".join(f"* {name}: {text}" for name, text in part.items.items())
        case Code():
            return f"```\n{part.text}\n```"
        case Gallery():
            return "\n\n".join(f"![{each.alt}]({each.file})\n\n{each.caption}".rstrip() for each in part.pictures)
    return part


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _marked(cell: Cell) -> str:
    text = cell.text.replace("|", r"\|")
    return f"**{text}**" if cell.best else f"[{text}]({cell.link})" if cell.link else text


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("innerloop.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["units"] = _units
    return environment.get_template("page.html")


def _units(text: Any) -> Markup:
    """Escaped text in which numbers stay with their units."""
    return Markup(re.sub(r"(?<=\d) (?=[±%]|m?s\b|[KMG]iB)|(?<=±) ", "&nbsp;", str(escape(text))))
