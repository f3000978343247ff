"""Exact estimators against plain autograd through the unrolled loop, over the whole shared table, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop as il
from innerloop.inner import InnerSolver, bind
from innerloop.meta_gradient import MetaGradient
from problems import MODELS, SOLVERS, every_pair, model_and_batch, relative_error, subset
from reference import meta_gradient


def learner_for(model: str, solver: str, chosen: str, steps: int, **settings) -> il.MetaLearner:
    return il.MetaLearner(model_and_batch(model)[0], subset(model, chosen), SOLVERS[solver](steps), **settings)


def gradients(learner: il.MetaLearner, batch: il.Task, step_weights=None) -> tuple[dict, torch.Tensor]:
    metrics = learner.meta_step(batch, step_weights)
    return {name: p.grad for name, p in learner.named_parameters()}, metrics.loss


WALKED = il.Unrolled(record=False)


ROWS = every_pair(
    MODELS, SOLVERS, ("everything", "head", "body", "pattern"), (1, 2, 5), (False, True),
    allowed=lambda model, solver, chosen, *_: model != "linear" or chosen not in ("head", "body"),  # it is all head
)  # fmt: skip


@pytest.mark.parametrize(("model", "solver", "chosen", "steps", "weighted"), ROWS)
def test_every_way_back_is_plain_autograd(model, solver, chosen, steps, weighted):
    """With the graphs of all steps, which a learner keeps for models so small; and from all states or some of them."""
    batch, weights = model_and_batch(model)[1], [0.1, 0.2, 0.0, 0.3, 0.4][:steps] if weighted else None
    expected = None
    for estimator in (None, WALKED, il.Unrolled(copies=2), il.Unrolled(copies=3, offload=True)):
        learner = learner_for(model, solver, chosen, steps, meta_gradient=estimator)
        metrics = learner.meta_step(batch, weights)
        assert metrics.diagnostics["curvature_products"] == (steps if estimator else 0)
        expected = expected or meta_gradient(learner, batch, weights)
        assert relative_error({name: p.grad for name, p in learner.named_parameters()}, expected[0]) < 1e-9
        assert metrics.loss.item() == pytest.approx(expected[1].item(), rel=1e-12)


@pytest.mark.parametrize(
    ("model", "solver", "chosen", "estimator"),
    every_pair(("mlp", "conv4", "encoder"), SOLVERS, ("head", "pattern"), (il.Unrolled(), WALKED)),
)
def test_frozen_prefix_changes_nothing(model, solver, chosen, estimator):
    batch = model_and_batch(model)[1]
    reusing = learner_for(model, solver, chosen, 3, meta_gradient=estimator)
    assert reusing.few_shot.prefix is not None
    plain = learner_for(model, solver, chosen, 3, reuse_prefix=False, meta_gradient=estimator)
    assert plain.few_shot.prefix is None
    assert relative_error(gradients(reusing, batch)[0], gradients(plain, batch)[0]) < 1e-12


@pytest.mark.parametrize("solver", ["sgd", "momentum", "adam", "layer-step", "alfa"])  # each with a state of its own
def test_fewer_copies_change_nothing(solver):
    batch = model_and_batch("mlp")[1]
    full, _ = gradients(learner_for("mlp", solver, "everything", 7, meta_gradient=WALKED), batch)
    for settings in (*({"copies": n} for n in (2, 3, 4, 7)), {"copies": 3, "offload": True}):
        learner = learner_for("mlp", solver, "everything", 7, meta_gradient=il.Unrolled(**settings))
        assert relative_error(gradients(learner, batch)[0], full) < 1e-14, settings


@pytest.mark.parametrize("solver", SOLVERS)
def test_recording_task_by_task_and_all_at_once_changes_nothing(solver):
    """Outside vmap plain autograd keeps the graph, inside a transform of torch.func does."""
    batch = model_and_batch("conv4")[1]
    walked, recorded, alone = (
        gradients(learner_for("conv4", solver, "everything", 3, meta_gradient=estimator, chunk_size=size), batch)
        for estimator, size in ((WALKED, None), (il.Unrolled(record=True), None), (il.Unrolled(record=True), 1))
    )
    for found, loss in (recorded, alone):
        assert relative_error(found, walked[0]) < 1e-12
        assert loss.item() == pytest.approx(walked[1].item(), rel=1e-13)


@pytest.mark.parametrize(
    ("solver", "chosen", "weighted"), every_pair(SOLVERS, ("everything", "head", "pattern"), (False, True))
)
def test_truncated_is_autograd_with_the_earlier_inner_gradients_detached(solver, chosen, weighted):
    batch, weights = model_and_batch("mlp")[1], [0.3, 0.0, 0.7] if weighted else None

    def estimate(estimator: MetaGradient) -> tuple[dict, Tensor]:
        return gradients(learner_for("mlp", solver, chosen, 3, meta_gradient=estimator), batch, weights)

    exact, whole = estimate(WALKED)
    found = {}
    for horizon in range(4):
        learner = learner_for("mlp", solver, chosen, 3, meta_gradient=il.Truncated(horizon))
        found[horizon], loss = gradients(learner, batch, weights)
        expected, expected_loss = meta_gradient(learner, batch, weights, horizon=horizon)
        assert relative_error(found[horizon], expected) < 1e-12
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-14)
    assert relative_error(found[3], exact) < 1e-14
    assert relative_error(found[0], exact) > 1e-3

    first, first_loss = estimate(il.FirstOrder())
    assert relative_error(found[0], first) == 0
    assert first_loss.item() == loss.item()


def test_reptile_points_from_the_adapted_parameters_to_the_start():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.Adam(lr=0.01, steps=4, betas=(0.0, 0.999)), meta_gradient=il.Reptile())
    found, _ = gradients(learner, batch)
    for name, start in learner.model.named_parameters():
        adapted = [learner.adapt(x, y).get_parameter(name) for x, y in zip(*batch.support, strict=True)]
        torch.testing.assert_close(found[f"model.{name}"], start.detach() - torch.stack(adapted).mean(0))


@pytest.mark.parametrize("chosen", ["head", "pattern"])
@pytest.mark.parametrize("record", [None, False])
def test_a_start_that_is_not_learned_leaves_the_rest_of_the_gradient_as_it_is(chosen, record):
    batch = model_and_batch("conv4")[1]
    anil, itd_bio = (
        learner_for("conv4", "momentum", chosen, 3, meta_gradient=il.Unrolled(record=record, learn_start=learned))
        for learned in (True, False)
    )
    found, expected = gradients(itd_bio, batch)[0], gradients(anil, batch)[0]
    adapted = {f"model.{name}" for name in anil.adapted}
    assert all(found[name] is None for name in adapted)
    rest = expected.keys() - adapted
    assert relative_error({n: found[n] for n in rest}, {n: expected[n] for n in rest}) < 1e-14


# --- the solvers themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_tables_clip_shortens_gradients_in_every_model(model):
    """Some of the tasks and steps at least; else its row would be that of momentum."""
    batch = model_and_batch(model)[1]
    learner = learner_for(model, "clip", "everything", 5)
    norms = []
    for task in range(len(batch.support[1])):
        loop, _ = learner.loop(torch.utils._pytree.tree_map(lambda value, task=task: value[task], batch))
        loop.run(
            5, lambda _step, _params, _state, grad, _loss: norms.append(torch.nn.utils.get_total_norm(grad.values()))
        )
    assert max(norms) > 1.1 * learner.inner.clip


def torch_optimizer(solver: InnerSolver, params: list[Tensor]) -> torch.optim.Optimizer:
    """What torch calls the same rule."""
    shared: dict[str, Any] = {"lr": solver.lr, "weight_decay": solver.weight_decay}
    if isinstance(solver, il.Adam):
        kind = torch.optim.AdamW if isinstance(solver, il.AdamW) else torch.optim.Adam
        return kind(params, betas=solver.betas, eps=solver.eps, **shared)
    return torch.optim.SGD(params, momentum=solver.momentum if isinstance(solver, il.Momentum) else 0.0, **shared)


TORCHS = [
    il.SGD(lr=0.1, steps=10),
    il.SGD(lr=0.1, steps=10, weight_decay=0.1),
    il.Momentum(lr=0.05, steps=10, momentum=0.8),
    il.Momentum(lr=0.05, steps=10, momentum=0.8, weight_decay=0.1),
    il.Adam(lr=0.02, steps=10),
    il.Adam(lr=0.02, steps=10, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    il.AdamW(lr=0.02, steps=10),
    il.AdamW(lr=0.02, steps=10, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3),
]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("solver", TORCHS, ids=str)
def test_solvers_take_the_steps_of_torchs_optimisers(solver, scheduled, clip):
    """Step by step, with ``torch.nn.utils.clip_grad_norm_`` and ``LambdaLR`` where the solver has such."""

    def loss(params: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((batch[0] @ params["in"]).tanh() @ params["out"] - batch[1]).square().mean()

    steps, first = 10, solver.lr
    schedule = (lambda step: first / (1 + step)) if scheduled else first
    meta = {"in": torch.randn(4, 6, dtype=torch.float64), "out": 2 * torch.randn(6, dtype=torch.float64)}
    batch = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    loop = bind(il.Problem(dict, loss, loss), meta, batch, replace(solver, clip=clip, lr=schedule), {})
    path = [loop.run(count).params for count in range(1, steps + 1)]

    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    optimizer = torch_optimizer(solver, list(leaves.values()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step) if scheduled else 1.0)
    shortened = 0
    for params in path:
        optimizer.zero_grad()
        loss(leaves, {}, batch).backward()
        if clip is not None:
            shortened += bool(torch.nn.utils.clip_grad_norm_(leaves.values(), clip) > clip)
        optimizer.step()
        scheduler.step()
        for name, value in params.items():
            torch.testing.assert_close(value, leaves[name].detach(), rtol=1e-12, atol=1e-12)
    assert clip is None or shortened > 1


def test_adamw_without_weight_decay_is_adam():
    batch = model_and_batch("mlp")[1]
    both = [
        gradients(il.MetaLearner(model_and_batch("mlp")[0], inner=rule(lr=0.02, steps=3, eps=1e-3)), batch)[0]
        for rule in (il.Adam, il.AdamW)
    ]
    assert relative_error(*both) == 0


def test_a_group_without_a_rate_is_refused():
    with pytest.raises(ValueError, match=r"names no rate for 'layer2\.weight'"):
        il.MetaLearner(model_and_batch("mlp")[0], inner=il.SGD(lr={"layer1.*": 0.1}, steps=1))
