"""List the sources of tasks, or prepare one (download, render, read) and draw three of its tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from innerloop.choices import check_name
from innerloop.cli.arguments import add_settings, given_settings, usage_errors
from innerloop.tasks import SOURCES, Episodes, TaskSource
from innerloop.tasks._cache import cache_folder
from innerloop.tasks._episodes import SPLITS
from innerloop.training.build import INK, SOURCE_OPTIONS, build_tasks
from innerloop.training.report import plot_tasks
from innerloop.training.settings import Settings

USAGE = "[DATASET] [options]"

# How each source arrives, and the files in the cache folder that show it has.
ARRIVAL = {
    "glyphs": ("rendered at the first use", "glyphs-*.npz"),
    "omniglot": ("downloaded at the first use (15 MiB), or your copy with --data", "omniglot28*.npz"),
    "cifar_fs": ("downloaded at the first use (161 MiB), or your copy with --data", "cifar100.npz"),
    "fc100": ("downloaded at the first use (161 MiB), or your copy with --data", "cifar100.npz"),
    "mini_imagenet": ("your copy with --data; its licence forbids us to fetch it", "mini_imagenet-*.pixels"),
    "tiered_imagenet": ("your copy with --data; its licence forbids us to fetch it", "tiered_imagenet-*.pixels"),
    "folder": ("your own images with --data", "folder-*.pixels"),
    "stations": ("your copy with --data", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?", help="the source to prepare; without it, all are listed"
    )
    parser.add_argument("--split", default="train", help="which tasks to draw (train, validation, test) [train]")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where the picture goes [DATASET-tasks.png]")
    add_settings(parser, ("ways", "shots", "queries", "seed", *SOURCE_OPTIONS))


def run(arguments: argparse.Namespace) -> None:
    """List or prepare."""
    if arguments.dataset is None:
        print(f"cache folder: {cache_folder()} (INNERLOOP_CACHE names another)\n")
        for name, source in SOURCES.items():
            print(f"{name:<16} {_arrival(name)}\n{'':<16} {(source.__doc__ or '').splitlines()[0].replace('`', '')}")
        return
    with usage_errors():
        check_name("dataset", arguments.dataset, SOURCES)
        check_name("split", arguments.split, SPLITS)
        settings = Settings(**given_settings(arguments) | {"dataset": arguments.dataset})
        tasks = build_tasks(settings, [arguments.split])
        picture = arguments.out or Path(f"{arguments.dataset}-tasks.png")
        drawn = plot_tasks(picture, tasks, None, arguments.split, settings.dataset in INK)
    print(f"{arguments.dataset}: {_contents(tasks)}")
    if drawn:
        print(f"three tasks: {picture}")


def _arrival(name: str) -> str:
    how, pattern = ARRIVAL.get(name, ("generated", ""))
    sizes = [file.stat().st_size for file in cache_folder().glob(pattern)] if pattern else []
    return f"{how}; in the cache: {sum(sizes) / 2**20:.1f} MiB" if sizes else how


def _contents(tasks: TaskSource) -> str:
    shape = " x ".join(map(str, tasks.input_shape))
    if not isinstance(tasks, Episodes):
        return f"regression tasks, inputs of {shape}"
    splits = ", ".join(f"{len(classes)} {split}" for split, classes in tasks.image_set.splits.items())
    return f"{sum(tasks.image_set.counts)} images of {shape}; classes: {splits}"
