"""The report of a comparison: the recommendation, the JSON, the pages, the pictures, and a browser that opens it."""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from innerloop.reporting import Timing
from innerloop.studies.comparison import RULE, Comparison, Entry, Point, recommend
from innerloop.studies.comparison_report import summary_figure, table, write_report
from innerloop.training.evaluation import Estimate

MIB = 2**20
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync"


def entry(title: str, accuracy: float = 0.5, **changes: Any) -> Entry:
    interval = changes.pop("interval", 0.006)
    plain = Entry(
        method=title.lower(),
        title=title,
        paper="Finn et al. 2017, arXiv 1703.03400",
        differs={"inner rate": "0.01"},
        steps=1500,
        transductive=Estimate(accuracy, interval),
        inductive=Estimate(accuracy - 0.02, interval),
        seeds=[accuracy - 0.01, accuracy, accuracy + 0.01],
        behind=Estimate(0.0, 0.0),
        curve=[
            Point(s, s / 10, accuracy - 20 / s, accuracy - 22 / s, accuracy - 19 / s) for s in range(100, 1501, 100)
        ],
        reached=60.0,
        meta_step=Timing(0.1, 0.09, 0.12),
        memory=120 * MIB,
        memory_at={1: 30 * MIB, 5: 120 * MIB, 10: 220 * MIB},
        products=5.0,
        adaptation=Timing(0.012, 0.011, 0.013),
    )
    return plain._replace(**changes)


def comparison(*entries: Entry) -> Comparison:
    """Of entries as if their tasks were independent."""
    best = max((each.accuracy for each in entries), default=Estimate(0.0, 0.0))
    entries = tuple(
        each._replace(
            behind=Estimate(best.mean - each.accuracy.mean, math.hypot(best.interval, each.accuracy.interval))
        )
        if each.accuracy != best
        else each
        for each in entries
    )
    return Comparison(
        tasks="glyphs, 5-way 1-shot",
        budget="5 minutes of meta-steps",
        test_tasks=1000,
        target=0.45,
        nearest_neighbour=Estimate(0.331, 0.005),
        entries=list(entries),
        made={
            "command": "innerloop compare --methods maml,anil",
            "commit": None,
            "versions": {"python": "3.12.1"},
            "machine": {"cores": 2, "gpu": None},
        },
    )


THREE = comparison(
    entry("MAML", 0.523, products=25.0),
    entry("ANIL <b>|x", 0.519, reached=35.0, memory=38 * MIB, differs={"adapts": "head & tail"}),
    entry("Reptile", 0.451, transductive=None, reached=None, products=0.0, paper="our own", memory_at={}),
)


def many(count: int) -> Comparison:
    """So many methods, some of them crowded."""
    draw = np.random.RandomState(count)
    titles = ["MAML", "First-order MAML", "ANIL", "iMAML", "Memory-reduced", "Window of 5 steps", "Reptile", "BOIL"]
    titles += ["MAML++", "iMAML, Hessian-free", "Truncated, 2 steps", "Binomial, 3 terms"]
    return comparison(
        *(
            entry(
                title,
                0.5 + 0.03 * draw.rand() ** 2 - 0.06 * (title == "Reptile"),
                memory=int(MIB * 30 * 6 ** draw.rand()),
                reached=None if title in ("Reptile", "BOIL") else 40 * 6 ** draw.rand(),
            )
            for title in titles[:count]
        )
    )


# ---------------------------------------------------------------------------------------------- recommendation


def test_of_the_accurate_methods_the_one_that_is_soonest_is_recommended() -> None:
    found = recommend(
        comparison(
            entry("MAML", 0.523, reached=90.0),
            entry("ANIL", 0.519, reached=50.0),  # 0.4 points below, the interval of the difference is 0.85
            entry("BOIL", 0.516),
            entry("FOMAML", 0.510, reached=10.0),
        )
    )
    assert [each.title for each in found.candidates] == ["MAML", "ANIL", "BOIL"]
    assert found.chosen
    assert (found.chosen.title, found.first) == ("ANIL", "Recommended: ANIL.")
    for part in ("51.90 ± 0.60 %", "50 s", "120 MiB", "12 ms", "Other candidates: MAML, BOIL."):
        assert part in found.rest


@pytest.mark.parametrize(
    ("behind", "interval", "candidates"),
    [
        (0.0019, 0.002, 2),
        (0.0021, 0.002, 1),
        (0.0099, 0.1, 2),
        (0.0101, 0.1, 1),
        (0.0, math.nan, 2),
        (0.1, math.nan, 1),
    ],
)
def test_the_paired_interval_decides_and_a_wide_one_makes_no_candidate(
    behind: float, interval: float, candidates: int
) -> None:
    far = comparison(entry("A", 0.5), entry("B", 0.5 - behind))
    paired = [far.entries[0], far.entries[1]._replace(behind=Estimate(behind, interval))]
    assert len(recommend(far._replace(entries=paired)).candidates) == candidates


def test_whoever_reaches_the_target_at_all_comes_first_and_ties_go_to_the_faster_step() -> None:
    fast, slow = Timing(0.1, 0.1, 0.1), Timing(0.2, 0.2, 0.2)
    late, never = entry("late", reached=500.0, meta_step=slow), entry("never", reached=None, meta_step=fast)
    assert recommend(comparison(never, late)).chosen is late
    tied = entry("tied", reached=500.0, meta_step=fast)
    assert recommend(comparison(late, tied)).chosen is tied
    faster = entry("faster", reached=None, meta_step=Timing(0.05, 0.04, 0.06))
    assert recommend(comparison(never, faster)).chosen is faster


def test_methods_that_save_memory_or_adaptation_time_are_named_candidates_first() -> None:
    light = entry("light", memory=40 * MIB, reached=70.0)
    quick = entry("quick", adaptation=Timing(0.003, 0.003, 0.003), reached=80.0)
    weak = entry("weak", 0.40, memory=30 * MIB)
    found = recommend(comparison(entry("MAML"), light, quick, weak))
    assert found.chosen
    assert (found.chosen.title, found.lightest, found.quickest) == ("MAML", light, quick)
    assert "light, 40 MiB, test accuracy 50.00 ± 0.60 %" in found.rest
    assert "quick, 3 ms, test accuracy 50.00 ± 0.60 %" in found.rest
    costly = recommend(comparison(entry("MAML", 0.53), weak))
    assert costly.lightest
    assert costly.lightest.title == "weak"
    little = recommend(comparison(entry("MAML"), entry("B", memory=119 * MIB, reached=70.0)))
    assert little.lightest is little.quickest is little.chosen


def test_a_method_below_raw_pixels_is_neither_recommended_nor_named_nor_on_a_frontier() -> None:
    useless = entry("Reptile", 0.33, memory=10 * MIB, adaptation=Timing(0.001, 0.001, 0.001), reached=1.0)
    light = entry("FOMAML", 0.40, memory=40 * MIB)
    study = comparison(entry("MAML", 0.53), light, useless)  # nearest neighbour: 33.1 %
    found = recommend(study)
    assert found.lightest
    assert (found.lightest.title, found.quickest) == ("FOMAML", found.chosen)
    for axes, costs in zip(summary_figure(study).axes, ([40 * MIB, 120 * MIB], [60.0]), strict=True):
        line = next(line for line in axes.lines if line.get_label() == "frontier")
        assert list(np.asarray(line.get_xdata())) == costs
    alone = recommend(comparison(entry("MAML", 0.33), entry("ANIL", 0.33, memory=10 * MIB)))
    assert (alone.chosen, alone.candidates, alone.lightest, alone.quickest) == (None, [], None, None)
    assert alone.first == "Recommended: none."
    # far behind the best, which is above raw pixels, a wide interval helps no method either
    wide = study._replace(entries=[study.entries[0], useless._replace(behind=Estimate(0.2, 0.5))])
    assert recommend(wide).candidates == [study.entries[0]]


def test_fewer_than_three_seeds_are_said_to_be_few() -> None:
    assert "--seeds 3" in recommend(comparison(entry("A", seeds=[0.4, 0.5]))).rest
    assert "--seeds" not in recommend(comparison(entry("A"))).rest


def test_no_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="holds no methods"):
        recommend(comparison())


# ---------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "report"
    write_report(folder, THREE)
    return folder


def test_methods_that_failed_and_notes_are_told(tmp_path: Path) -> None:
    found = comparison(entry("MAML"))._replace(
        failed={"anil": "the loss is <NaN> at outer step 3"}, notes=["maml: seed 2 diverged and is left out"]
    )
    write_report(tmp_path, found)
    pages = (tmp_path / "report.md").read_text("utf-8"), unescape((tmp_path / "report.html").read_text("utf-8"))
    for page in pages:
        assert all(told in page for told in (*found.failed.values(), *found.notes))


def test_json_is_strict_and_keeps_unknown_intervals(tmp_path: Path) -> None:
    write_report(tmp_path, comparison(entry("A", interval=math.nan, memory_at={}, curve=[])))
    text = (tmp_path / "comparison.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["entries"][0]["transductive"]["interval"] is None


def marked(found: Comparison) -> dict[str, list[bool]]:
    shown = table(found)
    return {name: [getattr(row[place], "best", False) for row in shown.rows] for place, name in enumerate(shown.head)}


def test_the_best_of_each_column_is_marked() -> None:
    best = marked(THREE)
    assert best["transductive"] == [True, False, False]
    assert best["to target"] == best["memory"] == [False, True, False]
    assert best["products"] == [False, False, True]
    assert best["meta-step"] == [True, True, True]
    assert not any(best["outer steps"] + best["each seed"] + best["method"])
    assert not any(any(column) for column in marked(comparison(entry("MAML"))).values())


def test_a_bare_arxiv_number_becomes_a_link(tmp_path: Path) -> None:
    write_report(tmp_path, comparison(entry("A", paper="1909.09157"), entry("B", paper="ours")))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "[A](https://arxiv.org/abs/1909.09157)" in text
    assert "| [arXiv 1909.09157](https://arxiv.org/abs/1909.09157) |" in text
    assert "| ours |" in text


def test_columns_without_numbers_are_left_out() -> None:
    alone = entry("A", transductive=None, seeds=[0.5])
    assert not {"transductive", "each seed"} & set(table(comparison(alone, alone)).head)


def test_markdown_has_its_pictures_and_regular_tables(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert pictures == ["summary.png", "learning.png", "memory.png"]
    assert all(Image.open(folder / name).width >= 600 for name in pictures)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert f"**{recommend(THREE).first}** {recommend(THREE).rest}" in text
    assert RULE in text


class Page(HTMLParser):
    """Elements with their attributes, and text; complains of elements that do not close."""

    VOID = frozenset({"meta", "img", "source", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_html_is_one_regular_file(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.all("html")[0]["lang"] == "en"
    assert not page.all("script", "link", "iframe", "object")
    loaded = [str(each["src"]).removeprefix("data:image/png;base64,") for each in page.all("img")]
    files = ("summary.png", "learning.png", "memory.png")
    assert [base64.b64decode(each) for each in loaded] == [(folder / name).read_bytes() for name in files]
    assert "url(" not in text
    assert "@import" not in text
    assert {each["href"] for each in page.all("a")} == {"https://arxiv.org/abs/1703.03400"}
    assert all(len(each["alt"] or "") > 40 for each in page.all("img"))
    assert {each["scope"] for each in page.all("th")} == {"col", "row"}
    assert "ANIL <b>|x" in page.text
    assert "head & tail" in page.text


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("count", [1, 2, 12])
def test_every_method_is_in_the_legend_once_and_stands_out(count: int) -> None:
    study = many(count)
    figure = summary_figure(study)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    references = ["nearest neighbour on pixels", "chance"]
    assert names == [*(each.title for each in study.entries), "recommended", "frontier", *references]
    looks = {
        (line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_label() in names[:count]
    }
    assert len(looks) == count
    figure.draw_without_rendering()
    box, frame = figure.legends[0].get_window_extent(), figure.bbox
    assert frame.x0 <= box.x0 < box.x1 <= frame.x1


def test_whoever_never_reaches_the_target_is_left_out_of_the_panel_of_times() -> None:
    axes = summary_figure(THREE).axes[1]
    shown = {str(line.get_label()): np.asarray(line.get_xdata()) for line in axes.lines}
    assert np.isnan(shown["Reptile"]).all()
    assert list(shown["frontier"]) == [35.0, 60.0]


def test_an_axis_of_memory_has_several_marks() -> None:
    marks = [text.get_text() for text in summary_figure(comparison(entry("A"), entry("B"))).axes[0].get_xticklabels()]
    assert marks == ["64 MiB", "96 MiB", "128 MiB", "192 MiB"]


def test_numbers_at_zero_can_be_drawn() -> None:
    zero = entry("A", memory=0, interval=math.nan)
    figure = summary_figure(comparison(zero, entry("B")))
    assert [np.asarray(axes.lines[0].get_xdata())[0] for axes in figure.axes] == [1.0, 60.0]


# ---------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET.split())
        yield browser
        browser.close()


# The lowest contrast (WCAG 2.2) of any element that holds text itself, and the element's text.
CONTRAST = """() => {
  const channels = text => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const background = element => {
    for (; element; element = element.parentElement) {
      const colour = channels(getComputedStyle(element).backgroundColor);
      if (colour.length == 3 || colour[3] == 1) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.body.querySelectorAll("*")]
    .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
    .map(e => {
      const pair = [light(channels(getComputedStyle(e).color)), light(background(e))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), e.textContent];
    })
    .sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_report_in_light_and_dark(browser: Any, folder: Path, width: int) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True)
        page = context.new_page()
        faults: list[str] = []
        page.on("console", lambda message, faults=faults: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
        page.on("requestfailed", lambda request, faults=faults: faults.append(f"failed: {request.url[:80]}"))
        page.on(
            "request",
            lambda request, faults=faults: (
                None if request.url.startswith(("file:", "data:")) else faults.append(request.url)
            ),
        )
        page.goto((folder / "report.html").as_uri())
        assert faults == []
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
        images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.width])")
        assert len(images) == 3
        assert all(complete and natural > 0 and shown > 300 for complete, natural, shown in images)
        lowest, text = page.evaluate(CONTRAST)
        assert lowest >= 4.5, text
        place = page.locator("h1").bounding_box()
        assert place
        brightness[scheme] = np.median(np.asarray(Image.open(io.BytesIO(page.screenshot(clip=place))).convert("L")))
        context.close()
    assert brightness["dark"] < 40 < 240 < brightness["light"]


def test_paper_is_light_and_holds_the_whole_report(browser: Any, folder: Path) -> None:
    page = browser.new_page(color_scheme="dark", viewport={"width": 720, "height": 1000})
    page.goto((folder / "report.html").as_uri())
    page.emulate_media(media="print")
    page.wait_for_function("getComputedStyle(document.body).backgroundColor == 'rgb(255, 255, 255)'")
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(content <= shown for content, shown in boxes)
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
