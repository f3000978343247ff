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
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from innerloop import reporting
from innerloop.reporting.figures import DOTS, DOTTED, MARKED, Line, Panel, save
from innerloop.training.runs import ACCURACIES, RESULTS, SETTINGS

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("INNERLOOP_DATA", ROOT.parent / "shared" / "data"))

Results = dict[str, Any]
Key = TypeVar("Key")


class Part(NamedTuple):
    """One measurement of an experiment.

    Attributes:
        measure: from the arguments to results that JSON can hold.
        draw: makes the figure of the results; None for a part without one.
        quick: the same on a small task in seconds; asserts the direction of the claim and returns results alike. None
            for a part whose claim another one shows as well.
        grows: whether `measure` adds what is missing to a file that is there, by `collect`.
    """

    measure: Callable[[argparse.Namespace], Results]
    draw: Callable[[Results], Figure] | None
    quick: Callable[[argparse.Namespace], Results] | None
    grows: bool = False


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
    if any(part.grows for part in parts.values()):
        parser.add_argument("--seeds", type=int, default=3, help="seeds of the parts that are measured row by row [3]")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as scratch:
        out = arguments.out or (Path(scratch) if arguments.quick else folder)
        out.mkdir(parents=True, exist_ok=True)
        arguments.out = out
        for name in arguments.only:
            _measure(name, parts[name], arguments, out)
        found = {
            name: json.loads(file.read_text("utf-8")) for name in parts if (file := out / f"{name}.json").is_file()
        }
        reporting.write(out / "README.md", page(found))


def _measure(name: str, part: Part, arguments: argparse.Namespace, out: Path) -> None:
    file = out / f"{name}.json"
    measure = part.quick if arguments.quick else part.measure
    if measure is None:
        return
    if arguments.fresh:
        file.unlink(missing_ok=True)
    if file.exists() and not (part.grows and not arguments.quick):
        print(f"{name}: {file} is there; --fresh measures it again", flush=True)
        results = json.loads(file.read_text("utf-8"))
    else:
        began = time.monotonic()
        results = measure(arguments)
        if not (part.grows and file.exists()):
            results["made"] = reporting.provenance() | {"seconds": round(time.monotonic() - began, 1)}
            reporting.write_json(file, results, indent=1)
        print(f"{name}: done in {time.monotonic() - began:.0f} s", flush=True)
    if part.draw:
        save(out / f"{name}.png", part.draw(results))


def collect(file: Path, wanted: Iterable[Results], measure: Callable[[Results, list[Results]], Results]) -> Results:
    """A results file that grows by rows, so that a long experiment can be interrupted.

    Args:
        file: written after each row; what it has is not measured again.
        wanted: what tells one row from another; it stands in the row.
        measure: from this, and the rows that there are, to the rest of the row.
    """
    record = json.loads(file.read_text("utf-8")) if file.exists() else {"rows": []}
    for key in wanted:
        if not any(key.items() <= row.items() for row in record["rows"]):
            row = key | measure(key, record["rows"])
            print({name: value for name, value in row.items() if not isinstance(value, (list, dict))}, flush=True)
            record["rows"].append(row)
            record["made"] = reporting.provenance()
            reporting.write_json(file, record, indent=None)
    return record


def innerloop(*arguments: str) -> None:
    """The command, its output shown."""
    subprocess.run([sys.executable, "-m", "innerloop", *arguments], check=True, cwd=ROOT)


def trained_run(name: str, options: str, data: Path | None = None) -> Path:
    """The folder of a training by `innerloop train` in runs/, which goes on where it was interrupted.

    Args:
        name: of the folder.
        options: as they are typed.
        data: folder of the data sets; None downloads them, or needs none.
    """
    folder = ROOT / "runs" / name
    if not (folder / RESULTS).exists():
        short = str(folder.relative_to(ROOT))
        own = ["--data", os.path.relpath(data, ROOT)] if data else []
        more = ["--resume", short] if (folder / SETTINGS).exists() else ["--out", short, *own, *shlex.split(options)]
        innerloop("train", *more)
    return folder


def found_by(run: Path) -> Results:
    """What a run came to: its validations, its test, and the accuracy of each test task by protocol."""
    results = json.loads((run / RESULTS).read_text("utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    negative = [record.get("negative_curvature", 0.0) for record in records if record["kind"] == "train"]
    test = results["test"]
    accuracies = {name: [[round(float(each), 4) for each in of]] for name, of in load_file(run / ACCURACIES).items()}
    return {
        "steps": results["training"]["step"],
        "seconds": round(results["training"]["seconds"], 1),
        "curve": validations(records),
        "negative curvature": statistics.fmean(negative),
        "nearest neighbour": test["nearest_neighbour"][0],
        "nearest class mean": test["transductive"]["baselines"]["nearest class mean"]["accuracy"],
        "transductive": test["transductive"]["accuracy"],
        "accuracies": accuracies["transductive"],
        "accuracies, inductive": accuracies["inductive"],
    }


def in_turns(functions: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Median seconds of each function."""
    return {name: seconds.median for name, seconds in reporting.in_turns(functions, rounds).items()}


def validations(records: list[dict[str, Any]]) -> list[list[float]]:
    """Outer steps, accuracy and loss of each validation of a training's records."""
    return [[each["step"], each["accuracy"], each["loss"]] for each in records if each["kind"] == "validation"]


def learning(
    rows: dict[str, Results], test: str, by: str = "seconds of outer steps", ways: int = 5, shots: str = ""
) -> Panel:
    """Validation accuracy of each method, over the seconds or the steps that it has had.

    The last point is the test accuracy, ``row[test]``, with its 95 % interval.
    """
    lines = {}
    for place, (method, row) in enumerate(rows.items()):
        x, y, _ = zip(*row["curve"], strict=True)
        scale = 1 if by == "outer steps" else row["seconds a step"]
        lines[method] = Line([scale * step for step in x], [100 * value for value in y], MARKED)
        lines[f"_{method}"] = ending((1 + 0.015 * place) * scale * x[-1], row[test])
    first = next(iter(rows.values()))
    axes = {"xlabel": by, "ylabel": f"validation accuracy{shots}, %; bar: test"}
    return Panel(lines, axes, references(ways, first.get("nearest neighbour")))


def ending(x: float, estimate: Sequence[float]) -> Line:
    """Where a method's line ends in the test: accuracy and its interval."""
    mean, half = (100 * each for each in estimate)
    return Line([x], [mean], DOTS | {"marker": "D"}, [mean - half], [mean + half])


def references(ways: int, pixels: float | None = None) -> dict[str, tuple[float, dict[str, str]]]:
    """Levels of accuracy that every figure shows: chance, and the nearest neighbour on pixels where it is known."""
    known = {} if pixels is None else {"nearest neighbour on pixels": (100 * pixels, {"linestyle": "-."})}
    return {**known, "chance": (100 / ways, DOTTED)}


def check_learning(rows: dict[str, Results], least: dict[str, float]) -> None:
    """Every method lowers its validation loss by so much, some two thirds of what it does where nothing is broken."""
    for name, row in rows.items():
        losses = [loss for _, _, loss in row["curve"]]
        fall = losses[0] - losses[-1]
        assert fall > least[name], f"{name}: validation loss falls by {fall:.3f} in {row['steps']} steps: {losses}"


def judged(found: bool | str, small: bool = True) -> str:
    """A verdict in the pages' words.

    Args:
        found: whether a measurement without noise to speak of agrees with the claim, or what `reporting.verdict` says.
        small: whether it was measured below the paper's scale.
    """
    word = found if isinstance(found, str) else "shown" if found else "contradicted"
    return word if word == "open" or not small else f"{word} in small"


def as_accurate(ours: Results, theirs: Results) -> str:
    """Whether ours is at least as accurate as theirs, within a point: paired over test tasks and over seeds.

    Open where rows have no ``accuracies``, ``[seeds, tasks]``, and of a single seed.
    """
    if "accuracies" not in ours or "accuracies" not in theirs:
        return "open"
    pairs = zip(ours["accuracies"], theirs["accuracies"], strict=True)
    apart = [[100 * (one - other) for one, other in zip(*both, strict=True)] for both in pairs]
    return judged(reporting.verdict([*chain.from_iterable(apart)], [statistics.fmean(each) for each in apart]))


def estimate(values: list[list[float]]) -> tuple[float, float]:
    """Mean and 95 % interval of what is known by seed and task; of a single seed the interval is that of its tasks."""
    each = [statistics.fmean(seed) for seed in values]
    return reporting.paired([*chain.from_iterable(values)], each if len(each) > 1 else None)


def higher_of(differences: list[float]) -> str:
    """Whether a difference is above 0, by its values in a few seeds."""
    return judged(reporting.verdict(differences, differences, margin=0.0))


CLAIMS = ["claim", "published", "ours", "scale", "verdict"]
Section = tuple[list[list[str]], str]  # rows of the table of claims, and the text


def page_of(
    header: str,
    sections: dict[str, Callable[[Results], Section]],
    results: dict[str, Results],
    how: str,
    plain: tuple[str, ...] = (),
) -> str:
    """A page: what differs from the paper, the claims, a section a part with its picture, and provenance."""
    found = {name: sections[name](each) for name, each in results.items()}
    claims = reporting.table(CLAIMS, [row for rows, _ in found.values() for row in rows])
    parts = [text if name in plain else f"{text}\n\n![{name}]({name}.png)" for name, (_, text) in found.items()]
    made = "\n".join(f"* {name}: {reporting.made(each['made'])}" for name, each in results.items())
    folded = f"<details><summary>How each part was made</summary>\n\n{how}\n\n{made}\n\n</details>\n"
    return "\n\n".join([header, claims, *parts, folded])
