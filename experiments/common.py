"""What the experiments share: their command line, results with provenance, the look of figures.

An experiment is a table of parts. Each part measures; its results go to `<part>.json` with what made them, and its
figure to `<part>.png`. A part that is there already is not measured again: a long experiment can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from innerloop.studies.measure import quiet_environment
from innerloop.training.report import STYLE
from innerloop.training.runs import provenance

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("INNERLOOP_DATA", ROOT.parent / "shared" / "data"))
COLOURS = ["#1f6fb4", "#d9720a", "#2a9d4a", "#d43a2f", "#7d55b0", "#808080", "#a0792c", "#c2588f"]

Results = dict[str, Any]
Key = TypeVar("Key")


class Part(NamedTuple):
    """One measurement of an experiment.

    Attributes:
        measure: from the arguments to results that JSON can hold.
        draw: makes the figure of the results; None for a part without one.
        quick: the same on a small task in seconds; asserts the direction of the claim and returns results alike. None
            for a part whose claim another one shows as well.
    """

    measure: Callable[[argparse.Namespace], Results]
    draw: Callable[[Results], Figure] | None
    quick: Callable[[argparse.Namespace], Results] | None


def run(doc: str, folder: Path, parts: dict[str, Part], page: Callable[[dict[str, Results]], str]) -> None:
    """The command line of an experiment: measure its parts, draw them, write the page.

    Args:
        doc: the docstring of the experiment, for `--help`.
        folder: where the committed results lie, the default of `--out`.
        parts: by name, in order.
        page: from the results of all parts that there are to the README of the folder.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tasks; checks the direction of every claim")
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="parts to measure [all]")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    there = DATA if DATA.is_dir() else None
    parser.add_argument("--data", type=Path, default=there, help=f"folder of the data sets [{there or 'downloaded'}]")
    parser.add_argument("--out", type=Path, help="where results go [the experiment's folder; --quick: nowhere]")
    parser.add_argument("--threads", type=int, help="CPU threads [what torch takes]")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as scratch:
        out = arguments.out or (Path(scratch) if arguments.quick else folder)
        out.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            _measure(name, parts[name], arguments, out)
        found = {
            name: json.loads(file.read_text("utf-8")) for name in parts if (file := out / f"{name}.json").is_file()
        }
        (out / "README.md").write_text(page(found), "utf-8")


def _measure(name: str, part: Part, arguments: argparse.Namespace, out: Path) -> None:
    file = out / f"{name}.json"
    measure = part.quick if arguments.quick else part.measure
    if measure is None:
        return
    if file.exists() and not arguments.fresh:
        print(f"{name}: {file} is there; --fresh measures it again", flush=True)
        results = json.loads(file.read_text("utf-8"))
    else:
        began = time.monotonic()
        results = measure(arguments)
        command = shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
        made = provenance() | {"command": command, "seconds": round(time.monotonic() - began, 1)}
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(results | {"made": made}, indent=1) + "\n", "utf-8")
        partial.replace(file)
        print(f"{name}: done in {time.monotonic() - began:.0f} s", flush=True)
    if part.draw:
        with mpl.rc_context(STYLE):
            part.draw(results).savefig(out / f"{name}.png")


def in_fresh_process(function: Callable[..., Results], *arguments: Any) -> Results:
    """Call a function of a module in a process of its own, with as many threads, for honest peaks of memory."""
    threads = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with (
        patch.dict(os.environ, quiet_environment()),
        ProcessPoolExecutor(1, get_context("spawn"), **threads) as pool,
    ):
        return pool.submit(function, *arguments).result()


def in_turns(functions: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Median seconds of each function; they take turns, so that a machine that is busy for a while is so for all."""
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def percent(estimate: Sequence[float], sign: str = "") -> str:
    """A mean and the half-width of its interval in percent."""
    return f"{100 * estimate[0]:{sign}.2f} ± {100 * estimate[1]:.2f}"


def verdict(holds: bool) -> str:
    """Of a claim."""
    return "holds" if holds else "does not hold"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def details(results: dict[str, Results], how: str) -> str:
    """How to make all parts, and how each of them was made, a line each; folded away."""
    lines = []
    for name, found in results.items():
        one = found["made"]
        machine = one["machine"]
        versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
        lines.append(
            f"* {name}: `{one['command']}`, {one['seconds']:.0f} s on {machine['gpu'] or machine['processor']} "
            f"with {machine['threads']} threads, {versions}, commit {one['commit']}, {one['time'][:10]}"
        )
    made = "\n".join(lines)
    return f"<details><summary>How each part was made</summary>\n\n{how}\n\n{made}\n\n</details>\n"
