"""Estimators, inner solvers and subsets: each triple that cannot go together is refused at construction.

Of the others every pair of values works in a triple.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import innerloop as il
from innerloop.adapts import Adapts
from innerloop.inner import InnerSolver
from innerloop.meta_gradient import MetaGradient
from problems import WAYS, every_pair, relative_error

STEPS, TASKS = 2, 2


class Row(NamedTuple):
    """An estimator, what it asks of the inner solver, and what else the learner is given."""

    estimator: Callable[[], MetaGradient]
    inner: Mapping[str, Any] = MappingProxyType({})
    learner: Mapping[str, Any] = MappingProxyType({})


PULL, DECAY = {"proximal": 2.0}, {"weight_decay": 0.05}
ESTIMATORS: dict[str, Row] = {
    "unrolled": Row(il.Unrolled),
    "unrolled recorded": Row(lambda: il.Unrolled(record=True)),
    "unrolled thinned": Row(lambda: il.Unrolled(copies=2)),
    "unrolled offloaded": Row(lambda: il.Unrolled(copies=3, offload=True)),
    "unrolled from a fixed start": Row(lambda: il.Unrolled(learn_start=False)),
    "truncated": Row(lambda: il.Truncated(1)),
    "first order": Row(il.FirstOrder),
    "reptile": Row(il.Reptile),
    "window frozen": Row(lambda: il.Window(2)),
    "window true forward": Row(lambda: il.Window(2, "true_forward")),
    "binomial": Row(lambda: il.Binomial(1)),
    "mixed": Row(lambda: il.Mixed((1, 2), (0.4, 0.6))),
    "implicit cg": Row(lambda: il.Implicit(il.CG(3)), PULL),
    "implicit neumann": Row(lambda: il.Implicit(il.Neumann(2, step=0.25)), PULL),
    "implicit nystrom": Row(lambda: il.Implicit(il.Nystrom(3)), PULL),
    "implicit from where it was left": Row(lambda: il.Implicit(il.CG(3)), PULL, {"carry": "slot"}),
    "implicit of what was given": Row(lambda: il.Implicit(il.CG(3))),
    "released imaml": Row(lambda: il.ReleasedIMAML(2.0, il.CG(3, damping=1.0))),
    "memory reduced": Row(lambda: il.MemoryReduced(il.CG(3)), DECAY),
    "memory reduced of what was given": Row(lambda: il.MemoryReduced(il.CG(3))),
    "memory reduced nystrom": Row(lambda: il.MemoryReduced(il.Nystrom(3)), DECAY),
    "memory reduced by slot": Row(lambda: il.MemoryReduced(il.CG(3)), DECAY, {"carry": "slot"}),
    "memory reduced by task": Row(lambda: il.MemoryReduced(il.CG(3)), DECAY, {"carry": "task"}),
}
SOLVERS: dict[str, Callable[..., InnerSolver]] = {
    "sgd": partial(il.SGD, lr=0.1, steps=STEPS),
    "minibatches": partial(il.SGD, lr=0.1, steps=STEPS, minibatch=WAYS),
    "momentum": partial(il.Momentum, lr=0.05, steps=STEPS),
    "clipped groups": partial(
        il.Momentum, lr={"*.bias": 0.02, "*": lambda step: 0.05 / (1 + step)}, steps=STEPS, clip=0.5
    ),
    "adam": partial(il.Adam, lr=0.02, steps=STEPS, eps=1e-3),
    "adamw": lambda **settings: il.AdamW(**{"weight_decay": 0.1, **settings}, lr=0.02, steps=STEPS, eps=1e-3),
    "rates": partial(il.LearnedRates, lr=0.1, steps=STEPS),
    "layer-step rates": partial(il.LearnedRates, lr=0.1, steps=STEPS, per="layer-step"),
    "newton-cg": partial(il.NewtonCG, steps=STEPS, iterations=2, trials=2),
}
SUBSETS: dict[str, Adapts] = {
    "everything": il.Everything(),
    "head": il.Head(),
    "body": il.Body(),
    "blocks": il.Blocks("010"),
    "named": il.Named("*.bias", "3.weight"),
    "table": il.Blocks(["011", "111"]),  # everything moves, the first block from the second step on
}


def model() -> nn.Module:
    """Three blocks, the first with batch norm."""
    first = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh())
    return nn.Sequential(first, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WAYS)).double()


def tasks() -> il.Task:
    labels = torch.arange(WAYS).repeat_interleave(2).expand(TASKS, -1)
    support, query = torch.randn(2, TASKS, 2 * WAYS, 4, dtype=torch.float64)
    return il.Task((support, labels), (query, labels))


def refused(estimator: str, solver: str, subset: str) -> bool:
    """What cannot go together, whatever the code says."""
    family, rates, newton = estimator.split()[0], "rates" in solver, solver == "newton-cg"
    partial = subset not in ("everything", "table")
    if subset == "table" and (family in ("window", "implicit", "released", "memory") or newton):
        return True
    if family == "reptile":
        return rates or partial
    if family == "released":
        return solver not in ("sgd", "minibatches")
    if family in ("implicit", "memory"):
        nothing_left = not partial and (family == "memory" or estimator == "implicit of what was given")
        # the loss's gradient is shortened and those of the terms are not
        clipped = solver == "clipped groups" and not estimator.endswith("of what was given")
        return rates or solver == "adamw" or nothing_left or clipped
    return newton or (estimator == "unrolled from a fixed start" and not partial)


def build(estimator: str, solver: str, subset: str, chunk_size: int | None) -> il.MetaLearner:
    torch.manual_seed(1)
    row = ESTIMATORS[estimator]
    inner = SOLVERS[solver](**row.inner)
    return il.MetaLearner(model(), SUBSETS[subset], inner, row.estimator(), chunk_size=chunk_size, **row.learner)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_is_refused_with_reason_and_alternative(estimator):
    for solver, subset in product(SOLVERS, SUBSETS):
        if refused(estimator, solver, subset):
            with pytest.raises(ValueError, match=r"^[^\n]*(use|give) [^\n]*$") as error:
                build(estimator, solver, subset, None)
            alternative = re.split("use |give ", str(error.value), maxsplit=1)[1]
            assert any(hasattr(il, name) for name in re.findall(r"[A-Z]\w+", alternative))


@pytest.mark.parametrize(
    ("estimator", "solver", "subset"),
    every_pair(ESTIMATORS, SOLVERS, SUBSETS, allowed=lambda *row: not refused(*row)),
)
@pytest.mark.filterwarnings("error::UserWarning")  # one of them says that vmap was given up
def test_works(estimator, solver, subset):
    unsaid = pytest.warns(UserWarning, match="without weight_decay or proximal in the inner solver")
    with unsaid if estimator.endswith("of what was given") else nullcontext():
        together, alone = (build(estimator, solver, subset, size) for size in (None, 1))
    batch = tasks()
    before = {name: value.clone() for name, value in together.state_dict().items()}
    names = ["a", "b"] if together.carry == "task" else None
    startless = estimator == "implicit of what was given"  # the solution does not depend on where it starts
    shown = ", ".join(together.adapted[:5])
    for learner in (together, alone):
        torch.manual_seed(2)  # which draws minibatches
        for _ in range(1 if together.carry == "none" else 2):  # a second step begins warm
            learner.zero_grad()
            zero = pytest.warns(UserWarning, match=rf"of {shown} is exactly zero. Implicit differentiates the solution")
            with zero if startless else nullcontext():
                metrics = learner.meta_step(batch, task_ids=names)
        assert all(value.isfinite().all() for value in (metrics.loss, *metrics.diagnostics.values()))

    fixed = set()
    if not together.meta_gradient.learn_start:
        fixed = {f"model.{name}" for name in together.adapted}
    elif startless:
        assert not any(
            learner.model.get_parameter(name).grad.any() for name in alone.adapted for learner in (together, alone)
        )
        fixed = {f"model.{name}" for name in together.adapted}
        for name in alone.adapted:
            together.model.get_parameter(name).grad = alone.model.get_parameter(name).grad = None
    found, expected = (
        {name: p.grad for name, p in learner.named_parameters() if p.grad is not None} for learner in (together, alone)
    )
    assert found.keys() == {name for name, _ in together.named_parameters()} - fixed
    assert all(grad.isfinite().all() and grad.any() for grad in found.values())
    assert relative_error(found, expected) < 1e-10

    torch.manual_seed(3)
    result = together.evaluate(batch)
    adapted = alone.adapt(batch.support[0][1], batch.support[1][1])
    if together.inner.minibatch is None:  # it draws others
        torch.testing.assert_close(adapted(batch.query[0][1]), result.outputs[1], rtol=1e-10, atol=1e-10)
    after = adapted.state_dict()
    assert {
        name for name, _ in adapted.named_parameters() if not torch.equal(after[name], before[f"model.{name}"])
    } == {*together.adapted}
    for learner in (together, alone):
        assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
