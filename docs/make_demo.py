"""Draws docs/demo.png, what `innerloop demo` finds on its own letters: `python docs/make_demo.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from innerloop.reporting.figures import BLUE, GREEN, GREY, RED, STYLE, save
from innerloop.studies.demo import gather, try_out, write_specimens
from innerloop.training.adaptation import inverts, read_images
from innerloop.training.runs import load_learner, read_run, run_folder

RUN = "shipped:glyphs"


def main() -> None:
    """Try the shipped run out, and draw."""
    with tempfile.TemporaryDirectory() as folder:
        write_specimens(Path(folder))
        photographs = gather(Path(folder))
        settings = read_run(run_folder(RUN))
        learner, trained = load_learner(run_folder(RUN), settings, len(photographs.classes))
        images = read_images(photographs.files, trained["input_shape"], inverts(settings, "auto"))
        trial = try_out(learner, images, photographs.labels)
        pictures = [np.asarray(Image.open(file).convert("L")) for file in photographs.files]
    held = trial.held.nonzero().flatten().tolist()
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
        rows = len(photographs.classes)
        columns = len(photographs.files) // rows
        grid = left.subplots(rows, columns)
        for label, row in enumerate(grid):
            mine = [place for place, each in enumerate(photographs.labels.tolist()) if each == label]
            known, asked = ([place for place in mine if (place in held) is side] for side in (False, True))
            for axes, place in zip(row, [*known, *asked], strict=True):
                axes.imshow(pictures[place], cmap="gray")
                axes.set(xticks=[], yticks=[])
                if place in held:
                    right_one = int(trial.guesses[held.index(place)]) == label
                    for side in axes.spines.values():
                        side.set(visible=True, color=GREEN if right_one else RED, linewidth=2.5)
        left.suptitle(f"learned from the left {columns - len(held) // rows} columns; green: recognised", fontsize=9)
        axes = right.subplots()
        names, shares = list(trial.accuracies), [100 * share for share in trial.accuracies.values()]
        drawn = axes.barh(names, shares, color=[BLUE, *[GREY] * (len(names) - 1)], height=0.6)
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.set(xlabel=f"accuracy, %, {trial.splits} splits", xlim=(0, 110))
    save(Path(__file__).with_name("demo.png"), figure)


if __name__ == "__main__":
    main()
