"""Adapt a trained run to new classes, given as folders of a few images, and predict other images.

Each sub-folder of SUPPORT is a class. There may be more or fewer classes than in training: then every class starts
from the mean of the trained head's rows.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

from innerloop.choices import check_name
from innerloop.cli.arguments import add_settings, given_settings, usage_errors, writing_results
from innerloop.errors import UsageError
from innerloop.files import check_writable, write
from innerloop.reporting import provenance
from innerloop.studies.demo import gather
from innerloop.studies.patterns import read_choice, with_pattern
from innerloop.tasks._files import regular
from innerloop.training.adaptation import inverts, labelled_images, predict, read_images, save_adapted
from innerloop.training.build import arithmetic
from innerloop.training.export import FORMATS, check_format, export, remove_exported
from innerloop.training.runs import is_shipped, load_learner, read_run, run_folder, shipped_runs

FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # how cells begin that spreadsheets compute
USAGE = "RUN --support FOLDER --query PATH [PATH ...] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "run", metavar="RUN", type=run_folder,
        help=f"folder that innerloop train has written, or one that comes along ({', '.join(shipped_runs())})",
    )  # fmt: skip
    parser.add_argument(
        "--support", metavar="FOLDER", type=Path, required=True, help="a sub-folder of images for each class"
    )
    parser.add_argument(
        "--query", metavar="PATH", type=Path, nargs="+", required=True,
        help="images, or a folder of images, or one like SUPPORT, for which accuracy is told as well",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where predictions and the adapted model go [RUN/adapted]"
    )
    parser.add_argument(
        "--export", metavar="FORMAT", help=f"write the model as one file without innerloop too ({', '.join(FORMATS)})"
    )
    parser.add_argument(
        "--invert", default="auto",
        help="turn light into dark (auto, yes, no); auto, for a run on characters: each image with a light rim [auto]",
    )  # fmt: skip
    parser.add_argument(
        "--transductive", action="store_true", help="predict all queries together, so that batch norm sees all of them"
    )
    parser.add_argument(
        "--pattern", metavar="FILE", type=Path,
        help="a pattern.json of innerloop patterns: move its blocks alone, in its number of steps",
    )  # fmt: skip
    add_settings(parser, ("model", "test_steps", "device", "threads"), run=True)


def run(arguments: argparse.Namespace) -> None:
    """Adapt, predict and write."""
    with usage_errors():
        check_name("invert", arguments.invert, ("auto", "yes", "no"))
        if arguments.export is not None:
            check_format(arguments.export)
            if arguments.transductive:
                raise UsageError(
                    "an exported model predicts each image by itself; leave --transductive or --export out"
                )
        given, blocks = given_settings(arguments), None
        if arguments.pattern is not None:
            blocks, steps = read_choice(arguments.pattern)
            given = {"test_steps": steps} | given
        settings = read_run(arguments.run, given, tasks=False)
        support, query = gather(arguments.support), _query(arguments.query)
        names = support.classes
        if strange := sorted({label for _, label in query if label is not None} - set(names)):
            raise UsageError(
                f"--query has classes that --support has not: {', '.join(strange)}; leave them out, or add them"
            )
        learner, trained = load_learner(arguments.run, settings, len(names))
        if trained["ways"] is None or len(trained["input_shape"]) != 3:
            raise UsageError(
                f"{arguments.run} was trained on {settings.dataset}, which has no images; adapt needs a run on images"
            )
        if blocks is not None:
            if blocks.rows[-1][-1] == "0" and trained["ways"] != len(names):
                raise UsageError(
                    f"{arguments.pattern} leaves the head alone, which is for {trained['ways']} classes, not "
                    f"{len(names)}: give {trained['ways']} classes, or a pattern that ends in 1"
                )
            learner = with_pattern(learner, blocks)
        invert = inverts(settings, arguments.invert)
        inputs = read_images(support.files, trained["input_shape"], invert)
        queries = read_images([file for file, _ in query], trained["input_shape"], invert)
        out = arguments.out or (Path() if is_shipped(arguments.run) else arguments.run) / "adapted"
        if out.is_symlink() and arguments.out is None:
            raise UsageError(f"{out} is a link to another place; remove it, or name a folder with --out")
        check_writable(out, "name another with --out")
        with arithmetic(settings):
            model = learner.adapt(inputs, support.labels, inductive=not arguments.transductive)

    with arithmetic(settings):
        probabilities = predict(model, queries, together=arguments.transductive)
    protocol = "transductive" if arguments.transductive else "inductive"
    notes = {
        "classes": names,
        "input_shape": trained["input_shape"],
        "invert": invert,
        "head": trained["head"],
        "adaptation_steps": learner.inner.adaptation_steps,
        "adapts": repr(learner.adapts),
        "predictions": protocol,
        **provenance(),
    }
    predictions = out / "predictions.csv"
    guesses = [names[label] for label in probabilities.argmax(-1).tolist()]
    with writing_results("the predictions and the model"):
        _write_csv(predictions, query, names, probabilities.tolist())
        remove_exported(out)
        save_adapted(out, model, settings, notes)

    print(
        f"adapted to {len(names)} classes, {len(support.files)} images, in {notes['adaptation_steps']} steps of "
        f"{notes['adapts']}; {notes['head']}"
    )
    print(f"predicted {len(query)} images ({protocol}): {predictions}")
    if known := [guess == label for guess, (_, label) in zip(guesses, query, strict=True) if label is not None]:
        print(f"accuracy: {sum(known) / len(known):.1%} ({sum(known)} of {len(known)}, {protocol})")
    if arguments.export is not None:
        exported = out / f"adapted.{arguments.export}"
        with writing_results("the exported model"):
            export(exported, model, notes, support.files[:4])
        print(f"exported, and checked without innerloop: {exported}")


def _query(paths: list[Path]) -> list[tuple[Path, str | None]]:
    """Image files, each with its class where it lies in a class folder."""
    found: list[tuple[Path, str | None]] = []
    for path in paths:
        if path.is_dir():
            found += labelled_images(path)
        elif regular(path):
            found.append((path, None))
        elif path.exists():
            raise UsageError(
                f"--query {path} is no regular file that can be read; name image files or a folder of them"
            )
        else:
            raise FileNotFoundError(f"--query {path} does not exist")
    if not found:
        raise UsageError(f"--query {paths[0]} holds no images; name image files or a folder of them")
    return found


def _write_csv(path: Path, query: list[tuple[Path, str | None]], names: list[str], shares: list[list[float]]) -> None:
    content = io.StringIO(newline="")
    writer = csv.writer(content)
    writer.writerow(["file", "class", "prediction", *map(_cell, names)])
    for (image, label), row in zip(query, shares, strict=True):
        words = (str(image), label or "", names[row.index(max(row))])
        writer.writerow([*map(_cell, words), *(f"{share:.6f}" for share in row)])
    write(path, content.getvalue().encode("utf-8", "backslashreplace"))


def _cell(text: str) -> str:
    """A name as a spreadsheet shows it: with a quote in front where it would be computed as a formula."""
    return f"'{text}" if text[:1] in FORMULAS else text
