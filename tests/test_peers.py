"""The same meta-gradient as other libraries give, where they are installed: the extra ``[peers]``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop as il
from problems import model_and_batch, relative_error

LR, STEPS = 0.1, 3
Batch = tuple[Tensor, Tensor]


def by_higher(model: nn.Module, support: Batch, query: Batch) -> None:
    higher = pytest.importorskip("higher")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (adapted, inner):
        for _ in range(STEPS):
            inner.step(F.cross_entropy(adapted(support[0]), support[1]))
        F.cross_entropy(adapted(query[0]), query[1]).backward()


def by_torchopt(model: nn.Module, support: Batch, query: Batch) -> None:
    torchopt = pytest.importorskip("torchopt")
    inner = torchopt.MetaSGD(model, lr=LR)
    start = torchopt.extract_state_dict(model, by="reference")
    for _ in range(STEPS):
        inner.step(F.cross_entropy(model(support[0]), support[1]))
    F.cross_entropy(model(query[0]), query[1]).backward()
    torchopt.recover_state_dict(model, start)


def by_torch_maml(model: nn.Module, support: Batch, query: Batch, **settings: int) -> None:
    torch_maml = pytest.importorskip("torch_maml")
    kind = torch_maml.GradientCheckpointMAML if settings else torch_maml.NaiveMAML
    maml = kind(
        model,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        optimizer=torch_maml.IngraphGradientDescent(LR),
        **settings,
    )
    adapted = maml([support] * STEPS).model
    F.cross_entropy(adapted(query[0]), query[1]).backward()


def by_torch_maml_checkpointed(model: nn.Module, support: Batch, query: Batch) -> None:
    by_torch_maml(model, support, query, checkpoint_steps=2)


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("name", ["mlp", "conv4", "gru"])
@pytest.mark.parametrize("estimator", [il.Unrolled(), il.Unrolled(copies=2), il.Unrolled(record=False)], ids=repr)
@pytest.mark.parametrize("peer", [by_higher, by_torchopt, by_torch_maml, by_torch_maml_checkpointed])
def test_unrolled_agrees_with(peer: Callable[[nn.Module, Batch, Batch], None], estimator: il.Unrolled, name: str):
    model, batch = model_and_batch(name)
    learner = il.MetaLearner(model, inner=il.SGD(lr=LR, steps=STEPS), meta_gradient=estimator)
    learner.meta_step(batch)
    found = {key: p.grad for key, p in learner.model.named_parameters() if p.grad is not None}

    theirs = il.MetaLearner(model).model  # the same model, batch norm without running statistics
    tasks = len(batch.support[1])
    for task in range(tasks):
        peer(theirs, *((x[task], y[task]) for x, y in batch))
    expected = {key: p.grad / tasks for key, p in theirs.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) < 1e-12
