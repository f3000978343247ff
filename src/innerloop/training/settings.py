"""Settings: one dataclass, of which the command line, a configuration file and a run folder are three faces."""

from __future__ import annotations

import inspect
import math
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import yaml

from innerloop.adapts import Adapts
from innerloop.choices import ADAPTS, INNER, META_GRADIENT, START, check_name, make
from innerloop.inner import InnerSolver
from innerloop.meta_gradient import MetaGradient
from innerloop.reporting import write_json
from innerloop.tasks import SOURCES
from innerloop.training.choices import MODEL, OPTIMIZER, SCHEDULE

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def option(
    default: Any, help: str, *, names: Iterable[str] = (), at_least: float = -math.inf, above: float = -math.inf
) -> Any:
    """A field of settings, with what the command line says about it and what it may be.

    Args:
        default: its value where none is given.
        help: one line for ``--help``.
        names: allowed names; arguments may follow a name behind a colon.
        at_least: smallest allowed number.
        above: number that it must exceed.
    """
    return field(default=default, metadata={"help": help, "names": tuple(names), "at_least": at_least, "above": above})


def _checked(each: Field[Any], hint: Any, value: Any) -> Any:
    kind, *other = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if other and value in (None, "none"):
        return None
    what, limits = flag(each.name), each.metadata
    try:
        value = _converted(kind, value)
    except (KeyError, ValueError):
        raise ValueError(f"{what} is {value!r}; it must be {KINDS[kind]}{' or none' if other else ''}") from None
    if limits["names"]:
        check_name(what, value.partition(":")[0], limits["names"])
    elif kind in (int, float) and not (value >= limits["at_least"] and value > limits["above"]):
        least = f"above {limits['above']}" if math.isfinite(limits["above"]) else f"{limits['at_least']} or more"
        raise ValueError(f"{what} is {value}; it must be {least}")
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
    text = path.read_text(encoding="utf-8")
    try:
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content or {}, Mapping):
        raise ValueError(f"{path} must hold settings by name, such as 'ways: 5'")
    values = {str(name).replace("-", "_"): value for name, value in (content or {}).items()}
    for name in values:
        check_name(f"{path}: the setting", flag(name), [flag(each.name) for each in fields(Settings)])
    return values


@dataclass(frozen=True)
class Settings:
    """All that ``innerloop train`` can be told. The defaults are the recipe of ``make train``.

    Each value is converted to its type and checked. Text is read as on a command line: ``"1e-3"`` is a number where
    one is wanted, and ``"none"`` is None where that is allowed. Ways, shots and queries that are None become those that
    the data set has by default.

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

    dataset: str = option("glyphs", "where tasks come from", names=SOURCES)
    data: str | None = option(None, "folder or file of a data set that is not downloaded or rendered")
    ways: int | None = option(None, "classes of a task; none: as the data set has it, 5 for images", at_least=2)
    shots: int | None = option(None, "support examples a class; none: 1 for images", at_least=1)
    queries: int | None = option(None, "query examples a class; none: 5 for images, enough to train on", at_least=1)
    rotations: bool | None = option(None, "omniglot: quarter turns of the training classes as further classes")
    class_split: str | None = option(None, "omniglot: background, 1200 or vinyals; folder: how classes are split")
    size: int | None = option(None, "folder: side of the images", at_least=1)
    channels: int | None = option(None, "folder: 1 for grey images, 3 for colour", at_least=1)

    model: str = option("conv4", "the model", names=MODEL)
    filters: int | None = option(None, "channels of the model's blocks (mlp: hidden units)", at_least=1)
    downsample: str | None = option(None, "conv4: how a block halves the image", names=("pool", "stride"))
    spatial_mean: bool | None = option(None, "conv4: average over positions instead of flattening")

    adapts: str = option("head", "what moves in the inner loop: blocks:00011, named:block4.*,head.*", names=ADAPTS)
    inner: str = option("learned-rates:layer-step", "how it moves: momentum:momentum=0.9, newton-cg", names=INNER)
    inner_lr: float = option(0.5, "inner rate", above=0)
    inner_steps: int = option(3, "inner steps in training; 0 with a start alone", at_least=0)
    test_steps: int | None = option(None, "inner steps in evaluation; none: as in training", at_least=0)
    weight_decay: float = option(0.0, "weight decay of the inner loop", at_least=0)
    proximal: float = option(0.0, "pull of the inner loop towards its start", at_least=0)
    meta_gradient: str = option("unrolled", "how the outer gradient is found: truncated:2", names=META_GRADIENT)
    start: str | None = option(None, "where the inner loop begins: ridge; none: at the model", names=START)
    start_from: str | None = option(None, "folder of another run, whose weights training begins with where they fit")
    carry: str = option(
        "none", "where a task begins: slot: where its place in the last batch ended", names=("none", "slot")
    )
    multi_step_loss: float | None = option(
        None, "anneal MAML++'s multi-step loss over so many outer steps, or, below 1, such a share of all", above=0
    )
    batch_norm: str = option("batch", "statistics of batch norm", names=("batch", "task", "frozen"))

    optimizer: str = option("adam", "outer optimiser: sgd:momentum=0.9", names=OPTIMIZER)
    outer_lr: float = option(3e-3, "outer rate", above=0)
    schedule: str = option("cosine", "outer rate over the steps: cosine:0.01 falls to a hundredth", names=SCHEDULE)
    steps: int = option(9000, "outer steps", at_least=1)
    tasks_per_batch: int = option(4, "tasks of an outer step", at_least=1)
    clip: float | None = option(10.0, "largest norm of the meta-gradient", above=0)
    validate_every: int = option(500, "outer steps between validations", at_least=1)
    validation_tasks: int = option(200, "tasks of a validation", at_least=1)
    patience: int | None = option(None, "stop after so many validations without a better one", at_least=1)
    minutes: float | None = option(None, "stop training after so many minutes", above=0)
    test_tasks: int = option(1000, "tasks of the final test", at_least=1)

    seed: int = option(0, "fixes tasks, first weights and all else that is random", at_least=0)
    device: str = option("auto", "auto takes a GPU where there is one", names=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads; none: what torch takes", at_least=1)
    precision: str = option("float32", "arithmetic", names=("float32", "float64", "bf16-autocast"))
    chunk_size: int | None = option(None, "tasks computed at once; fewer take less memory", at_least=1)
    compile: bool = option(False, "compile the meta-step: pays for small models and long runs")
    memory: int | None = option(None, "MiB for a meta-step; within it graphs are kept, which is faster", at_least=0)

    def __post_init__(self) -> None:
        hints = get_type_hints(Settings)
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, hints[each.name], getattr(self, each.name)))
        self.method()
        make("schedule", SCHEDULE, self.schedule)
        if self.start is not None:
            make("start", START, self.start)
        source = inspect.signature(SOURCES[self.dataset]).parameters
        for name in {"ways", "shots", "queries"} & source.keys():
            if getattr(self, name) is None:
                few = name == "queries" and "ways" in source
                object.__setattr__(self, name, 5 if few else source[name].default)

    def method(self) -> tuple[Adapts, InnerSolver, MetaGradient]:
        """What adapts, how it moves, and how the outer gradient is found.

        Raises:
            ValueError: arguments that the choices do not take, or out of range.
        """
        inner = {"test_steps": self.test_steps, "weight_decay": self.weight_decay, "proximal": self.proximal}
        return (
            make("adapts", ADAPTS, self.adapts),
            make("inner", INNER, self.inner, lr=self.inner_lr, steps=self.inner_steps, **inner),
            make("meta-gradient", META_GRADIENT, self.meta_gradient),
        )

    @property
    def multi_step_steps(self) -> int | None:
        """The outer steps over which the multi-step loss is annealed."""
        share = self.multi_step_loss
        return None if share is None else math.ceil(share * self.steps if share < 1 else share)

    def save(self, path: Path) -> None:
        """Write all settings as JSON, which ``--config`` reads as well."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Settings:
        """The settings that ``save`` wrote.

        Raises:
            ValueError: as `read_config`; or they are of the first edition, whose estimators brought terms of their own.
        """
        found = read_config(path)
        settings = cls(**found)
        name = settings.meta_gradient.partition(":")[0]
        brought = {"implicit": ("proximal weight 2", "proximal 2"), "memory-reduced": ("L2 term", "weight-decay 0.05")}
        if "carry" not in found and name in brought:
            what, option = brought[name]
            raise ValueError(
                f"{path} is of the first edition, in which {name} brought a {what} of its own; such a term is the "
                f"inner loop's now: train again with --{option}"
            )
        return settings
