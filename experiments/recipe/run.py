"""Which recipe `innerloop train` should have by default: candidates at equal processor time, chosen in validation.

    python experiments/recipe/run.py                       # one seed of every candidate on every data set
    python experiments/recipe/run.py --seconds 100 --seeds 0 1 2 --candidates default proto-anil protonet pretrained
    python experiments/recipe/run.py --page                # the page alone, from what is there

Every run gets as many outer steps as fit in ``--seconds`` of processor time on one thread, counted from a trial, and
its rate falls along a cosine over them. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import DATA, collect

from innerloop import reporting
from innerloop.errors import Diverged
from innerloop.learner import MetaLearner
from innerloop.training.allocator import keep_freed_memory
from innerloop.training.build import build_learner, build_outer, build_tasks, with_inner_rate
from innerloop.training.evaluation import assess
from innerloop.training.fit import fit
from innerloop.training.methods import COLOURED, method_settings
from innerloop.training.settings import Settings

HERE = Path(__file__).parent
SETS: dict[str, dict[str, Any]] = {
    "glyphs": {"dataset": "glyphs"},
    "omniglot": {"dataset": "omniglot", "data": str(DATA / "omniglot28.npz")},
    "cifar-fs": {"dataset": "cifar_fs", "data": str(DATA / "cifarfs32.npz"), "shots": 5},
    "fc100": {"dataset": "fc100", "data": str(DATA / "cifarfs32.npz"), "shots": 5},
    "folder": {"dataset": "folder", "shots": 5, "class_split": "0.5,0.25,0.25"},
}
EACH = 60  # photographs of a class in the folder
OUTER = {"outer_lr": 3e-3}
PLAIN = {"inner": "sgd", "inner_lr": 0.1}
CANDIDATES: dict[str, Callable[[str], dict[str, Any]]] = {
    "default": lambda dataset: {"inner_lr": 0.5},
    "ten plain steps": lambda dataset: {**PLAIN, "inner_steps": 10},
    "implicit": lambda dataset: {**PLAIN, "inner_steps": 16, "meta_gradient": "implicit:iterations=5", "proximal": 0.5},
    "protonet": lambda dataset: method_settings("protonet", dataset) | OUTER,
    "protonet, shifted": lambda dataset: method_settings("protonet", dataset) | OUTER | {"augment": "flip,crop"},
    "proto-anil": lambda dataset: method_settings("proto-anil", dataset) | OUTER,
    "proto-anil, learned rates": lambda dataset: {"start": "prototypes", "inner_lr": 0.1, "inner_steps": 3},
    "ridge": lambda dataset: method_settings("ridge", dataset) | OUTER,
    "pretrained": lambda dataset: method_settings("pretrained", dataset) | OUTER,
    "pretrained, adapted": lambda dataset: method_settings("pretrained", dataset) | COLOURED,
}


# What `innerloop train` does where nothing of a method is typed.
COLOUR = "pretrained, adapted"
DEFAULT = {"glyphs": "proto-anil", "omniglot": "proto-anil", "cifar-fs": COLOUR, "folder": COLOUR}

CONCLUSION = """\
So `innerloop train` begins at class means and adapts the head from there in five plain steps. At one shot the head fits
its support from the start, so there the steps change nothing: what is compared is the squared distance to the class
means, of the default, with the cosine, of the nearest class mean. Colour pictures are learned otherwise where nothing
of a method is typed: by `pretrained`, mirrored and shifted, and a new task adapts the head in twenty small steps from
the class means by the cosine. On test tasks of all four sets no classifier on the same features is ahead of the default
by more than the interval, nor is a ProtoNet, on shifted pictures or not. Without them `pretrained` is behind a ProtoNet
on the folder (one seed), so there the whole recipe leads. "default" in these tables is the first edition's."""


def measured(data: str, candidate: str, seed: int, seconds: float, count: int) -> dict[str, Any]:
    """One run: steps, and validation of adaptation and of the baselines on its features."""
    given = {**SETS[data], **CANDIDATES[candidate](SETS[data]["dataset"]), "seed": seed, "steps": 10**6, "threads": 1}
    settings = Settings(**given)
    tasks = build_tasks(settings)
    settings = with_inner_rate(settings, tasks)
    source = settings.method()[2].trains_on(tasks)

    def built(settings: Settings) -> tuple[MetaLearner, dict[str, Any]]:
        learner = build_learner(settings, tasks.input_shape, source.output_size)
        return learner, build_outer(settings, learner)

    learner, outer = built(settings)
    optimizer = outer["optimizer"]
    taken = []
    for step in range(12):
        began = time.process_time()
        optimizer.zero_grad()
        learner.meta_step(source.batch("train", step * settings.tasks_per_batch, settings.tasks_per_batch))
        optimizer.step()
        taken.append(time.process_time() - began)
    steps = max(20, int(seconds / statistics.median(taken[2:])))
    learner, outer = built(Settings(**{**given, "steps": steps}))
    row: dict[str, Any] = {"steps": steps}
    try:
        fit(learner, tasks, steps=steps, validation_tasks=0, progress=False, **outer)
    except Diverged as error:
        return row | {"failed": str(error)}
    for split in ("validation", "test"):
        found = assess(learner, tasks, split, count).inductive
        others = {
            name: [each.accuracy.mean, each.difference.mean, each.difference.interval]
            for name, each in found.baselines.items()
        }
        row[split] = {"accuracy": list(found.accuracy), "loss": found.loss.mean, "baselines": others}
    return row


def photographs(folder: Path) -> None:
    """Draw the folder of a new user: sixty photographs of each of the twenty test classes of CIFAR-FS."""
    images = build_tasks(Settings(**SETS["cifar-fs"])).image_set
    starts = [0, *accumulate(images.counts)]
    for index in images.splits["test"]:
        (folder / images.classes[index]).mkdir()
        for place, pixels in enumerate(images.images[starts[index] :][:EACH].movedim(1, -1).numpy()):
            Image.fromarray(pixels).save(folder / images.classes[index] / f"{place}.png")


def combined(rows: list[list[float]]) -> str:
    """The mean over seeds of means, with the wider of the intervals over tasks and over seeds."""
    means = [row[0] for row in rows]
    interval = math.hypot(*(row[1] for row in rows)) / len(rows)
    if len(means) > 1:
        interval = max(interval, reporting.student(means))
    return f"{100 * statistics.mean(means):.1f} ± {100 * interval:.1f}"


def searched(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table in validation."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    sets = [data for data in SETS if any(row["data"] == data for row in rows)]
    yield "| recipe | " + " | ".join(sets) + " |"
    yield "| --- " * (1 + len(sets)) + "|"
    for name in names:
        cells = []
        for data in sets:
            mine = [row for row in rows if row["candidate"] == name and row["data"] == data]
            good = [row["validation"] for row in mine if "validation" in row]
            if not good:
                cells.append("diverged" if mine else "–")
                continue
            best = max(
                statistics.mean(row["baselines"][b][0] for row in good) for b in good[0]["baselines"] if b != "pixels"
            )
            adapted = statistics.mean(row["accuracy"][0] for row in good)
            cells.append(f"{100 * adapted:.1f} / {100 * best:.1f}{_fewer(len(good), rows)}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def _fewer(seeds: int, rows: list[dict[str, Any]]) -> str:
    """How many seeds a cell has, where others have more."""
    return "" if seeds == len({row["seed"] for row in rows}) else f" ({seeds} seed{'s' * (seeds > 1)})"


def tested(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table on test tasks: the default, what forty lines reach on its features, and other runs."""
    sets = [data for data in DEFAULT if any(row["data"] == data for row in rows)]
    yield "| | " + " | ".join(sets) + " |"
    yield "| --- " * (1 + len(sets)) + "|"

    def of(data: str, candidate: str) -> dict[int, dict[str, Any]]:
        mine = (row for row in rows if (row["data"], row["candidate"]) == (data, candidate) and "test" in row)
        return {row["seed"]: row["test"] for row in mine}

    def line(title: str, cells: Iterator[list[list[float]]]) -> str:
        shown = (combined(each) + _fewer(len(each), rows) if each else "–" for each in map(list, cells))
        return f"| {title} | " + " | ".join(shown) + " |"

    default = {data: of(data, DEFAULT[data]) for data in sets}
    yield line("**the default**", ([row["accuracy"] for row in default[data].values()] for data in sets))
    for name in next(row["test"] for row in rows if "test" in row)["baselines"]:
        apart = ([row["baselines"][name][1:] for row in default[data].values()] for data in sets)
        yield line(f"less {name} on the same run", apart)
    for name in dict.fromkeys(row["candidate"] for row in rows):
        pairs = [
            [(default[data][seed]["accuracy"], each["accuracy"]) for seed, each in of(data, name).items()]
            if name != DEFAULT[data]
            else []
            for data in sets
        ]
        if any(pairs):
            apart = ([[a[0] - b[0], math.hypot(a[1], b[1])] for a, b in each] for each in pairs)
            yield line(f"less a run of {name}", apart)


def page(record: dict[str, Any]) -> str:
    """The tables."""
    title, _, how = (__doc__ or "").split("\n\n")
    lines = ["# Which recipe should be the default", "", title, "", how.strip(), ""]
    for seconds in sorted({row["seconds"] for row in record["rows"]}):
        rows = [row for row in record["rows"] if row["seconds"] == seconds]
        seeds = len({row["seed"] for row in rows})
        lines += [f"## {seconds:g} seconds, {seeds} seed" + "s" * (seeds > 1), ""]
        lines += [
            "Validation, in percent: adapted / the better of nearest class mean and linear probe on its features."
        ]
        lines += ["", *searched(rows), ""]
        if seeds > 1:
            lines += ["Test, in percent: the default, and its lead over everything else. Leads over classifiers on the"]
            lines += [
                "same run are paired by task; others are not, so their intervals are wide.",
                "",
                *tested(rows),
                "",
            ]
    lines += [CONCLUSION, ""]
    lines += ["Inductive accuracy, with the wider of the 95 % intervals over tasks and over seeds."]
    lines += ["Seeds are all of the heading unless a cell says so. Glyphs and Omniglot 5-way 1-shot, the others 5-way"]
    count = record["rows"][0]["count"]
    lines += [f"5-shot; Conv4 with 32 filters; {count} tasks a seed. The folder holds {EACH} photographs of each"]
    lines += ["of CIFAR-FS's 20 test classes: ten to train on, five to choose by, five to test.", ""]
    return "\n".join([*lines, "Made by " + reporting.made(record["made"]) + "."]) + "\n"


def main() -> None:
    """Measure what is not there, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="processor seconds of a run")
    parser.add_argument("--count", type=int, default=400, help="validation tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    asked = [] if args.page else itertools.product(args.seeds, args.candidates, args.sets)
    with TemporaryDirectory() as folder:
        if not args.page and "folder" in args.sets:
            photographs(Path(folder))
            SETS["folder"]["data"] = folder
        wanted = (
            {"data": data, "candidate": candidate, "seed": seed, "seconds": args.seconds, "count": args.count}
            for seed, candidate, data in asked
        )
        record = collect(args.out / "recipe.json", wanted, lambda key, _: measured(**key))
    reporting.write(args.out / "README.md", page(record))


if __name__ == "__main__":
    main()
