"""The whole product of estimators, inner solvers and subsets: each triple works, or is refused at construction."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import innerloop as il
from innerloop.inner import InnerSolver
from innerloop.meta_gradient import MetaGradient
from problems import WAYS, relative_error

STEPS, TASKS = 2, 2

ESTIMATORS: dict[str, Callable[[], MetaGradient]] = {
    "unrolled": il.Unrolled,
    "unrolled thinned": lambda: il.Unrolled(keep_every="sqrt"),
    "unrolled from a fixed start": lambda: il.Unrolled(learn_start=False),
    "truncated": lambda: il.Truncated(1),
    "first order": il.FirstOrder,
    "reptile": il.Reptile,
    "window frozen": lambda: il.Window(2),
    "window true forward": lambda: il.Window(2, "true_forward"),
    "binomial": lambda: il.Binomial(1),
    "mixed": lambda: il.Mixed((1, 2), (0.4, 0.6)),
    "implicit cg": lambda: il.Implicit(2.0, il.CG(3)),
    "implicit neumann": lambda: il.Implicit(2.0, il.Neumann(2, step=0.5)),
    "implicit nystrom": lambda: il.Implicit(2.0, il.Nystrom(3)),
    "implicit released": lambda: il.Implicit(2.0, il.CG(3, damping=1.0), released_variant=True),
    "memory reduced": lambda: il.MemoryReduced(il.CG(3)),
    "memory reduced paper": lambda: il.MemoryReduced.paper(iterations=3),
    "memory reduced released": lambda: il.MemoryReduced.released(iterations=3),
    "memory reduced nystrom": lambda: il.MemoryReduced(il.Nystrom(3)),
    "memory reduced by task": lambda: il.MemoryReduced(il.CG(3), warm_start="task"),
}
SOLVERS: dict[str, Callable[[], InnerSolver]] = {
    "sgd": lambda: il.SGD(lr=0.1, steps=STEPS),
    "momentum": lambda: il.Momentum(lr=0.05, steps=STEPS),
    "adam": lambda: il.Adam(lr=0.02, steps=STEPS, eps=1e-3),
    "rates": lambda: il.LearnedRates(lr=0.1, steps=STEPS),
    "layer-step rates": lambda: il.LearnedRates(lr=0.1, steps=STEPS, per="layer-step"),
    "newton-cg": lambda: il.NewtonCG(steps=STEPS, iterations=2, trials=2),
}
SUBSETS: dict[str, il.adapts.Adapts] = {
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
    if subset == "table" and family in ("window", "implicit", "memory"):
        return True
    if family == "reptile":
        return rates or partial or (newton and subset == "table")
    if estimator == "implicit released":
        return solver != "sgd"
    if family in ("implicit", "memory"):
        return rates or (family == "memory" and not partial)
    return newton or (estimator == "unrolled from a fixed start" and not partial)


def build(estimator: str, solver: str, subset: str, chunk_size: int | None) -> il.MetaLearner:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        if estimator == "memory reduced released":
            warnings.filterwarnings("ignore", "MemoryReduced.l2=0.")
        return il.MetaLearner(
            model(), SUBSETS[subset], SOLVERS[solver](), ESTIMATORS[estimator](), chunk_size=chunk_size
        )


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("error::UserWarning")  # one of them says that vmap or forward mode was given up
def test_works_or_is_refused_with_reason_and_alternative(estimator, solver, subset):
    if refused(estimator, solver, subset):
        with pytest.raises(ValueError, match=r"^[^\n]*use [^\n]*$") as error:
            build(estimator, solver, subset, None)
        alternative = str(error.value).partition("use ")[2]
        assert any(hasattr(il, name) for name in re.findall(r"[A-Z]\w+", alternative))
        return
    together, alone = (build(estimator, solver, subset, size) for size in (None, 1))
    batch = tasks()
    before = {name: value.clone() for name, value in together.state_dict().items()}
    names = ["a", "b"] if estimator == "memory reduced by task" else None
    for learner in (together, alone):
        for _ in range(2 if names or estimator == "memory reduced paper" else 1):  # a second step begins warm
            learner.zero_grad()
            metrics = learner.meta_step(batch, task_ids=names)
        assert all(value.isfinite().all() for value in (metrics.loss, *metrics.diagnostics.values()))

    fixed = set()
    if estimator.startswith("memory") or estimator == "unrolled from a fixed start":
        fixed = {f"model.{name}" for name in together.adapted}
    found, expected = (
        {name: p.grad for name, p in learner.named_parameters() if p.grad is not None} for learner in (together, alone)
    )
    assert found.keys() == {name for name, _ in together.named_parameters()} - fixed
    assert all(grad.isfinite().all() and grad.any() for grad in found.values())
    assert relative_error(found, expected) < 1e-10

    result = together.evaluate(batch)
    adapted = alone.adapt(batch.support[0][1], batch.support[1][1])
    torch.testing.assert_close(adapted(batch.query[0][1]), result.outputs[1], rtol=1e-10, atol=1e-10)
    after = adapted.state_dict()
    assert {
        name for name, _ in adapted.named_parameters() if not torch.equal(after[name], before[f"model.{name}"])
    } == {*together.adapted}
    for learner in (together, alone):
        assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
