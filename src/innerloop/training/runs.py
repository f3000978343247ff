"""The run folder: its settings, its weights, its results and what they were measured with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from innerloop.files import PARTIAL
from innerloop.learner import MetaLearner
from innerloop.reporting import provenance, write_json
from innerloop.training.build import build_learner, some
from innerloop.training.checkpoints import load_weights
from innerloop.training.code import PYTHON, check_known, is_code, remember, short
from innerloop.training.settings import AUTO, SETTINGS, Settings, flag, read_config
from innerloop.training.store import BEST, LOCK, load_newest

RESULTS, ACCURACIES, OPEN = "results.json", "test.safetensors", "open.json"

SHIPPED = Path(__file__).parents[1] / "weights"
"""Small runs that come with the package: their settings, weights and results."""


def shipped_runs() -> list[str]:
    """The names of the runs that come with the package, as a command line takes them."""
    return sorted(f"shipped:{folder.name}" for folder in SHIPPED.iterdir())


def run_folder(name: str) -> Path:
    """The folder of a run, named by its path or as ``shipped:photos``."""
    return SHIPPED / name.removeprefix("shipped:") if name in shipped_runs() else Path(name)


def is_shipped(run: Path) -> bool:
    """Whether a run is one that comes with the package, where nothing is to be written."""
    return run.parent == SHIPPED


def keep_open(folder: Path, settings: Settings) -> None:
    """Write which settings a new run's command leaves open, some of which are measured then."""
    write_json(folder / OPEN, {name: value for name, value in asdict(settings).items() if value in (None, AUTO)})


def is_run_of(folder: Path, settings: Settings) -> bool:
    """Whether a folder holds the run of these very settings, whatever was measured for what they leave open.

    So a command that a scheduler or ``torchrun --max-restarts`` gives again goes on.

    Raises:
        ValueError: it holds a run of others.
    """
    if not (folder / SETTINGS).exists():
        return False
    was = asdict(read_run(folder))
    left_open = read_config(folder / OPEN) if (folder / OPEN).exists() else was  # earlier versions did not tell
    for name, value in asdict(settings).items():
        if value != was[name] and not (name in left_open and value in (None, AUTO)):
            raise ValueError(
                f"{folder} already holds a run, whose {flag(name)} is {was[name]}, not {value}; go on with --resume "
                f"{folder}, or name another --out"
            )
    return True


def new_folder(folder: Path) -> None:
    """Make a run folder.

    Raises:
        ValueError: it already holds a run, or something else.
    """
    if (folder / SETTINGS).exists():
        raise ValueError(f"{folder} already holds a run; go on with --resume {folder}, or name another --out")
    if folder.exists():
        others = not folder.is_dir() or [file for file in folder.iterdir() if file.suffix != PARTIAL]
        if others and others != [folder / LOCK]:
            raise ValueError(f"{folder} holds something that is not a run; name a new folder with --out")
    folder.mkdir(parents=True, exist_ok=True)


def read_run(folder: Path, given: Mapping[str, Any] | None = None, tasks: bool = True) -> Settings:
    """The settings of a run.

    Code that they name, a model or tasks of the user's own, is what the user has once typed to a command, unchanged.

    Args:
        folder: of the run.
        given: settings that were typed and win over the run's.
        tasks: whether tasks will be drawn, or the model alone is needed.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: code that the user has not typed, or, of a run made in Python, a model or tasks without a text.
    """
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} is no run folder (no {SETTINGS}); name one that innerloop train has written")
    settings = replace(Settings.load(folder / SETTINGS), **given or {})
    kind = "the whole il.MetaLearner" if settings.adapts == PYTHON else "the nn.Module"
    gives = {"model": f"a function that returns {kind}", "dataset": "a data set, or a function that returns a source"}
    code: dict[str, str] = {}
    for name in ("model", "dataset") if tasks else ("model",):
        text = getattr(settings, name)
        if text == PYTHON:
            raise ValueError(
                f"{folder} was made in Python, and its {name} has no text: add --{name} path/to/file.py:name, "
                f"{gives[name]}"
            )
        if is_code(text) and name in (given or {}):
            remember(text)
        elif is_code(text):
            code[name] = text
    check_known(folder, code)
    return settings


def load_learner(folder: Path, settings: Settings, outputs: int | None = None) -> tuple[MetaLearner, dict[str, Any]]:
    """The learner of a run with its best weights, in evaluation mode, from the run folder alone.

    A learner for another number of classes than in training gets another head: every row of it, and every learned
    rate of a row, is the mean of the trained rows. Trained rows differ little, since labels are drawn at random; from
    equal rows the inner loop starts without a preference for any class (as in UNICORN-MAML, Ye and Chao, arXiv
    2106.16245). A head that the inner loop leaves alone is for the classes of training.

    Args:
        folder: of the run.
        settings: the run's, or the run's with other test steps or another device.
        outputs: what the learner must return for one example; None for as many numbers as in training.

    Returns:
        The learner, and what it was trained for: ``input_shape``, ``output_size``, ``ways`` (None for regression),
        ``step``, and ``head``, how the trained head is used.

    Raises:
        FileNotFoundError: the run has not been validated yet.
        ValueError: the weights are damaged or of another model, or the head cannot be fitted to so many outputs.
    """
    if not (folder / BEST).is_file():
        raise FileNotFoundError(f"{folder} has no {BEST} yet; go on with innerloop train --resume {quote(str(folder))}")
    try:
        weights, trained = load_weights(folder / BEST)
    except ValueError as error:
        states = load_newest(folder) or {}  # checkpoints hold the best weights too
        if not states.get("best"):
            raise
        warnings.warn(f"{error}; the best weights are taken from the checkpoint", stacklevel=2)
        weights, trained = states["best"], states["best_notes"]
    trained["head"] = "the trained head is used as it is"
    ways, shape = trained["output_size"], tuple(trained["input_shape"])
    settings = replace(settings, weights=None)  # those of the run take their place
    learner = build_learner(settings, shape, outputs or ways, regression=trained["ways"] is None)
    own = learner.state_dict()
    which = f"model {short(settings.model)}" if is_code(settings.model) else SETTINGS
    if odd := sorted(set(weights) ^ set(own)):
        raise ValueError(f"{folder / BEST} does not fit {which}: only one of them has {some(odd)}")
    if changed := {name: own[name] for name, value in weights.items() if value.shape != own[name].shape}:
        same = outputs in (None, ways)
        if same and all(name.startswith("rates.") for name in changed):
            raise ValueError(f"{folder} has learned rates for its own inner steps alone; leave --inner-steps out")
        for name, tensor in changed.items():
            if same or tensor.shape[1:] != weights[name].shape[1:]:  # more than another number of classes
                shapes = f"{list(weights[name].shape)} in the one and {list(tensor.shape)} in the other"
                raise ValueError(f"{folder / BEST} does not fit {which}: {name} is {shapes}")
        if all(name.startswith("rates.") or name.removeprefix("model.") in learner.adapted for name in changed):
            weights |= {name: weights[name].mean(0).expand_as(tensor) for name, tensor in changed.items()}
            trained["head"] = (
                f"trained on {ways} classes; each of {outputs} starts from the mean of the trained head's rows"
            )
        else:
            raise ValueError(f"{folder} does not adapt its head: give {ways} classes, not {outputs}")
    if (start := learner.few_shot.start) is not None:
        named = settings.start or type(start).__name__
        trained["head"] = f"the head begins at what the support set gives: start {named}"
    learner.load_state_dict(weights)
    return learner.eval(), trained


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, with their provenance, whole or not at all."""
    write_json(path, results | provenance())
