"""innerloop: meta-learning by optimisation, with the meta-gradient of your choice at the memory of one inner step."""

from innerloop import models, tasks
from innerloop.adapts import Blocks, Body, Everything, Head, Named
from innerloop.inner import SGD, Adam, LearnedRates, Momentum, NewtonCG
from innerloop.learner import Evaluation, MetaLearner, Metrics
from innerloop.linear import CG, Neumann, Nystrom
from innerloop.meta_gradient import (
    Binomial,
    FirstOrder,
    Implicit,
    MemoryReduced,
    Mixed,
    Reptile,
    Result,
    Truncated,
    Unrolled,
    Window,
    hypergradient,
)
from innerloop.problem import Problem, Task
from innerloop.studies import check, compare
from innerloop.training import fit

__all__ = [
    "CG",
    "SGD",
    "Adam",
    "Binomial",
    "Blocks",
    "Body",
    "Evaluation",
    "Everything",
    "FirstOrder",
    "Head",
    "Implicit",
    "LearnedRates",
    "MemoryReduced",
    "MetaLearner",
    "Metrics",
    "Mixed",
    "Momentum",
    "Named",
    "Neumann",
    "NewtonCG",
    "Nystrom",
    "Problem",
    "Reptile",
    "Result",
    "Task",
    "Truncated",
    "Unrolled",
    "Window",
    "check",
    "compare",
    "fit",
    "hypergradient",
    "models",
    "tasks",
]
