"""What can be chosen by a short string such as ``truncated:2``: one table a choice, one row a name.

Behind the colon come the arguments of what the name stands for, separated by commas, by place or as ``name=value``:
``blocks:00011``, ``named:block4.*,head.*``, ``implicit:iterations=5``.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import torch

from innerloop.adapts import Adapts, Blocks, Body, Everything, Head, LoRA, Named
from innerloop.inner import ALFA, SGD, Adam, AdamW, InnerSolver, LearnedRates, Momentum, NewtonCG
from innerloop.linear import CG, Neumann
from innerloop.meta_gradient import (
    MOML,
    SAMA,
    Binomial,
    EvolutionStrategies,
    FirstOrder,
    ForwardGradient,
    Implicit,
    LocalMOML,
    MemoryReduced,
    MetaGradient,
    MetaRKHS,
    Mixed,
    Penalty,
    ReleasedIMAML,
    Reptile,
    Supervised,
    Truncated,
    Unrolled,
    Window,
)
from innerloop.start import Prototypes, Ridge, Start

Table = Mapping[str, Callable[..., Any]]


def blocks(pattern: str, batch_norm: bool = True, parts: str = "") -> Blocks:
    """``Blocks``, so that a table can be typed, ``blocks:11111/00011``: a row for each inner step.

    So can be the names of parts, ``blocks:001,parts=stem/body/head``.
    """
    rows = pattern.split("/")
    return Blocks(rows if len(rows) > 1 else pattern, batch_norm, tuple(parts.split("/")) if parts else ())


def learned_rates(per: str = "parameter", **options: Any) -> LearnedRates:
    """``LearnedRates``, so that ``learned-rates:layer-step`` can be typed."""
    return LearnedRates(per=per, **options)  # type: ignore[arg-type]  # an unknown one is refused there


def adam(beta1: float = 0.9, beta2: float = 0.999, **options: Any) -> Adam:
    """``Adam``, so that ``adam:beta1=0`` can be typed."""
    return Adam(betas=(beta1, beta2), **options)


def adamw(beta1: float = 0.9, beta2: float = 0.999, **options: Any) -> AdamW:
    """``AdamW``, likewise."""
    return AdamW(betas=(beta1, beta2), **options)


def implicit(iterations: int = 5, damping: float = 0.0) -> Implicit:
    """``Implicit`` with so many iterations of conjugate gradient."""
    return Implicit(CG(iterations, damping))


def released_imaml(proximal: float = 2.0, iterations: int = 5, damping: float = 1.0) -> ReleasedIMAML:
    """``ReleasedIMAML`` with so many iterations of conjugate gradient."""
    return ReleasedIMAML(proximal, CG(iterations, damping))


def memory_reduced(iterations: int = 20) -> Implicit:
    """``MemoryReduced`` with so many iterations of conjugate gradient."""
    return MemoryReduced(CG(iterations))


def t1_t2(step: float = 1.0) -> Implicit:
    """T1-T2 (Luketina et al., arXiv 1511.06727): ``Implicit`` with ``step`` times the identity for the inverse."""
    return Implicit(Neumann(1, step))


def darts(epsilon: float = 0.01) -> SAMA:
    """``SAMA`` around the parameters before the last step."""
    return SAMA(epsilon, "step")


def pes(pairs: int = 8, sigma: float = 0.01, most: int = 1000) -> EvolutionStrategies:
    """``EvolutionStrategies`` whose particles persist."""
    return EvolutionStrategies(pairs, sigma, True, most)


def mixed(*unweighted: str, **weights: str) -> Mixed:
    """``Mixed``, typed as ``mixed:1=0.2,5=0.8``: horizons and their weights."""
    try:
        if unweighted or not weights:
            raise ValueError
        shares = {int(horizon): float(weight) for horizon, weight in weights.items()}
    except ValueError:
        given = [*unweighted, *(f"{horizon}={weight}" for horizon, weight in weights.items())]
        raise ValueError(f"mixed takes horizon=weight, as in mixed:1=0.2,5=0.8, not {','.join(given)!r}") from None
    return Mixed(tuple(shares), tuple(shares.values()))


ADAPTS: Table = {"everything": Everything, "head": Head, "body": Body, "blocks": blocks, "named": Named, "lora": LoRA}
INNER: Table = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": adam,
    "adamw": adamw,
    "learned-rates": learned_rates,
    "alfa": ALFA,
    "newton-cg": NewtonCG,
}
META_GRADIENT: Table = {
    "unrolled": Unrolled,
    "truncated": Truncated,
    "first-order": FirstOrder,
    "reptile": Reptile,
    "window": Window,
    "binomial": Binomial,
    "mixed": mixed,
    "implicit": implicit,
    "released-imaml": released_imaml,
    "memory-reduced": memory_reduced,
    "supervised": Supervised,
    "penalty": Penalty,
    "sama": SAMA,
    "darts": darts,
    "t1-t2": t1_t2,
    "meta-rkhs": MetaRKHS,
    "moml": MOML,
    "local-moml": LocalMOML,
    "forward-gradient": ForwardGradient,
    "evolution-strategies": EvolutionStrategies,
    "pes": pes,
}

_OPTIONS = {"lr", "steps", "test_steps", "weight_decay", "proximal", "moves"}  # of the command, beside the strings

START: Table = {"prototypes": Prototypes, "ridge": Ridge}

_KINDS: dict[str, tuple[type, Table, str]] = {
    "adapts": (Adapts, ADAPTS, "Head()"),
    "inner": (InnerSolver, INNER, "SGD(lr=0.1, steps=5)"),
    "meta_gradient": (MetaGradient, META_GRADIENT, "Unrolled()"),
    "start": (Start, START, "Prototypes()"),
}


def choice(value: Any, what: str) -> Any:
    """A value of one of the choices, from the object itself or from the string that the command takes.

    Args:
        value: what was given.
        what: ``"adapts"``, ``"inner"``, ``"meta_gradient"`` or ``"start"``.

    Raises:
        ValueError: something else, or a string that says too little.
    """
    kind, table, example = _KINDS[what]
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        if what == "inner" and not ("lr=" in value and "steps=" in value):
            raise ValueError(
                f"inner={value!r} has no rate and no steps: write il.{example}, or '{value}:lr=0.1,steps=5'"
            )
        return make(what, table, value)
    if isinstance(value, type):
        example = example if what == "inner" else f"{value.__name__}()"
        raise ValueError(f"{what}={value.__name__} is a class: give an object, such as il.{example}")
    if isinstance(value, torch.optim.Optimizer):
        raise ValueError(
            f"{what}=torch.optim.{type(value).__name__}(...) steps parameters in place, which has no derivative: give "
            f"il.{example}, Momentum, Adam or AdamW; an optimiser of torch's is for the outer loop, over "
            "learner.parameters()"
        )
    raise ValueError(
        f"{what}={value!r} is no {kind.__name__}: give il.{example}, or an object of a subclass of "
        f"{kind.__module__.rpartition('._')[0]}.{kind.__name__}"
    )


def text(value: Any) -> str:
    """The string that chooses an object of a choice, without what the command sets by options of its own."""
    if isinstance(value, Named):
        return f"named:{','.join(value.globs)}"
    if isinstance(value, LoRA):
        scale = [f"scale={value.scale}"] if value.scale != 1 else []
        return f"lora:{','.join([str(value.rank), *value.layers, *scale])}"
    if isinstance(value, Mixed):
        return "mixed:" + ",".join(f"{n}={weight}" for n, weight in zip(value.horizons, value.weights, strict=True))
    reduced = isinstance(value, Implicit) and not value.learn_start
    names = {name.replace("-", ""): name for _, table, _ in _KINDS.values() for name in table}
    name = "memory-reduced" if reduced else names.get(type(value).__name__.lower(), "")
    solver = getattr(value, "linear_solver", CG())
    if not name or not isinstance(solver, CG):
        raise ValueError(f"{value!r} has no name that can be typed: the command takes {', '.join(names.values())}")
    kind = next(table[name] for _, table, _ in _KINDS.values() if name in table)
    held = vars(solver) | {each.name: getattr(value, each.name) for each in fields(value)}
    held |= {f"beta{number}": beta for number, beta in enumerate(held.get("betas", ()), 1)}
    defaults = {each.name: each.default for each in fields(value)}
    defaults |= {each.name: each.default for each in inspect.signature(kind).parameters.values()}
    typed: list[str] = []
    for key in _taken(kind, (), _OPTIONS if isinstance(value, InnerSolver) else ()):
        shown, default = _typed(held[key]), defaults[key]
        if default in (MISSING, inspect.Parameter.empty):
            typed.append(shown)
        elif shown != _typed(default):
            typed.append(f"{key}={shown}")
    return ":".join([name, *([",".join(typed)] if typed else [])])


def _typed(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool) else str(value)


def make(what: str, table: Table, text: str, *args: Any, **options: Any) -> Any:
    """Build what ``text`` chooses from a table.

    Args:
        what: what is chosen, for messages.
        table: names and what they stand for.
        text: ``name`` or ``name:arguments``.
        *args: first arguments, which are not to be typed.
        **options: further arguments; those that are None are left out.

    Raises:
        ValueError: an unknown name, or arguments that it does not take; and whatever is refused at construction.
    """
    name, _, rest = text.partition(":")
    check_name(what, name, table)
    typed = [part.strip() for part in rest.split(",") if part.strip()]
    pairs = [part.split("=", 1) for part in typed if "=" in part]
    named = dict(pairs)
    places = [part for part in typed if "=" not in part]
    options = {key: value for key, value in options.items() if value is not None}
    signature = inspect.signature(table[name])
    takes = f"{name} takes {', '.join(_taken(table[name], args, options)) or 'no arguments'}"
    if len(named) < len(pairs):
        raise ValueError(f"{what} {text!r}: an argument is given twice; give each once")
    if both := sorted(named.keys() & options.keys()):
        raise ValueError(f"{what} {text!r}: {both[0]} has an option of its own; leave it out here")
    try:
        bound = signature.bind(*args, *places, **named, **options)
    except TypeError as error:
        raise ValueError(f"{what} {text!r}: {error}; {takes}") from error
    for key, value in bound.arguments.items():
        parameter = signature.parameters[key]
        if isinstance(value, str) and parameter.annotation != "str":
            bound.arguments[key] = _read(f"{what} {text!r}: {key}", value, parameter)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given = {each: _number(text) if isinstance(text, str) else text for each, text in value.items()}
            bound.arguments[key] = given
    try:
        return table[name](*bound.args, **bound.kwargs)
    except ValueError:
        raise
    except Exception as error:  # whatever a constructor makes of what it does not expect
        if not table[name].__module__.startswith(("innerloop.", "torch.")):
            raise  # code of the user's own, who knows what it means
        raise ValueError(f"{what} {text!r} cannot be made; {takes}") from error


def _taken(kind: Callable[..., Any], args: tuple[Any, ...], options: Collection[str]) -> list[str]:
    """The arguments that may be typed, for messages."""
    parameters = [*inspect.signature(kind).parameters.values()][len(args) :]
    names = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    made = get_type_hints(kind).get("return") if inspect.isfunction(kind) else None
    if len(names) < len(parameters) and is_dataclass(made):
        names += [each.name for each in fields(made) if each.name != "betas"]
    return [name for name in dict.fromkeys(names) if name not in options]


def _read(what: str, text: str, parameter: inspect.Parameter) -> Any:
    """What was typed for an argument, as its default value or its annotation says.

    Raises:
        ValueError: it is of another kind, or no finite number.
    """
    value, default = _number(text), parameter.default
    if isinstance(default, tuple):
        value = tuple(map(_number, text.split("/")))
        if not default:
            raise ValueError(f"{what} cannot be typed; set it in Python")
        if len(value) != len(default) or not all(map(_finite, value)):
            raise ValueError(f"{what} is {text!r}; give {len(default)} numbers, as in {'/'.join(map(str, default))}")
        return value
    kinds = {*re.findall(r"\w+", str(parameter.annotation)), type(default).__name__}
    known = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    wanted = [words for kind, words in known.items() if kind in kinds]
    fits = type(value).__name__ in kinds or (type(value) is int and "float" in kinds) or "Literal" in kinds
    if wanted and not fits:
        raise ValueError(f"{what} is {text!r}; it must be {' or '.join(wanted)}")
    return value


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check_name(what: str, name: str, names: Iterable[str]) -> None:
    """Raise ValueError where a name is not among those known, and say which is nearest."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{what} {name!r} is unknown: {hint}choose one of {', '.join(names)}")


def _number(text: str) -> Any:
    """A number or boolean as JSON writes it; any other text stays text, ``NaN`` and ``null`` too."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool) or _finite(value) else text
