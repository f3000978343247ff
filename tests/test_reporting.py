"""The reporting room: files that are whole, and pages."""

from __future__ import annotations

import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from innerloop import reporting
from innerloop.errors import Failed
from innerloop.reporting import Bars, Box, Cell, Code, Facts, Gallery, Heading, Picture, Table, figures

PAGE: list[reporting.Part] = [
    Box("Recommended: A & B.", "It has 51.2 ± 0.3 %."),
    Heading("Numbers"),
    Table(["method", "ms"], [["a|b", Cell("1.5 ms", best=True)], [Cell("c", link="https://x.org/?a=1&b=2"), "<2>"]]),
    Facts({"items": "one", "seed": 3}),
    Code("x < y"),
    Gallery([Picture("cat.png", "a cat", "taken for a dog", b"png", "wrong")]),
    "<script>alert(1)</script>",
]


def test_a_file_is_replaced_whole_and_reaches_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, steps = tmp_path / "made" / "x.json", []
    sync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        steps.append("fsync")
        sync(number)

    def replaced(one: Path, other: Path) -> Path:
        steps.append("replace")
        return replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    reporting.write_json(file, {"a": [1, 2.5, None]})
    assert json.loads(file.read_text("utf-8")) == {"a": [1, 2.5, None]}
    assert steps == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert os.listdir(file.parent) == ["x.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.txt"
    reporting.write(file, "old ±")

    def full(number: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        reporting.write(file, "new")
    with pytest.raises(TypeError):
        reporting.write_json(file, object())
    assert file.read_text("utf-8") == "old ±"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_html_escapes_and_holds_its_pictures() -> None:
    page = reporting.html("1 < 2", PAGE)
    assert "<h1>1 &lt; 2</h1>" in page
    assert "Recommended: A &amp; B." in page
    assert "51.2&nbsp;±&nbsp;0.3&nbsp;%" in page
    assert "<script" not in page
    assert '<img class="wrong" src="data:image/png;base64,cG5n" alt="a cat">' in page
    assert '<th scope="row">a|b</th>' in page
    assert "<td><b>1.5&nbsp;ms</b></td>" in page
    assert 'href="https://x.org/?a=1&amp;b=2"' in page
    assert "<dt>items</dt><dd>one</dd>" in page


def test_bars_are_as_long_as_their_shares() -> None:
    bars = Bars({"a & b": 0.5, "c": 1.0})
    page = reporting.html("T", [bars])
    assert page.count('<i style="width: 40.0%"></i> 50.0&nbsp;%') == 1
    assert page.count('<i style="width: 80.0%"></i> 100.0&nbsp;%') == 1
    assert "a &amp; b" in page
    assert reporting.markdown("T", [bars]).splitlines()[2:] == [
        "|  | % |",
        "| --- | --- |",
        "| a & b | 50.0 |",
        "| c | 100.0 |",
    ]


def test_markdown_has_the_same_parts() -> None:
    assert reporting.markdown("T", PAGE[:6]).split("\n\n") == [
        "# T",
        "**Recommended: A & B.** It has 51.2 ± 0.3 %.",
        "## Numbers",
        "| method | ms |\n| --- | --- |\n| a\\|b | **1.5 ms** |\n| [c](https://x.org/?a=1&b=2) | <2> |",
        "* items: one\n* seed: 3",
        "```\nx < y\n```",
        "![a cat](cat.png)",
        "taken for a dog\n",
    ]


def test_numbers_as_text() -> None:
    mib = 2**20
    assert reporting.percent((0.52314, 0.00601)) == "52.31 ± 0.60 %"
    assert reporting.percent((0.5, math.nan)) == "50.00 %"
    assert reporting.percent([0.012, 0.003], "+", "") == "+1.20 ± 0.30"
    assert reporting.points((0.0231, 0.004)) == "2.31 ± 0.40 points"
    sizes = [reporting.size(count) for count in (512, 40.25 * mib, 1023 * mib, 1.25 * 2**30)]
    assert sizes == ["0.5 KiB", "40.2 MiB", "1,023 MiB", "1.25 GiB"]
    times = [reporting.duration(seconds) for seconds in (0.0001234, 0.0123, 1.0, 35.24, 1234.0)]
    assert times == ["0.123 ms", "12.3 ms", "1 s", "35.2 s", "1,234 s"]


# ---------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("mean", "half", "margin", "word"),
    [
        (0.0, 0.9, 1.0, "shown"),  # as good, within the margin
        (-0.5, 0.4, 1.0, "shown"),
        (-0.5, 0.6, 1.0, "open"),
        (-2.0, 0.9, 1.0, "contradicted"),
        (-2.0, 1.1, 1.0, "open"),
        (0.5, 0.4, 0.0, "shown"),  # better
        (0.5, 0.6, 0.0, "open"),
        (-0.5, 0.4, 0.0, "contradicted"),
    ],
)
def test_a_claim_is_shown_where_its_whole_interval_is_within_the_margin(
    mean: float, half: float, margin: float, word: str
) -> None:
    away = half / 1.96 * math.sqrt(99)  # a hundred values of this mean and interval
    differences = [mean + sign * away for sign in (-1.0, 1.0)] * 50
    assert reporting.paired(differences) == pytest.approx((mean, half))
    assert reporting.verdict(differences, margin=margin) == word


def test_seeds_that_differ_widen_the_interval_and_one_leaves_it_open() -> None:
    tasks = [0.9, 1.1] * 100
    assert reporting.verdict(tasks, margin=0.0) == "shown"
    assert reporting.verdict(tasks, [1.0], 0.0) == "open"
    assert reporting.verdict(tasks, [3.0, -1.0, 1.0], 0.0) == "open"
    assert reporting.verdict(tasks, [1.01, 0.99, 1.0], 0.0) == "shown"
    assert reporting.paired(tasks, [3.0, -1.0, 1.0]) == pytest.approx((1.0, 4.303 * 2 / math.sqrt(3)))
    assert reporting.verdict([1.0, -math.inf], [1.0, 2.0]) == "open"
    assert reporting.verdict([5.0]) == "open"
    for differences, seeds, margin in (([], None, 1.0), ([1.0], [], 1.0), ([1.0], None, -1.0), ([1.0], None, math.nan)):
        with pytest.raises(ValueError, match="give"):
            reporting.verdict(differences, seeds, margin)


# ---------------------------------------------------------------------------------------------- processes and figures


def where(number: int, text: str) -> list[object]:
    print("noise")
    return [os.getpid(), 2 * number, text, os.environ["MALLOC_TRIM_THRESHOLD_"]]


def broken() -> None:
    raise ValueError("a reason")


def test_a_fresh_process_computes_and_says_why_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for function in (where, broken):
        monkeypatch.setattr(function, "__module__", Path(__file__).stem)
    process, *found = reporting.in_fresh_process(where, 4, "±")
    assert process != os.getpid()
    assert found == [8, "±", "65536"]
    with pytest.raises(Failed, match="ValueError: a reason"):
        reporting.in_fresh_process(broken)


def test_functions_take_turns() -> None:
    calls: list[str] = []
    found = reporting.in_turns({name: partial(calls.append, name) for name in "ab"}, 3, warm_up=1)
    assert "".join(calls) == "ab" * 4
    assert all(0 <= time.lower <= time.median <= time.upper for time in found.values())


def test_provenance_names_the_command_and_what_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "speed.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    found = reporting.provenance()
    assert found["command"] == "python benchmarks/speed.py --quick"
    assert {"commit", "machine", "time", "versions"} <= found.keys()
    line = reporting.made(found | {"seconds": 12.3})
    assert all(part in line for part in ("`python benchmarks/speed.py --quick`", "12 s on", found["versions"]["torch"]))


def test_frontier_is_what_nothing_else_beats() -> None:
    points = [(3.0, 0.5), (1.0, 0.4), (1.0, 0.3), (2.0, 0.4), (4.0, 0.5), (5.0, 0.6)]
    assert figures.frontier(points) == [(1.0, 0.4), (3.0, 0.5), (5.0, 0.6)]
    assert figures.frontier([]) == []


def test_a_name_looks_the_same_in_all_panels() -> None:
    one = figures.Panel({"a": figures.Line([1, 2], [1, 2]), "b": figures.Line([1, 2], [2, 3], {}, [1, 2], [3, 4])})
    two = figures.Panel({"b": figures.Line([1], [2], figures.DOTS, [1], [3])}, levels={"limit": (1.5, {})})
    figure = figures.panels([one, two, two], columns=2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "limit"]
    assert figure.axes[0].lines[1].get_color() == figure.axes[1].lines[0].get_color()
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    assert figures.png(figure).startswith(b"\x89PNG")


def test_letters_that_the_font_lacks_are_boxes_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    assert figures.png(figures.confusion(["\u65e5\u672c", "dog"], [[3, 1], [0, 4]]))
    assert not recwarn


def test_confusion_shows_counts_by_class() -> None:
    figure = figures.confusion(["cat", "dog"], [[3, 1], [0, 4]])
    assert [(text.get_text(), text.get_position()) for text in figure.axes[0].texts] == [
        ("3", (0, 0)),
        ("1", (1, 0)),
        ("4", (1, 1)),
    ]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["cat", "dog"]
