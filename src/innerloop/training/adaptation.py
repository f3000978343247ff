"""A trained learner at work: image files in, predictions and an adapted model out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from innerloop.few_shot import scores
from innerloop.learner import MetaLearner
from innerloop.reporting import write_json
from innerloop.tasks._files import Files, read_bytes
from innerloop.tasks._images import split_folders
from innerloop.tasks._pictures import decode, is_image
from innerloop.training.build import INK, build_model
from innerloop.training.checkpoints import load_weights, save_weights
from innerloop.training.code import check_known, is_code
from innerloop.training.settings import Settings

WEIGHTS, NOTES = "adapted.safetensors", "adapted.json"


def labelled_images(folder: Path) -> list[tuple[Path, str | None]]:
    """The image files below a folder, as training lists them: each with the sub-folder that it is in, or None.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: its folders are splits of classes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    files = [name for name in Files(folder).stamps if is_image(name)]
    if splits := split_folders(files):
        raise ValueError(f"{folder} holds {', '.join(splits)}, each with classes of its own: name one of them")
    names = map(Path, files)
    return [(folder / name, name.parts[0] if len(name.parts) > 1 else None) for name in sorted(names)]


def read_images(files: Sequence[Path], shape: Sequence[int], invert: bool | None) -> Tensor:
    """Images as a learner is given them: ``[images, *shape]``, float32 in [0, 1].

    The largest centred square is cut out and resized, and turned to grey or colour, as the data sets are read.

    Args:
        files: at least one file of a format that Pillow reads.
        shape: channels, height, width.
        invert: turn light into dark; None does so to an image whose rim is light (its median above a half), as that of
            writing on paper is.

    Raises:
        ValueError: a file cannot be read as an image.
    """
    images = []
    for file in files:
        try:
            images.append(as_input(read_bytes(file), shape, invert))
        except Exception as error:  # a damaged image makes Pillow's decoders raise nearly anything
            raise ValueError(f"cannot read the image {file} ({error}); repair it or leave it out") from error
    return torch.stack(images)


def as_input(content: bytes, shape: Sequence[int], invert: bool | None) -> Tensor:
    """The image in a file's bytes, ``[*shape]``, as `read_images` gives it.

    Raises:
        Exception: Pillow cannot read it.
    """
    channels, size, _ = shape
    pixels = decode(content, size, channels)
    rim = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=None)
    dark = np.median(rim) < 128 if invert is None else not invert
    return torch.tensor(pixels if dark else 255 - pixels).float() / 255


def inverts(settings: Settings, choice: str) -> bool | None:
    """For `read_images`: "auto" looks at each image where the training data has ink as 1, else leaves them alone."""
    if choice == "auto":
        return None if settings.dataset in INK else False
    return choice == "yes"


def predict(model: nn.Module, images: Tensor, together: bool = False) -> Tensor:
    """Class probabilities ``[images, classes]`` on the CPU.

    Args:
        model: what ``MetaLearner.adapt`` returned, or `load_adapted`.
        images: as `read_images` gives them.
        together: as one batch, whose statistics batch norm takes; needed for a model that was adapted for that.
    """
    like = next(model.parameters())
    with torch.no_grad():
        parts = [images] if together else images.split(64)
        return torch.cat([scores(model(part.to(like.device, like.dtype))).softmax(-1).cpu() for part in parts])


def save_adapted(folder: Path, model: nn.Module, settings: Settings, notes: dict[str, Any]) -> None:
    """Write an adapted model: its weights as safetensors, the settings and whatever its use needs to know as JSON."""
    save_weights(folder / WEIGHTS, model.state_dict())
    write_json(folder / NOTES, {**notes, "settings": asdict(settings)})


def load_adapted(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """An adapted model that ``innerloop adapt`` wrote, in evaluation mode on the CPU, and its notes.

    Args:
        folder: the ``--out`` of the command.

    Returns:
        A plain module that maps images ``[images, *input_shape]``, float32 in [0, 1], to scores ``[images, classes]``;
        and what its use needs to know: ``classes``, ``input_shape``, ``invert``, ``settings`` and more.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: a file is damaged.

    Example:
        >>> model, notes = il.load_adapted("RUN/adapted")
        >>> images = read_images([Path("new.jpg")], notes["input_shape"], notes["invert"])
        >>> [notes["classes"][label] for label in model(images).argmax(-1)]
    """
    folder = Path(folder)
    weights, _ = load_weights(folder / WEIGHTS)
    notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    settings = Settings(**notes["settings"])
    if is_code(settings.model):
        check_known(folder, {"model": settings.model})
    model = build_model(settings, tuple(notes["input_shape"]), len(notes["classes"]))
    model = model.model if isinstance(model, MetaLearner) else model
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" not in weights:
            # Adapted for prediction of queries together: batch norm has no statistics of its own.
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            module.num_batches_tracked = None
    model.load_state_dict(weights)
    return model.eval(), notes
