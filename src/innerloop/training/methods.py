"""Methods by name: the choices and the hyper-parameters of their papers, for `train --method` and `compare`.

A method sets what adapts, how, by which meta-gradient, and at which inner and outer rates. What a comparison must hold
equal is not its business: tasks, model, tasks a batch, schedule and clipping of the outer loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from innerloop.training.build import INK
from innerloop.training.choices import check_name


@dataclass(frozen=True)
class Method:
    """A method with its paper's settings.

    Attributes:
        title: its name as people write it.
        paper: arXiv number of the paper that it comes from.
        source: where the hyper-parameters come from.
        settings: of `innerloop.training.settings.Settings`, whatever the tasks are.
        characters: further ones for glyphs and Omniglot.
        pictures: further ones for all other tasks.
        argument: the setting that takes what is typed behind a colon, with ``{}`` in its place; None takes nothing.
        example: what may be typed there.
    """

    title: str
    paper: str
    source: str
    settings: Mapping[str, Any]
    characters: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    argument: tuple[str, str] | None = None
    example: str = ""

    def settings_for(self, dataset: str, typed: str = "") -> dict[str, Any]:
        """All settings for a data set, with what was typed behind the name."""
        found = {**self.settings, **(self.characters if dataset in INK else self.pictures)}
        if self.argument and typed:
            name, template = self.argument
            found[name] = template.format(typed)
        return found


MAML_CHARACTERS = {"inner_lr": 0.4, "inner_steps": 1}
MAML_20_WAY = {"inner_lr": 0.1, "inner_steps": 5}  # for characters, where a method is about several inner steps
MAML_PICTURES = {"inner_lr": 0.01, "inner_steps": 5}
WHOLE = {"adapts": "everything", "inner": "sgd", "outer_lr": 1e-3}
HEAD = {"adapts": "head", "inner": "sgd"}
MAML_SOURCE = "authors' code: Omniglot 5-way inner rate 0.4, one step; miniImageNet 0.01, five steps; Adam 1e-3 outside"
LEARN2LEARN = "learn2learn's FC100 example: inner rate 0.1, five steps, Adam 1e-3 outside"
STOCBIO = "stocBiO's FC100 setting: inner rate 0.1, 20 steps, Adam 1e-3 outside"

METHODS: dict[str, Method] = {
    "maml": Method(
        "MAML", "1703.03400", MAML_SOURCE, WHOLE | {"meta_gradient": "unrolled"}, MAML_CHARACTERS, MAML_PICTURES
    ),
    "fomaml": Method(
        "first-order MAML", "1703.03400", MAML_SOURCE, WHOLE | {"meta_gradient": "first-order"}, MAML_CHARACTERS,
        MAML_PICTURES,
    ),
    "reptile": Method(
        "Reptile", "1803.02999",
        "authors' README: inner Adam without first moment, 1e-3, five steps (Omniglot 5-way) or eight (miniImageNet), "
        "50 at test, outer step from 1 falling to 0; here on the support set alone, whole in each step",
        {"adapts": "everything", "inner": "adam:beta1=0", "inner_lr": 1e-3, "test_steps": 50,
         "meta_gradient": "reptile", "optimizer": "sgd", "outer_lr": 1.0},
        {"inner_steps": 5}, {"inner_steps": 8},
    ),
    "anil": Method(
        "ANIL", "1909.09157", LEARN2LEARN,
        HEAD | {"inner_lr": 0.1, "inner_steps": 5, "meta_gradient": "unrolled", "outer_lr": 1e-3},
    ),
    "fo-anil": Method(
        "first-order ANIL", "1909.09157", LEARN2LEARN + ", with the exact gradient there",
        HEAD | {"inner_lr": 0.1, "inner_steps": 5, "meta_gradient": "first-order", "outer_lr": 1e-3},
    ),
    "boil": Method(
        "BOIL", "2008.08882", "authors' code: one inner step at 0.5, Adam 1e-3 outside",
        {"adapts": "body", "inner": "sgd", "inner_lr": 0.5, "inner_steps": 1, "meta_gradient": "unrolled",
         "outer_lr": 1e-3},
    ),
    "lambda": Method(
        "Lambda pattern", "2206.05930",
        "the paper's are not known; those of a related code of its author: inner rate 0.01, five steps, ten at test, "
        "Adam 1e-3 outside. Here the pattern holds in training as well",
        WHOLE | {"adapts": "blocks:00011", "inner_lr": 0.01, "inner_steps": 5, "test_steps": 10,
                 "meta_gradient": "unrolled"},
        argument=("adapts", "blocks:{}"), example="00011",
    ),
    "imaml": Method(
        "iMAML", "1909.04630",
        "Omniglot as published: lambda 2, five CG steps, 16 inner steps (at 0.1, and Adam with eps 1e-3, in the "
        "authors' README); miniImageNet by two re-implementations: lambda 0.5, ten inner steps, 0.1",
        WHOLE | {"inner_lr": 0.1, "optimizer": "adam:eps=1e-3"},
        {"inner_steps": 16, "meta_gradient": "implicit:proximal=2.0,iterations=5"},
        {"inner_steps": 10, "meta_gradient": "implicit:proximal=0.5,iterations=5"},
    ),
    "imaml-hf": Method(
        "iMAML, Hessian-free", "1909.04630",
        "as iMAML; the number of Newton steps is not published and ours: three, of five CG steps and a line search",
        WHOLE | {"inner": "newton-cg", "inner_lr": 1.0, "inner_steps": 3, "optimizer": "adam:eps=1e-3"},
        {"meta_gradient": "implicit:proximal=2.0,iterations=5"},
        {"meta_gradient": "implicit:proximal=0.5,iterations=5"},
    ),
    "memory-reduced": Method(
        "memory-reduced", "2412.12030",
        "authors' code for CIFAR-FS and FC100: inner rate 0.1, 20 steps, 20 CG steps, Adam 1e-4 outside; the L2 weight "
        "is not published and ours (the authors' code has none)",
        HEAD | {"inner_lr": 0.1, "inner_steps": 20, "meta_gradient": "memory-reduced:l2=0.05,iterations=20",
                "outer_lr": 1e-4},
    ),
    "itd-bio": Method(
        "ITD-BiO", "2010.07962", STOCBIO,
        HEAD | {"inner_lr": 0.1, "inner_steps": 20, "meta_gradient": "unrolled:learn_start=false", "outer_lr": 1e-3},
    ),
    "window": Method(
        "window gradient reuse", "2006.04298",
        "the paper's are not known; MAML's for 20-way Omniglot: inner rate 0.1, five steps; for miniImageNet: 0.01, "
        "five steps; Adam 1e-3 outside",
        WHOLE | {"meta_gradient": "window:2"}, MAML_20_WAY, MAML_PICTURES, ("meta_gradient", "window:{}"), "5",
    ),
    "binomial": Method(
        "BinomMAML", "2604.13263",
        "authors' code: inner rate 0.01, five steps, Adam 1e-3 outside; theirs for characters are not known, so "
        "MAML's for 20-way Omniglot: 0.1, five steps",
        WHOLE | {"meta_gradient": "binomial:2"}, MAML_20_WAY, MAML_PICTURES, ("meta_gradient", "binomial:{}"), "2",
    ),
    "truncated": Method(
        "truncated MAML", "1703.03400",
        "not published for truncation; MAML's for 20-way Omniglot: inner rate 0.1, five steps; for miniImageNet: 0.01, "
        "five steps; Adam 1e-3 outside",
        WHOLE | {"meta_gradient": "truncated:2"}, MAML_20_WAY, MAML_PICTURES, ("meta_gradient", "truncated:{}"), "2",
    ),
    "meta-sgd": Method(
        "Meta-SGD", "1707.09835", "one inner step at learned rates; their start and the outer rate are ours",
        {"adapts": "everything", "inner": "learned-rates:parameter", "inner_lr": 0.1, "inner_steps": 1,
         "meta_gradient": "unrolled", "outer_lr": 1e-3},
    ),
    "maml++": Method(
        "MAML++", "1810.09502",
        "authors' configurations: five steps at learned rates that start at 0.1 (Omniglot) or 0.01 (miniImageNet), "
        "Adam 1e-3 outside, multi-step loss in the first 15 % of training. Batch norm is the library's, without "
        "statistics or biases of its own for each step",
        {"adapts": "everything", "inner": "learned-rates:layer-step", "inner_steps": 5, "meta_gradient": "unrolled",
         "outer_lr": 1e-3, "multi_step_loss": 0.15},
        {"inner_lr": 0.1}, {"inner_lr": 0.01},
    ),
    "default": Method("ANIL, learned rates", "1909.09157", "the default recipe of innerloop train", {}),
}  # fmt: skip


def method(text: str) -> Method:
    """The method of ``name`` or ``name:argument``.

    Raises:
        ValueError: an unknown name, or an argument that it does not take.
    """
    name, colon, typed = text.partition(":")
    check_name("method", name, METHODS)
    found = METHODS[name]
    if colon and not found.argument:
        raise ValueError(f"method {text!r}: {name} takes nothing behind a colon")
    if colon and not typed:
        raise ValueError(f"method {text!r}: write what follows the colon, such as {name}:{found.example}")
    return found


def method_settings(text: str, dataset: str) -> dict[str, Any]:
    """The settings of ``name`` or ``name:argument`` for a data set.

    Raises:
        ValueError: as `method`.
    """
    return method(text).settings_for(dataset, text.partition(":")[2])
