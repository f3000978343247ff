"""Methods by name: the choices and the hyper-parameters of their papers, for `train --method` and `compare`.

Where each number comes from is told in docs/methods.md.

A method sets what adapts, how, by which meta-gradient, and at which inner and outer rates. What a comparison must hold
equal is not its business: tasks, model, tasks a batch, schedule and clipping of the outer loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from innerloop.adapts import Adapts, Blocks, Body, Everything, Head, Named
from innerloop.choices import check_name
from innerloop.inner import ALFA, SGD, Adam, InnerSolver, LearnedRates, NewtonCG
from innerloop.linear import CG
from innerloop.meta_gradient import (
    MOML,
    Binomial,
    FirstOrder,
    Implicit,
    MemoryReduced,
    MetaGradient,
    MetaRKHS,
    ReleasedIMAML,
    Reptile,
    Supervised,
    Truncated,
    Unrolled,
    Window,
)
from innerloop.training.build import INK
from innerloop.training.settings import TERMS, typed


@dataclass(frozen=True)
class Method:
    """A method with its paper's settings.

    Attributes:
        title: its name as people write it.
        paper: arXiv number of the paper that it comes from.
        adapts: what moves in the inner loop.
        inner: how; a pair where that differs: for glyphs and Omniglot, and for all other tasks.
        meta_gradient: how the outer gradient is found.
        outer: further settings of `innerloop.training.settings.Settings`, such as the outer rate.
        argument: the setting that takes what is typed behind a colon, with ``{}`` in its place; None takes nothing.
        example: what may be typed there.
    """

    title: str
    paper: str
    adapts: Adapts | None = None
    inner: InnerSolver | tuple[InnerSolver, InnerSolver] | None = None
    meta_gradient: MetaGradient | None = None
    outer: Mapping[str, Any] = field(default_factory=dict)
    argument: tuple[str, str] | None = None
    example: str = ""


PICTURES = SGD(lr=0.01, steps=5)
MAML = SGD(lr=0.4, steps=1), PICTURES
SEVERAL = SGD(lr=0.1, steps=5), PICTURES  # of MAML for 20-way Omniglot, where a method is about several inner steps
ANIL = SGD(lr=0.1, steps=5)
INNER_ADAM = Adam(lr=1e-3, steps=5, test_steps=50, betas=(0.0, 0.999), minibatch=10)
STILL = SGD(lr=0.1, steps=0)
OUTER = {"outer_lr": 1e-3}
IMAML_OUTER = {"outer_lr": 1e-3, "optimizer": "adam:eps=1e-3"}

METHODS: dict[str, Method] = {
    "maml": Method("MAML", "1703.03400", Everything(), MAML, Unrolled(), OUTER),
    "fomaml": Method("first-order MAML", "1703.03400", Everything(), MAML, FirstOrder(), OUTER),
    "reptile": Method(
        "Reptile", "1803.02999", Everything(), (INNER_ADAM, replace(INNER_ADAM, steps=8)), Reptile(),
        {"optimizer": "sgd", "outer_lr": 1.0, "schedule": "linear", "train_shots": 10},
    ),
    "anil": Method("ANIL", "1909.09157", Head(), ANIL, Unrolled(), OUTER),
    "fo-anil": Method("first-order ANIL", "1909.09157", Head(), ANIL, FirstOrder(), OUTER),
    "boil": Method("BOIL", "2008.08882", Body(), SGD(lr=0.5, steps=1), Unrolled(), OUTER),
    "lambda": Method(
        "Lambda pattern", "2206.05930", Blocks("00011"), SGD(lr=0.01, steps=5, test_steps=10), Unrolled(), OUTER,
        ("adapts", "blocks:{}"), "00011",
    ),
    "imaml": Method(
        "iMAML", "1909.04630", Everything(),
        (SGD(lr=0.1, steps=16, proximal=2.0), SGD(lr=0.1, steps=10, proximal=0.5)), Implicit(CG(5)), IMAML_OUTER,
    ),
    "imaml-head": Method(
        "iMAML on the head", "1909.04630", Head(), SGD(lr=0.1, steps=16, proximal=0.5), Implicit(CG(5)),
        # an implicit gradient does not see that features grow until the inner steps are too long, so they decay
        OUTER | {"optimizer": "adamw:weight_decay=0.3"},
    ),
    "imaml-damped": Method(
        "iMAML, damped", "1909.04630", Everything(), SGD(lr=0.1, steps=16), ReleasedIMAML(), IMAML_OUTER
    ),
    "imaml-hf": Method(
        "iMAML, Hessian-free", "1909.04630", Everything(),
        (NewtonCG(steps=3, proximal=2.0), NewtonCG(steps=3, proximal=0.5)), Implicit(CG(5)), IMAML_OUTER,
    ),
    "memory-reduced": Method(
        "memory-reduced", "2412.12030", Head(), SGD(lr=0.1, steps=20, weight_decay=0.05), MemoryReduced(CG(20)),
        {"outer_lr": 1e-4},
    ),
    "itd-bio": Method("ITD-BiO", "2010.07962", Head(), SGD(lr=0.1, steps=20), Unrolled(learn_start=False), OUTER),
    "window": Method(
        "window gradient reuse", "2006.04298", Everything(), SEVERAL, Window(2), OUTER,
        ("meta_gradient", "window:{}"), "5",
    ),
    "binomial": Method(
        "BinomMAML", "2604.13263", Everything(), SEVERAL, Binomial(2), OUTER, ("meta_gradient", "binomial:{}"), "2"
    ),
    "truncated": Method(
        "truncated MAML", "1703.03400", Everything(), SEVERAL, Truncated(2), OUTER,
        ("meta_gradient", "truncated:{}"), "2",
    ),
    "meta-sgd": Method("Meta-SGD", "1707.09835", Everything(), LearnedRates(lr=0.1, steps=1), Unrolled(), OUTER),
    "maml++": Method(
        "MAML++", "1810.09502", Everything(),
        (LearnedRates(lr=0.1, steps=5, per="layer-step"), LearnedRates(lr=0.01, steps=5, per="layer-step")),
        Unrolled(), OUTER | {"multi_step_loss": 0.15, "first_order": 0.5, "batch_norm": "step"},
    ),
    "alfa": Method(
        "ALFA", "2011.00209", Everything(), (ALFA(lr=0.1, steps=5), ALFA(lr=0.01, steps=5)), Unrolled(), OUTER
    ),
    "alfa-l2f": Method(
        "ALFA with L2F's attenuation", "2011.00209", Everything(),  # the first of six steps is the attenuation
        (ALFA(lr=0.1, steps=6, attenuate=True), ALFA(lr=0.01, steps=6, attenuate=True)), Unrolled(), OUTER,
    ),
    "cavia": Method(
        "CAVIA", "1810.03642", Named("*.context"), SGD(lr=1.0, steps=2), Unrolled(learn_start=False),
        OUTER | {"context": 100},
    ),
    "meta-rkhs": Method(
        "Meta-RKHS, version I", "2102.03909", Everything(),
        (SGD(lr=0.1, steps=5, test_steps=10), SGD(lr=0.01, steps=5, test_steps=10)), MetaRKHS(), OUTER,
    ),
    "moml": Method(
        "MOML", "2106.04911", Everything(), (MAML[0], SGD(lr=0.01, steps=1)), MOML(),
        OUTER | {"carry": "task", "recurring": 1000}, ("recurring", "{}"), "100",
    ),
    "mamf": Method(
        "MAMF, no bilevel part", "2203.04904", Everything(), (SGD(lr=0.1, steps=8), SGD(lr=0.01, steps=8)), Reptile(),
        {"optimizer": "sgd", "outer_lr": 1.0},
    ),
    "protonet": Method("ProtoNet", "1703.05175", Head(), STILL, Unrolled(), OUTER | {"start": "prototypes"}),
    "proto-anil": Method("Proto-ANIL", "1903.03096", Head(), ANIL, Unrolled(), OUTER | {"start": "prototypes"}),
    "proto-maml": Method(
        "Proto-MAML", "1903.03096", Everything(), SEVERAL, Unrolled(), OUTER | {"start": "prototypes"}
    ),
    "ridge": Method("R2-D2", "1805.08136", Head(), STILL, Unrolled(), OUTER | {"start": "ridge"}),
    "pretrained": Method(
        "pretrained, class means", "2003.04390", Head(), STILL, Supervised(),
        OUTER | {"start": "prototypes:cosine=true", "batch_norm": "frozen"},
    ),
    "default": Method("Proto-ANIL", "1903.03096"),  # the settings' own defaults
}  # fmt: skip


COLOUR = "cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet", "folder"
COLOURED = {"outer_lr": 3e-3, "inner": "sgd", "inner_lr": 0.01, "inner_steps": 20, "augment": "flip,crop"}
OF_METHOD = (
    "adapts", "inner", "inner_lr", "inner_steps", "test_steps", "weight_decay", "proximal", "meta_gradient", "start",
    "carry", "multi_step_loss", "first_order", "batch_norm", "context", "recurring",
)  # fmt: skip
"""Settings by which a method says what adapts and how; it may set the outer loop too."""


def unasked(dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the default recipe where nothing of a method was typed: `pretrained` for colour pictures.

    On those it leads in validation, and gains by mirrored and shifted pictures and by a few small steps of the head.
    For characters and all else the settings' own defaults hold. See experiments/recipe.
    """
    if dataset in COLOUR and given.get("channels") in (None, 3, "3") and not given.keys() & set(OF_METHOD):
        return method_settings("pretrained", dataset) | COLOURED
    return {}


def method(chosen: str) -> Method:
    """The method of ``name`` or ``name:argument``.

    Raises:
        ValueError: an unknown name, or an argument that it does not take.
    """
    name, colon, typed = chosen.partition(":")
    check_name("method", name, METHODS)
    found = METHODS[name]
    if colon and not found.argument:
        raise ValueError(f"method {chosen!r}: {name} takes nothing behind a colon")
    if colon and not typed:
        raise ValueError(f"method {chosen!r}: write what follows the colon, such as {name}:{found.example}")
    return found


def method_settings(chosen: str, dataset: str) -> dict[str, Any]:
    """The settings of ``name`` or ``name:argument`` for a data set.

    Raises:
        ValueError: as `method`.
    """
    known, found = method(chosen), dict[str, Any]()
    if known.adapts is not None and known.inner is not None and known.meta_gradient is not None:
        inner = known.inner if isinstance(known.inner, InnerSolver) else known.inner[dataset not in INK]
        found = {"start": None} | typed(known.adapts, inner, known.meta_gradient)
        found = {name: value for name, value in found.items() if value or name not in TERMS}
    found |= known.outer
    if known.argument and ":" in chosen:
        name, template = known.argument
        found[name] = template.format(chosen.partition(":")[2])
    return found
