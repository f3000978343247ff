"""What a learner makes of a few photographs of a few new things, beside what forty lines of code make of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.learner import MetaLearner
from innerloop.problem import Task
from innerloop.reporting import Bars, Box, Code, Facts, Gallery, Heading, Part, Picture, html
from innerloop.tasks._glyphs import specimens
from innerloop.tasks._pictures import upright
from innerloop.training.adaptation import labelled_images, predict, read_images
from innerloop.training.baselines import accuracies

LETTERS = "აბგⴳⴷ"  # of scripts that no shipped run was trained on
SPLITS = 20  # choices of what to hold out that the bars are means over, as long as there are few photographs
WORK = 1000  # photographs looked at in all of them together
SHOWN, ALL_SHOWN, THUMBNAIL = 8, 96, 112  # photographs of a class and of all, and pixels of a side
ADAPTED = "adapted"


class Photographs(NamedTuple):
    """Image files and the classes that they show, in the order of the classes."""

    classes: list[str]
    files: list[Path]
    labels: Tensor


class Trial(NamedTuple):
    """How well held-out photographs are recognised.

    Attributes:
        held: which photographs the first split holds out, ``[photographs]``.
        guesses: the class that the adapted model gives to each of those.
        accuracies: by method, the mean over all splits.
        splits: how many.
    """

    held: Tensor
    guesses: Tensor
    accuracies: dict[str, float]
    splits: int


def gather(folder: Path, least: int = 1) -> Photographs:
    """The photographs in the sub-folders of a folder, one a class.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: fewer than two classes, or a class with fewer photographs than the least number asked for.
    """
    found: dict[str, list[Path]] = {}
    for file, label in labelled_images(folder):
        if label is not None:
            found.setdefault(label, []).append(file)
    if len(found) < 2:
        raise ValueError(
            f"{folder} has {len(found)} sub-folders with images; give each of 2 or more things a sub-folder of its own"
        )
    for name, files in found.items():
        if len(files) < least:
            raise ValueError(
                f"{folder / name} has {len(files)} image; give it {least} or more, so that one can be held out, or "
                "leave the class out"
            )
    labels = torch.tensor([label for label, files in enumerate(found.values()) for _ in files])
    return Photographs(list(found), [file for files in found.values() for file in files], labels)


def write_specimens(folder: Path) -> None:
    """Draw a few letters, dark on white paper, a sub-folder each, for a demonstration without photographs."""
    from PIL import Image

    for name, images in specimens(LETTERS).items():
        place = folder / name.title()
        place.mkdir()
        for number, image in enumerate(images[:9]):
            Image.fromarray(255 - image).resize((84, 84), Image.Resampling.BICUBIC).save(place / f"{number}.png")


def are_drawings(files: Sequence[Path]) -> bool:
    """Whether images are line drawings or writing: nearly grey, and mostly paper of one tone.

    Raises:
        ValueError: a file cannot be read as an image.
    """
    pixels = read_images(files, (3, 32, 32), invert=False)
    colour = (pixels.amax(1) - pixels.amin(1)).mean()
    paper = pixels.flatten(1) - pixels.flatten(1).median(1, keepdim=True).values
    return bool(colour < 0.05 and (paper.abs() < 0.1).float().mean() > 0.6)


def hold_out(labels: Tensor, seed: int) -> Tensor:
    """Which examples to hold out, ``[examples]``: at random a third of each class, and one at least."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        held[places[torch.randperm(len(places), generator=generator)[: max(1, len(places) // 3)]]] = True
    return held


def try_out(learner: MetaLearner, images: Tensor, labels: Tensor) -> Trial:
    """Adapt to some photographs and predict the others, each by itself, in several splits; so do the baselines.

    Args:
        learner: with a head for as many classes.
        images: ``[photographs, *shape]``.
        labels: ``[photographs]``.
    """
    splits = max(1, min(SPLITS, WORK // len(images)))
    totals: dict[str, float] = {}
    trials: list[tuple[Tensor, Tensor]] = []
    for seed in range(splits):
        held = hold_out(labels, seed)
        support, query = (images[~held], labels[~held]), (images[held], labels[held])
        guesses = predict(learner.adapt(*support, inductive=True), query[0]).argmax(-1)
        task = Task(*(tuple(part[None] for part in pair) for pair in (support, query)))
        shares = {ADAPTED: (guesses == query[1]).float().mean()}
        shares |= accuracies(learner, task, int(labels.max()) + 1, inductive=True)
        totals = {name: totals.get(name, 0.0) + share.item() / splits for name, share in shares.items()}
        trials.append((held, guesses))
    return Trial(*trials[0], totals, splits)


def verdict(photographs: Photographs, trial: Trial) -> Box:
    """The outcome in a sentence or two; where a baseline is better it says so."""
    right = int((trial.guesses == photographs.labels[trial.held]).sum())
    held, own = len(trial.guesses), trial.accuracies[ADAPTED]
    best = max(trial.accuracies, key=lambda name: trial.accuracies[name])
    rest = f"They were held out; the model had adapted to the other {len(photographs.files) - held}."
    if trial.accuracies[best] > own:
        rest += f" Here {best} does better than adaptation: {trial.accuracies[best]:.1%} against {own:.1%}."
    return Box(f"{right} of {held} photographs recognised.", rest)


def page(photographs: Photographs, trial: Trial, facts: dict[str, str], usage: str) -> str:
    """The demonstration as one HTML file.

    Args:
        photographs: all of them.
        trial: what `try_out` found.
        facts: what else the reader should know, by name.
        usage: Python that runs the exported file.
    """
    names, shown = photographs.classes, list[Picture]()
    taken = [0] * len(names)
    for place, guess in zip(trial.held.nonzero().flatten().tolist(), trial.guesses.tolist(), strict=True):
        label, file = int(photographs.labels[place]), photographs.files[place]
        taken[label] += 1
        if taken[label] <= SHOWN and len(shown) < ALL_SHOWN:
            caption = names[label] if guess == label else f"{names[label]}, taken for {names[guess]}"
            frame = "right" if guess == label else "wrong"
            alt = f"{names[label]} ({frame})"
            shown.append(Picture(file.name, alt, caption, png=_thumbnail(file), frame=frame))
    held = len(trial.guesses)
    some = "" if len(shown) == held else f" {len(shown)} of them are shown."
    counts = (f"{count} of {name}" for name, count in zip(names, photographs.labels.bincount().tolist(), strict=True))
    parts: list[Part] = [
        verdict(photographs, trial),
        Bars(trial.accuracies),
        f"Held-out photographs recognised: the mean over {trial.splits} random choices of which to hold out. Nearest "
        "class mean and linear probe get the features that adaptation starts from; pixels is the nearest neighbour.",
        Heading("Held-out photographs"),
        f"Green: recognised. Red: taken for something else. {held} were held out.{some}",
        Gallery(shown, small=True),
        Heading("Take it away"),
        "The exported file has been adapted to all photographs, those held out above included.",
        Code(usage),
        Facts({**facts, "photographs": ", ".join(counts)}),
    ]
    return html(f"{len(names)} new things, {len(photographs.files)} photographs", parts)


def _thumbnail(file: Path) -> bytes:
    stream = io.BytesIO()
    image = upright(file.read_bytes(), THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(stream, "PNG")
    return stream.getvalue()
