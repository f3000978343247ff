"""innerloop: meta-learning by optimisation, with the meta-gradient of your choice at the memory of one inner step."""

from typing import TYPE_CHECKING, Any

from innerloop import models, tasks
from innerloop.adapts import Blocks, Body, Everything, Head, LoRA, Named
from innerloop.bilevel import Bilevel, Evaluation, Metrics, hypergradient
from innerloop.inner import ALFA, SGD, Adam, AdamW, LearnedRates, Momentum, NewtonCG
from innerloop.learner import MetaLearner
from innerloop.linear import CG, Neumann, Nystrom
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
    MetaRKHS,
    Mixed,
    Penalty,
    ReleasedIMAML,
    Reptile,
    Result,
    Supervised,
    Truncated,
    Unrolled,
    Window,
)
from innerloop.problem import End, Problem, Steps, Task
from innerloop.pruning import pruned
from innerloop.start import Prototypes, Ridge

if TYPE_CHECKING:
    from innerloop.studies.check import check
    from innerloop.studies.compare import compare
    from innerloop.training.adaptation import load_adapted
    from innerloop.training.fit import fit
    from innerloop.training.weighting import SPSA, by_loss

# Loaded when first asked for: they bring drawing, logs and tables with them.
_LAZY = {
    "SPSA": "innerloop.training.weighting",
    "by_loss": "innerloop.training.weighting",
    "check": "innerloop.studies.check",
    "compare": "innerloop.studies.compare",
    "fit": "innerloop.training.fit",
    "load_adapted": "innerloop.training.adaptation",
}

__all__ = [
    "ALFA",
    "CG",
    "MOML",
    "SAMA",
    "SGD",
    "SPSA",
    "Adam",
    "AdamW",
    "Bilevel",
    "Binomial",
    "Blocks",
    "Body",
    "End",
    "Evaluation",
    "Everything",
    "EvolutionStrategies",
    "FirstOrder",
    "ForwardGradient",
    "Head",
    "Implicit",
    "LearnedRates",
    "LoRA",
    "LocalMOML",
    "MemoryReduced",
    "MetaLearner",
    "MetaRKHS",
    "Metrics",
    "Mixed",
    "Momentum",
    "Named",
    "Neumann",
    "NewtonCG",
    "Nystrom",
    "Penalty",
    "Problem",
    "Prototypes",
    "ReleasedIMAML",
    "Reptile",
    "Result",
    "Ridge",
    "Steps",
    "Supervised",
    "Task",
    "Truncated",
    "Unrolled",
    "Window",
    "by_loss",
    "check",
    "compare",
    "fit",
    "hypergradient",
    "load_adapted",
    "models",
    "pruned",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'innerloop' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
