"""Settings: one dataclass, of which the command line, a configuration file and a run folder are three faces."""

from __future__ import annotations

import inspect
import math
import re
import sys
import tomllib
import types
from collections.abc import Collection, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import yaml

from innerloop.adapts import Adapts
from innerloop.choices import ADAPTS, INNER, META_GRADIENT, START, check_name, make, text
from innerloop.engine import ENGINES
from innerloop.inner import InnerSolver
from innerloop.meta_gradient import MetaGradient
from innerloop.reporting import write_json
from innerloop.tasks import SOURCES
from innerloop.training.choices import MODEL, OPTIMIZER, SCHEDULE, interval, most_skips
from innerloop.training.code import PYTHON, absolute, is_code

SETTINGS = "settings.json"
OF_PYTHON = "dataset", "model", "adapts"  # what a run made in Python may have no text for; the last, any other choice
AUTO = "auto"
TERMS = "test_steps", "weight_decay", "proximal"  # of the inner solver
STARTS = (AUTO, *START)
NEEDED = (
    "dataset", "model", "adapts", "inner", "inner_lr", "inner_steps", "meta_gradient", "batch_norm", "optimizer",
    "outer_lr", "steps", "tasks_per_batch", "seed",
)  # fmt: skip
"""Without which a run's settings are no longer those of the run; others came later, and have defaults."""
TUNED = dict.fromkeys(("glyphs", "omniglot", "cifar_fs", "fc100"), 0.1)  # inner rates; on all others it is measured
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def option(
    default: Any,
    help: str,
    otherwise: str = "",
    *,
    names: Collection[str] = (),
    code: bool = False,
    arguments: bool = False,
    at_least: int | None = None,
    at_most: float = sys.float_info.max,
) -> Any:
    """A field of settings, with what the command line says about it and what it may be.

    Args:
        default: its value where none is given.
        help: one line for ``--help``.
        otherwise: in words, what holds where the default is None.
        names: allowed names.
        code: a function of the user's own will do as well, ``file.py:name``.
        arguments: a name may have a colon behind it, and more.
        at_least: smallest allowed number; None is 1 for a whole number, and for another all above 0.
        at_most: largest allowed number.
    """
    return field(default=default, metadata=locals())


def _checked(each: Field[Any], hint: Any, value: Any) -> Any:
    kind, *other = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if other and value in (None, "none"):
        return None
    if str in other and value == AUTO:
        return value
    what, limits = flag(each.name), each.metadata
    try:
        value = _converted(kind, value)
    except (KeyError, ValueError, OverflowError):
        allowed = ", auto or none" if str in other else " or none" if other else ""
        raise ValueError(f"{what} is {value!r}; it must be {KINDS[kind]}{allowed}") from None
    if value == PYTHON and each.name in OF_PYTHON:
        return value
    if limits["code"] and value.partition(":")[0] not in limits["names"] and is_code(value):
        return absolute(value)
    if limits["names"]:
        check_name(what, value.partition(":")[0] if limits["arguments"] else value, limits["names"])
    elif kind in (int, float):
        least = 1 if kind is int and limits["at_least"] is None else limits["at_least"]
        if not (value > 0 if least is None else value >= least):
            raise ValueError(f"{what} is {value}; it must be {'above 0' if least is None else f'{least} or more'}")
        if value > limits["at_most"]:
            raise ValueError(f"{what} is too large a number; it must be {limits['at_most']:g} or less")
    return value


def _converted(kind: type, value: Any) -> Any:
    if isinstance(value, str):
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError
    return value


def flag(name: str) -> str:
    """A field's name as it is typed, without the dashes in front."""
    return name.replace("_", "-")


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML, JSON or TOML file, by field; names may be written with dashes or underscores.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be parsed, or names a setting that there is not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --config takes a YAML, JSON or TOML file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Loader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not content:
        raise ValueError(f"{path} is empty; leave it out, or write settings by name, such as 'ways: 5'")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold settings by name, such as 'ways: 5'")
    values: dict[str, Any] = {}
    for each, value in content.items():
        name = str(each).replace("-", "_")
        check_name(f"{path}: the setting", flag(name), [flag(each.name) for each in fields(Settings)])
        if name in values:
            raise ValueError(f"{path}: {flag(name)} is set twice; set it once")
        values[name] = value
    return values


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Plain values alone, as `yaml.SafeLoader`, which takes the last of a setting's values without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"{twice[0]} is set twice; set it once")
        return dict(super().construct_mapping(node, deep))


def typed(adapts: Adapts, inner: InnerSolver, meta_gradient: MetaGradient) -> dict[str, Any]:
    """The settings of which `Settings.method` makes these three.

    Raises:
        ValueError: one of them has no text.
    """
    terms = {name: getattr(inner, name) for name in TERMS}
    chosen = {"adapts": text(adapts), "inner": text(inner), "meta_gradient": text(meta_gradient)}
    return {**chosen, "inner_lr": inner.lr, "inner_steps": inner.steps, **terms}


@dataclass(frozen=True)
class Settings:
    """All that ``innerloop train`` can be told. The defaults are the recipe of ``make train``.

    Each value is converted to its type and checked. Text is read as on a command line: ``"1e-3"`` is a number where
    one is wanted, and ``"none"`` is None where that is allowed. Ways, shots, queries and inner rate that are None
    become those that the data set has by default. An inner rate of ``"auto"`` is measured when training begins.

    Raises:
        ValueError: a value of another type, an unknown name, or a number out of range.
    """

    GROUPS: ClassVar = {
        "dataset": "tasks",
        "model": "model",
        "adapts": "method",
        "optimizer": "outer loop",
        "seed": "machine",
    }
    """The first field of each group, for ``--help``."""

    dataset: str = option("glyphs", "where tasks come from, or your own: file.py:name", names=SOURCES, code=True)
    data: str | None = option(None, "folder or file of a data set", "what is rendered, downloaded or cached")
    ways: int | None = option(None, "classes of a task", "5 for images", at_least=2)
    shots: int | None = option(None, "support examples: of a class, or in all for regression", "1 for images")
    train_shots: int | None = option(None, "support examples of a class in training alone", "as in evaluation")
    queries: int | None = option(None, "query examples, likewise", "5 for images")
    recurring: int | None = option(None, "how many training tasks come again and again", "ever new ones")
    rotations: bool | None = option(None, "omniglot: quarter turns of the training classes as further classes", "false")
    class_split: str | None = option(
        None, "omniglot: background, 1200 or vinyals; folder: how classes are split", "background; 0.6,0.2,0.2"
    )
    size: int | None = option(None, "folder: side of the images", "as they are, at most 84", at_most=4096)
    channels: int | None = option(None, "folder: 1 for grey images, 3 for colour", "3")

    group: str | None = option(
        None, "folder: what is never in support and query: a regular expression, FILE.csv:COLUMN", "every image alone"
    )
    augment: str | None = option(None, "pictures: flip, crop or flip,crop of training images; none", "no change")

    model: str = option(
        "conv4", "the model, or your own: file.py:name, package.module:name", names=MODEL, arguments=True, code=True
    )
    weights: str | None = option(None, "safetensors file of pretrained weights", "first weights by the seed")
    filters: int | None = option(None, "channels of the blocks (mlp: hidden units)", "conv4 32, resnet12 64, mlp 40")
    downsample: str | None = option(
        None, "conv4: how a block halves the image", "stride for grey images, pool for colour", names=("pool", "stride")
    )
    spatial_mean: bool | None = option(None, "conv4: average over positions instead of flattening", "false")
    context: int | None = option(None, "conv4, mlp: size of the context vector that CAVIA adapts", "no such vector")

    adapts: str = option(
        "head", "what moves in the inner loop: blocks:00011, named:block4.*, lora:8", names=ADAPTS, arguments=True
    )
    inner: str = option("sgd", "how it moves: learned-rates:layer-step, newton-cg", names=INNER, arguments=True)
    inner_lr: float | str | None = option(
        None, "inner rate; auto: one over the measured curvature", f"0.1 for {', '.join(TUNED)}, else auto"
    )
    inner_steps: int = option(5, "inner steps in training; 0 with a start alone", at_least=0)
    test_steps: int | None = option(None, "inner steps in evaluation", "as in training", at_least=0)
    weight_decay: float = option(0.0, "weight decay of the inner loop", at_least=0)
    proximal: float = option(0.0, "pull of the inner loop towards its start", at_least=0)
    meta_gradient: str = option(
        "unrolled", "how the outer gradient is found: truncated:2", names=META_GRADIENT, arguments=True
    )
    start: str | None = option(
        AUTO,
        "where the inner loop begins; auto: a head at prototypes",
        "at the model",
        names=STARTS,
        arguments=True,
    )
    start_from: str | None = option(None, "run whose weights training begins with, where they fit", "fresh weights")
    carry: str = option(
        "none", "begin where the task in this place (slot), or the task, was left", names=("none", "slot", "task")
    )
    multi_step_loss: float | None = option(
        None, "outer steps, or below 1 a share, over which MAML++'s multi-step loss is annealed", "not used"
    )
    first_order: float | None = option(
        None, "outer steps, or below 1 a share, that begin with the first-order meta-gradient", "not used"
    )
    batch_norm: str = option(
        "batch", "batch norm: its statistics, or step: scales a step", names=("batch", "task", "frozen", "step")
    )

    optimizer: str = option("adam", "outer optimiser: sgd:momentum=0.9", names=OPTIMIZER, arguments=True)
    outer_lr: float = option(3e-3, "outer rate")
    schedule: str = option("cosine", "outer rate: cosine:0.01 falls to a hundredth", names=SCHEDULE, arguments=True)
    steps: int = option(9000, "outer steps")
    tasks_per_batch: int = option(4, "tasks of an outer step")
    clip: float | None = option(10.0, "largest norm of the meta-gradient")
    validate_every: int = option(500, "outer steps between validations")
    validation_tasks: int = option(200, "tasks of a validation")
    patience: int | None = option(None, "stop after so many validations without a better one", "never")
    minutes: float | None = option(None, "of training; the schedule runs over them", "until all steps are done")
    test_tasks: int = option(1000, "tasks of the final test")
    on_nonfinite: str = option("stop", "at a loss that is not finite; skip:N leaves out at most N batches in a row")
    checkpoint_every: str = option("10m", "steps, such as 500, or time, such as 90s, between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")

    seed: int = option(0, "fixes tasks, first weights and all else that is random", at_least=0, at_most=2**63 - 1)
    device: str = option("auto", "cpu, cuda, or one of several GPUs, cuda:1; auto takes a GPU where there is one")
    threads: int | None = option(None, "CPU threads", "1, or all that are free where much faster", at_most=1024)
    precision: str = option("float32", "arithmetic", names=("float32", "float64", "bf16-autocast"))
    chunk_size: int | None = option(None, "tasks computed at once; fewer take less memory", "by the bytes of a task")
    products: str = option("auto", "how gradients and curvature products are computed", names=ENGINES)
    compile: bool = option(False, "compile the meta-step: pays for small models and long runs")
    memory: int | None = option(
        None, "MiB for a meta-step, by graphs kept, which is faster", "1024; of a GPU half of what is free", at_least=0
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(Settings)
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, hints[each.name], getattr(self, each.name)))
        if self.inner_lr is None:
            object.__setattr__(self, "inner_lr", TUNED.get(self.dataset, AUTO))
        if self.adapts != PYTHON:
            self.method()
        make("schedule", SCHEDULE, self.schedule)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device {self.device!r} is unknown: choose auto, cpu, cuda, or one GPU, such as cuda:1")
        most_skips(self.on_nonfinite)
        interval(self.checkpoint_every)
        if self.carry == "task" and self.recurring is None and self.dataset in SOURCES:
            raise ValueError("carry 'task' needs tasks that come again: give --recurring 100, or --carry slot")
        source = inspect.signature(SOURCES[self.dataset]).parameters if self.dataset in SOURCES else {}
        if self.start == AUTO:
            plain = (self.adapts, self.inner, self.meta_gradient, self.carry) == ("head", "sgd", "unrolled", "none")
            object.__setattr__(self, "start", "prototypes" if plain and "ways" in source else None)
        if self.start is not None:
            make("start", START, self.start)
        for name in {"ways", "shots", "queries"} & source.keys():
            if getattr(self, name) is None:
                few = name == "queries" and "ways" in source
                object.__setattr__(self, name, 5 if few else source[name].default)

    def method(self) -> tuple[Adapts, InnerSolver, MetaGradient]:
        """What adapts, how it moves, and how the outer gradient is found.

        Raises:
            ValueError: arguments that the choices do not take, or out of range.
        """
        rate = 1.0 if self.inner_lr == AUTO else self.inner_lr  # of a learner by which it is measured
        inner = {name: getattr(self, name) for name in TERMS}
        return (
            make("adapts", ADAPTS, self.adapts),
            make("inner", INNER, self.inner, lr=rate, steps=self.inner_steps, **inner),
            make("meta-gradient", META_GRADIENT, self.meta_gradient),
        )

    @property
    def multi_step_steps(self) -> int | None:
        """The outer steps over which the multi-step loss is annealed."""
        return self._outer_steps(self.multi_step_loss)

    @property
    def first_order_steps(self) -> int | None:
        """The outer steps whose meta-gradient is first-order."""
        return self._outer_steps(self.first_order)

    def _outer_steps(self, share: float | None) -> int | None:
        return None if share is None else math.ceil(share * self.steps if share < 1 else share)

    def save(self, path: Path) -> None:
        """Write all settings as JSON, which ``--config`` reads as well."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Settings:
        """The settings that ``save`` wrote.

        Raises:
            ValueError: as `read_config`; some are missing; or they are of the first edition, whose implicit estimators
                brought a term of their own.
        """
        found = read_config(path)
        if missing := [flag(name) for name in NEEDED if name not in found]:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: it is damaged; restore it, or train in another folder"
            )
        if "carry" not in found and str(found["meta_gradient"]).startswith(("implicit", "memory-reduced")):
            raise ValueError(
                f"{path} is of the first edition, whose {found['meta_gradient']} brought a term that is the inner "
                "loop's now: train again, with --proximal 2 or --weight-decay 0.05"
            )
        return cls(**found)
