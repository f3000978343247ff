"""The same meta-gradient as other libraries give, where they are installed: the extra ``[peers]``."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch.nn.functional as F

import innerloop as il
from problems import model_and_batch, relative_error

peers = import_module("peers")  # which the benchmarks race
PEERS = {
    "higher": peers.by_higher,
    "torchopt": peers.by_torchopt,
    "torch_maml": peers.by_torch_maml,
    "torch_maml, no checkpoints": partial(peers.by_torch_maml, checkpoints=False),
}
LR, STEPS = 0.1, 3


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("name", ["mlp", "conv4", "gru"])
@pytest.mark.parametrize("estimator", [il.Unrolled(), il.Unrolled(copies=2), il.Unrolled(record=False)], ids=repr)
@pytest.mark.parametrize("peer", PEERS)
def test_unrolled_agrees_with(peer: str, estimator: il.Unrolled, name: str) -> None:
    pytest.importorskip(peer.partition(",")[0])
    model, batch = model_and_batch(name)
    learner = il.MetaLearner(model, inner=il.SGD(lr=LR, steps=STEPS), meta_gradient=estimator)
    learner.meta_step(batch)
    found = {key: p.grad for key, p in learner.model.named_parameters() if p.grad is not None}

    theirs = il.MetaLearner(model).model  # the same model, batch norm without running statistics
    PEERS[peer](theirs, F.cross_entropy, batch, LR, STEPS)
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) < 1e-12
