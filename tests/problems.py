"""The shared table: small models and tasks that every estimator, inner solver and subset is tried on, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop as il

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 2, 2


class EncoderClassifier(nn.Sequential):
    """A transformer encoder layer over a short sequence, mean-pooled, then a linear head."""

    class Mean(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.mean(1)

    def __init__(self) -> None:
        encoder = nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.0, batch_first=True, activation="gelu")
        super().__init__(nn.Linear(4, 6), encoder, self.Mean(), nn.Linear(6, WAYS))


class PlainGRU(nn.Module):
    """A gated recurrent unit written in plain operations, so that it can be vmapped."""

    def __init__(self, inputs: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs + hidden, 2 * hidden)
        self.candidate = nn.Linear(inputs + hidden, hidden)
        self.head = nn.Linear(hidden, WAYS)
        self.hidden = hidden

    def forward(self, inputs: Tensor) -> Tensor:
        state = inputs.new_zeros(len(inputs), self.hidden)
        for moment in inputs.unbind(1):
            reset, update = self.gates(torch.cat([moment, state], 1)).sigmoid().chunk(2, 1)
            candidate = self.candidate(torch.cat([moment, reset * state], 1)).tanh()
            state = update * state + (1 - update) * candidate
        return self.head(state)


class SharedWeights(nn.Module):
    """One matrix used twice, and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(6, WAYS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).tanh()).tanh())


# name -> (model, shape of one input, pattern for Blocks or globs for Named)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], il.Blocks | il.Named]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, WAYS)), (6,), il.Named("0.weight")),
    "mlp": (lambda: il.models.MLP((6, 8, 8, WAYS), activation=nn.Tanh), (6,), il.Blocks("011")),
    "conv4": (
        lambda: il.models.Conv4(in_channels=1, ways=WAYS, filters=3, downsample="stride"),
        (1, 28, 28),
        il.Blocks("00101"),
    ),
    "encoder": (EncoderClassifier, (3, 4), il.Blocks("010")),
    "gru": (PlainGRU, (3, 4), il.Named("candidate.*", "head.bias")),
}

SOLVERS: dict[str, Callable[[int], il.inner.InnerSolver]] = {
    "sgd": lambda steps: il.SGD(lr=0.1, steps=steps, weight_decay=0.02, proximal=0.1),
    "momentum": lambda steps: il.Momentum(lr=0.05, steps=steps, momentum=0.8),
    "adam": lambda steps: il.Adam(lr=0.02, steps=steps, eps=1e-3),
    "adamw": lambda steps: il.AdamW(lr=0.02, steps=steps, eps=1e-3, weight_decay=0.3),
    "clip": lambda steps: il.Momentum(lr=0.1, steps=steps, momentum=0.5, weight_decay=0.02, proximal=0.1, clip=0.3),
    "schedule": lambda steps: il.SGD(lr=lambda step: 0.2 / (1 + step), steps=steps),
    "groups": lambda steps: il.Adam(lr={"*t": 0.01, "*": lambda step: 0.02 + 0.01 * step}, steps=steps, eps=1e-3),
    "rates": lambda steps: il.LearnedRates(lr=0.1, steps=steps),
    "layer-step": lambda steps: il.LearnedRates(lr=0.1, steps=steps, per="layer-step"),
    "alfa": lambda steps: il.ALFA(lr=0.1, steps=steps, decay=0.3),
}


def subset(model: str, name: str) -> il.adapts.Adapts:
    """The choice of adapted parameters called ``everything``, ``head``, ``body`` or ``pattern``."""
    choices: dict[str, il.adapts.Adapts] = {
        "everything": il.Everything(),
        "head": il.Head(),
        "body": il.Body(),
        "pattern": MODELS[model][2],
    }
    return choices[name]


def every_pair(*axes: Iterable[Any], allowed: Callable[..., bool] = lambda *row: True) -> list[tuple[Any, ...]]:
    """A few rows of the product of ``axes`` that hold every pair of values of two axes that an allowed row holds.

    For grids in which a fault shows in each pair that meets it, whatever the other axes hold.
    """
    rows = {row: set(combinations(enumerate(row), 2)) for row in product(*axes) if allowed(*row)}
    missing = set().union(*rows.values())
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(rows[row] & missing)))
        missing -= rows[chosen[-1]]
    return chosen


@functools.cache
def model_and_batch(name: str) -> tuple[nn.Module, il.Task]:
    """A model of the table and a batch of tasks for it, in float64, always the same."""
    build, shape, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build().double()
        support = torch.randn(TASKS, WAYS * SHOTS, *shape, dtype=torch.float64)
        query = torch.randn(TASKS, WAYS * QUERIES, *shape, dtype=torch.float64)
    labels = torch.arange(WAYS).repeat_interleave(2).expand(TASKS, -1).contiguous()
    return model, il.Task((support, labels), (query, labels))


def network(seed: int | None = None) -> tuple[il.Problem, dict[str, Tensor], il.Task]:
    """A tanh net to regress with; meta-learned are its start and, inside the inner loss, a weight for each example.

    With a seed, its hidden units are dropped at random in the inner loss.
    """
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def residuals(params: dict[str, Tensor], batch: tuple[Tensor, Tensor], drop: bool) -> Tensor:
        hidden = (batch[0] @ params["in"]).tanh()
        return ((F.dropout(hidden, 0.3) if drop else hidden) @ params["out"] - batch[1]).square()

    meta = {"in": normal(3, 4), "out": normal(4), "weights": normal(8) / 2}
    problem = il.Problem(
        lambda meta: {name: meta[name] for name in ("in", "out")},
        lambda params, meta, batch: (meta["weights"].exp() * residuals(params, batch, seed is not None)).mean(),
        lambda params, meta, batch: residuals(params, batch, False).mean(),
        seed,
    )
    return problem, meta, il.Task((normal(8, 3), normal(8)), (normal(8, 3), normal(8)))


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two trees over the norm of the expected one."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
