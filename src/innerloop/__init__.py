"""innerloop: meta-learning by optimisation, with the meta-gradient of your choice at the memory of one inner step."""

from innerloop import models, tasks
from innerloop.adapts import Blocks, Body, Everything, Head, Named
from innerloop.inner import SGD, Adam, LearnedRates, Momentum
from innerloop.learner import Evaluation, MetaLearner, Metrics
from innerloop.meta_gradient import (
    Binomial,
    FirstOrder,
    Mixed,
    Reptile,
    Result,
    Truncated,
    Unrolled,
    Window,
    hypergradient,
)
from innerloop.problem import Problem, Task

__all__ = [
    "SGD",
    "Adam",
    "Binomial",
    "Blocks",
    "Body",
    "Evaluation",
    "Everything",
    "FirstOrder",
    "Head",
    "LearnedRates",
    "MetaLearner",
    "Metrics",
    "Mixed",
    "Momentum",
    "Named",
    "Problem",
    "Reptile",
    "Result",
    "Task",
    "Truncated",
    "Unrolled",
    "Window",
    "hypergradient",
    "models",
    "tasks",
]
