"""From settings to the objects they name."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from innerloop.adapts._head import head_of
from innerloop.blocks import parameter_names
from innerloop.choices import make
from innerloop.learner import MetaLearner
from innerloop.tasks import SOURCES, Recurring, TaskSource
from innerloop.training.choices import MODEL, OPTIMIZER, SCHEDULE
from innerloop.training.code import PYTHON, build, is_code, load, short
from innerloop.training.health import fitting_rate
from innerloop.training.settings import AUTO, Settings, flag

SOURCE_OPTIONS = "data", "rotations", "class_split", "size", "channels", "group", "augment"  # what only some take
OF_LEARNER = "batch_norm", "start", "carry", "chunk_size", "compile", "products"  # which takes them by the same names
INK = "glyphs", "omniglot"  # image sets whose strokes are 1 on 0


def build_tasks(settings: Settings, splits: Iterable[str] = ("train", "validation", "test")) -> TaskSource:
    """The task source of the settings; a task of each split needed is drawn, so that what is wrong with it shows here.

    Raises:
        ValueError: an option that the source does not take, or too few classes or images for the tasks asked.
        OSError: the data is absent, or cannot be fetched.
    """
    own = is_code(settings.dataset)
    source = load(settings.dataset) if own else SOURCES[settings.dataset]
    taken = inspect.signature(source).parameters
    options: dict[str, Any] = {"seed": settings.seed} if "seed" in taken or not own else {}
    for name in ("ways", "shots", "queries", *SOURCE_OPTIONS):
        value, parameter = getattr(settings, name), name.removeprefix("class_")
        if value is not None and parameter not in taken:
            raise ValueError(f"{short(settings.dataset)} takes no {flag(name)}; leave it out")
        if value is not None:
            options[parameter] = value
    tasks = build("dataset", settings.dataset, options) if own else source(**options)
    if not isinstance(tasks, TaskSource):
        raise ValueError(
            f"dataset {short(settings.dataset)} gives {type(tasks).__name__}, no source of tasks: let it return "
            "il.tasks.arrays(...), il.tasks.dataset(...) or a subclass of il.tasks.TaskSource"
        )
    if settings.train_shots is not None and "train" in splits:
        tasks = tasks.with_train_shots(settings.train_shots)
    if settings.recurring is not None:
        tasks = Recurring(tasks, settings.recurring)
    for split in splits:
        tasks.batch(split, 0, 1)
    return tasks


def build_learner(settings: Settings, shape: tuple[int, ...], outputs: int, regression: bool = False) -> MetaLearner:
    """The learner of the settings for inputs of a shape, on its device; its first weights are fixed by the seed.

    Raises:
        ValueError: choices that are unknown, out of range or do not fit each other.
    """
    torch.manual_seed(settings.seed)
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    model = build_model(settings, shape, outputs)
    if isinstance(model, MetaLearner):
        if settings.adapts != PYTHON:
            what = f"{short(settings.model)} gives a whole learner where a model is asked for"
            raise ValueError(f"{what}: let it return the nn.Module; to train a learner, call il.fit in Python")
        return model.to(choose_device(settings), dtype)
    if settings.adapts == PYTHON:
        raise ValueError(
            f"the run's choices or its loss have no text, and {short(settings.model)} gives a model alone: let it "
            "return the whole il.MetaLearner"
        )
    if settings.weights:
        load_pretrained(model, Path(settings.weights))
    learner = MetaLearner(
        model,
        *settings.method(),
        F.mse_loss if regression else F.cross_entropy,
        memory=None if settings.memory is None else settings.memory * 2**20,
        **{name: getattr(settings, name) for name in OF_LEARNER},
    )
    return learner.to(choose_device(settings), dtype)


def with_inner_rate(settings: Settings, tasks: TaskSource) -> Settings:
    """The settings with a number as inner rate, which is measured where it is auto.

    Raises:
        ValueError: as `build_learner` and `innerloop.training.health.fitting_rate`.
    """
    if settings.inner_lr != AUTO:
        return settings
    learner = build_learner(settings, tasks.input_shape, tasks.output_size, regression=tasks.ways is None)
    with arithmetic(settings):
        return replace(settings, inner_lr=fitting_rate(learner, tasks))


def build_model(settings: Settings, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The model of the settings for inputs of a shape; code of the user's own may give a whole learner instead.

    Such code is offered ``ways`` (also as ``outputs`` and ``num_classes``), ``shape``, ``channels`` (also as
    ``in_channels``) and ``size``, and given those that it takes.

    Raises:
        ValueError: an unknown model, options that it does not take, or code that fails or gives something else.
    """
    options = {name: getattr(settings, name) for name in ("filters", "downsample", "spatial_mean", "context")}
    if not is_code(settings.model):
        return make("model", MODEL, settings.model, shape, outputs, **options)
    offered: dict[str, Any] = dict.fromkeys(("ways", "outputs", "num_classes"), outputs) | {"shape": shape}
    if len(shape) == 3:
        offered |= {"channels": shape[0], "in_channels": shape[0], "size": shape[-1]}
    model = build("model", settings.model, offered, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {short(settings.model)} gives {type(model).__name__}: let it return an nn.Module")
    return model


def load_pretrained(model: nn.Module, file: Path) -> None:
    """Give a model the weights of a safetensors file, by name; a head that fits no weight there stays as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or something beside the head finds no weight of its name and shape.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        found = load_file(file)  # others write no checksum
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or damaged: {' '.join(str(error).split())}") from error
    own = model.state_dict()
    fits = {name: value for name, value in found.items() if name in own and value.shape == own[name].shape}
    lacking = set(own) - set(fits)
    if lacking:
        odd = sorted(lacking - set(parameter_names(model, head_of(model))))
        if odd or not fits:
            raise ValueError(
                f"{file} has no weights of name and shape for {some(odd or sorted(lacking))} of "
                f"{type(model).__name__}; it has {some(sorted(set(found) - set(fits)))}: rename them in the file"
            )
    model.load_state_dict(fits, strict=False)
    new = f"; {some(sorted(lacking))} begin anew" if lacking else ""
    logging.getLogger("innerloop").info("%d of %d weights are those of %s%s", len(fits), len(own), file, new)


def some(names: list[str]) -> str:
    """The first few of some names."""
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none other"


def build_optimizer(settings: Settings, learner: MetaLearner) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The outer optimiser of the settings and the schedule of its rate."""
    optimizer: torch.optim.Optimizer = make(
        "optimizer", OPTIMIZER, settings.optimizer, learner.parameters(), lr=settings.outer_lr
    )
    factor = make("schedule", SCHEDULE, settings.schedule)
    return optimizer, LambdaLR(optimizer, lambda step: factor(step / settings.steps))


def build_outer(settings: Settings, learner: MetaLearner) -> dict[str, Any]:
    """What `fit` and `replay` are told of the outer loop."""
    optimizer, scheduler = build_optimizer(settings, learner)
    return dict(
        optimizer=optimizer,
        scheduler=scheduler,
        tasks_per_batch=settings.tasks_per_batch,
        clip=settings.clip,
        multi_step_loss=settings.multi_step_steps,
        first_order=settings.first_order_steps,
        seed=settings.seed,
    )


def choose_device(settings: Settings) -> torch.device:
    """The device of the settings; among several GPUs each process of a node takes its own, unless one is named.

    Raises:
        ValueError: a GPU is asked for that is not there, or one of them for several processes.
    """
    kind, _, number = settings.device.partition(":")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise ValueError(f"device is {settings.device!r} but torch finds no GPU here: choose --device cpu")
    if not number:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % there)
    if number not in map(str, range(there)):
        raise ValueError(f"device is {settings.device!r} but there are {there} GPUs here, counted from 0")
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"device is {settings.device!r} for several processes: give cuda, so that each takes its own")
    return torch.device("cuda", int(number))


def choose_threads(trial: Callable[[], object], most: int) -> int:
    """Set how many CPU threads compute: all that are free, where they halve the time of a trial; otherwise one.

    Threads of one operation wait for each other, spinning. Beside other work two can be a hundred times slower than
    one, and on small convolutions they gain little at best. What ``OMP_NUM_THREADS`` says is taken.

    Args:
        trial: what is timed.
        most: how many torch would take, by the cores that this process may use.
    """
    free = most - round(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        trial()  # the first call of each sets up its own
        began = time.perf_counter()
        trial()
        return time.perf_counter() - began

    chosen = 1
    if "OMP_NUM_THREADS" in os.environ:
        chosen = most
    elif free > 1 and seconds(1) > 2 * seconds(free):
        chosen = free
    torch.set_num_threads(chosen)
    return chosen


def arithmetic(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """The context in which the learner of the settings computes: their threads, from here on, and bfloat16 or not."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.precision == "bf16-autocast":
        return torch.autocast(choose_device(settings).type, torch.bfloat16)
    return contextlib.nullcontext()
