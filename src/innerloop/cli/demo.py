"""Adapt to a few photographs of a few new things, and leave a page that shows how well, with the adapted model.

Each sub-folder of FOLDER is a class, of two photographs or more. Without FOLDER a few letters are drawn. A third of the
photographs are held out, to see whether they are recognised; the exported model is then adapted to all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from innerloop.cli.arguments import add_settings, given_settings, usage_errors, writing_results
from innerloop.errors import UsageError
from innerloop.files import check_writable
from innerloop.reporting import write
from innerloop.studies.demo import are_drawings, gather, page, try_out, verdict, write_specimens
from innerloop.training.adaptation import inverts, read_images
from innerloop.training.build import arithmetic
from innerloop.training.export import FORMATS, check_format, export, remove_exported, usage
from innerloop.training.runs import load_learner, read_run, run_folder, shipped_runs

USAGE = "[FOLDER] [options]"
PAGE = "demo.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="a sub-folder of photographs a class")
    parser.add_argument(
        "--run", metavar="RUN",
        help=f"what to start from, a folder of innerloop train or one of {', '.join(shipped_runs())} [by the look of "
        "the photographs]",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("demo"), help="where the page goes [demo]")
    parser.add_argument("--export", metavar="FORMAT", default="pt2", help=f"of the model ({', '.join(FORMATS)}) [pt2]")
    parser.add_argument("--serve", action="store_true", help="open a local web page to drop more photographs on")
    parser.add_argument("--port", metavar="N", default="0", help="of the local web page; 0 takes a free one [0]")
    add_settings(parser, ("test_steps", "device", "threads"), run=True)


def run(arguments: argparse.Namespace) -> None:
    """Adapt, compare, export and show."""
    with tempfile.TemporaryDirectory() as drawn:
        with usage_errors():
            check_format(arguments.export)
            if arguments.serve:
                from innerloop.cli.serving import local_socket, serve

                listening = local_socket(arguments.port)
            if arguments.folder is None:
                write_specimens(Path(drawn))
            photographs = gather(arguments.folder or Path(drawn), least=2)
            drawings = are_drawings(photographs.files)
            start = arguments.run or ("shipped:glyphs" if drawings else "shipped:photos")
            why = "as told" if arguments.run else f"for {'drawings' if drawings else 'pictures'}, as these seem to be"
            settings = read_run(run_folder(start), given_settings(arguments), tasks=False)
            learner, trained = load_learner(run_folder(start), settings, len(photographs.classes))
            shape, invert = trained["input_shape"], inverts(settings, "auto")
            if trained["ways"] is None or len(shape) != 3:
                raise UsageError(f"--run {start} was not trained on images; name a run that was")
            images = read_images(photographs.files, shape, invert)
            check_writable(arguments.out, "name another with --out")
        with arithmetic(settings), usage_errors():
            trial = try_out(learner, images, photographs.labels)
            model = learner.adapt(images, photographs.labels, inductive=True)
        outcome = verdict(photographs, trial)
        print(f"{outcome.first} {outcome.rest}")
        for name, share in trial.accuracies.items():
            print(f"  {name:<20}{share:6.1%}")
        print(f"started from {start}, {why}")
        notes = {"classes": photographs.classes, "input_shape": shape, "invert": invert}
        file = arguments.out / f"adapted.{arguments.export}"
        with writing_results():
            remove_exported(arguments.out)
            export(file, model, notes, photographs.files[:4])
            shown = page(photographs, trial, {"model": file.name, "started from": f"{start}, {why}"}, usage(file.name))
            write(arguments.out / PAGE, shown)
    print(f"exported, and checked without innerloop: {file}")
    print(f"page: {arguments.out / PAGE}", flush=True)
    if arguments.serve:
        serve(listening, shown, model, notes)
