"""Exact estimators against plain autograd through the unrolled loop, over the whole shared table, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop as il
from innerloop.inner import InnerSolver, bind
from problems import MODELS, SOLVERS, combinations, model_and_batch, relative_error, subset
from reference import meta_gradient


def learner_for(model: str, solver: str, chosen: str, steps: int, **settings) -> il.MetaLearner:
    return il.MetaLearner(model_and_batch(model)[0], subset(model, chosen), SOLVERS[solver](steps), **settings)


def gradients(learner: il.MetaLearner, batch: il.Task, step_weights=None) -> tuple[dict, torch.Tensor]:
    metrics = learner.meta_step(batch, step_weights)
    return {name: p.grad for name, p in learner.named_parameters()}, metrics.loss


WALKED = il.Unrolled(record=False)


@pytest.mark.parametrize(("model", "solver", "chosen", "steps"), combinations())
def test_unrolled_is_plain_autograd(model, solver, chosen, steps):
    """With the graphs of all steps, which a learner keeps for models so small, and with a product a step in place."""
    batch = model_and_batch(model)[1]
    expected = None
    for estimator, products in ((None, 0), (WALKED, steps)):
        learner = learner_for(model, solver, chosen, steps, meta_gradient=estimator)
        metrics = learner.meta_step(batch)
        assert metrics.diagnostics["curvature_products"] == products
        expected = expected or meta_gradient(learner, batch)
        assert relative_error({name: p.grad for name, p in learner.named_parameters()}, expected[0]) < 1e-9
        assert metrics.loss.item() == pytest.approx(expected[1].item(), rel=1e-12)


@pytest.mark.parametrize("model", ["mlp", "conv4", "encoder"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["head", "pattern"])
@pytest.mark.parametrize("estimator", [il.Unrolled(), WALKED], ids=repr)
def test_frozen_prefix_changes_nothing(model, solver, chosen, estimator):
    batch = model_and_batch(model)[1]
    reusing = learner_for(model, solver, chosen, 3, meta_gradient=estimator)
    assert reusing.few_shot.prefix is not None
    plain = learner_for(model, solver, chosen, 3, reuse_prefix=False, meta_gradient=estimator)
    assert plain.few_shot.prefix is None
    assert relative_error(gradients(reusing, batch)[0], gradients(plain, batch)[0]) < 1e-12


WAYS_BACK = {
    "walked": WALKED,
    "recorded": il.Unrolled(record=True),
    "two copies": il.Unrolled(copies=2),
    "three copies on the CPU": il.Unrolled(copies=3, offload=True),
}


@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.0, 0.3, 0.4]])
@pytest.mark.parametrize("chosen", ["everything", "pattern"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_way_back_is_plain_autograd(solver, chosen, weights, way):
    batch = model_and_batch("mlp")[1]
    learner = learner_for("mlp", solver, chosen, 5, meta_gradient=WAYS_BACK[way])
    found, loss = gradients(learner, batch, weights)
    expected, expected_loss = meta_gradient(learner, batch, weights)
    assert relative_error(found, expected) < 1e-9
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize("model", MODELS)
def test_every_way_back_goes_through_every_model(model, way):
    batch = model_and_batch(model)[1]
    learner = learner_for(model, "adamw", "pattern", 4, meta_gradient=WAYS_BACK[way])
    found, loss = gradients(learner, batch)
    expected, expected_loss = meta_gradient(learner, batch)
    assert relative_error(found, expected) < 1e-9
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("settings", [{"copies": n} for n in (2, 3, 4, 7)] + [{"copies": 3, "offload": True}], ids=str)
def test_fewer_copies_change_nothing(solver, settings):
    batch = model_and_batch("mlp")[1]
    full, _ = gradients(learner_for("mlp", solver, "everything", 7, meta_gradient=WALKED), batch)
    learner = learner_for("mlp", solver, "everything", 7, meta_gradient=il.Unrolled(**settings))
    assert relative_error(gradients(learner, batch)[0], full) < 1e-14


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["everything", "head"])
@pytest.mark.parametrize("estimator", [il.Unrolled(), WALKED], ids=repr)
def test_multi_step_loss_is_plain_autograd(solver, chosen, estimator):
    batch, weights = model_and_batch("conv4")[1], [0.1, 0.2, 0.0, 0.7]
    learner = learner_for("conv4", solver, chosen, 4, meta_gradient=estimator)
    found, loss = gradients(learner, batch, weights)
    expected, expected_loss = meta_gradient(learner, batch, weights)
    assert relative_error(found, expected) < 1e-9
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_truncation_to_all_steps_is_exact_and_to_none_is_not(solver):
    batch = model_and_batch("mlp")[1]
    exact, _ = gradients(learner_for("mlp", solver, "everything", 3, meta_gradient=WALKED), batch)
    whole, _ = gradients(learner_for("mlp", solver, "everything", 3, meta_gradient=il.Truncated(3)), batch)
    none, _ = gradients(learner_for("mlp", solver, "everything", 3, meta_gradient=il.Truncated(0)), batch)
    assert relative_error(whole, exact) < 1e-14
    assert relative_error(none, exact) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["everything", "head"])
@pytest.mark.parametrize("horizon", [0, 1, 2])
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.0, 0.7]])
def test_truncated_is_autograd_with_the_earlier_inner_gradients_detached(solver, chosen, horizon, weights):
    batch = model_and_batch("mlp")[1]
    learner = learner_for("mlp", solver, chosen, 4, meta_gradient=il.Truncated(horizon))
    found, loss = gradients(learner, batch, weights)
    expected, expected_loss = meta_gradient(learner, batch, weights, horizon=horizon)
    assert relative_error(found, expected) < 1e-12
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["everything", "head", "pattern"])
def test_first_order_is_autograd_with_constant_inner_gradients(solver, chosen):
    batch = model_and_batch("mlp")[1]
    learner = learner_for("mlp", solver, chosen, 4, meta_gradient=il.FirstOrder())
    assert relative_error(gradients(learner, batch)[0], meta_gradient(learner, batch, horizon=0)[0]) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.0, 0.7]])
def test_truncation_to_no_step_is_first_order(solver, weights):
    batch = model_and_batch("mlp")[1]
    (found, loss), (expected, expected_loss), (_, whole) = (
        gradients(learner_for("mlp", solver, "everything", 4, meta_gradient=estimator), batch, weights)
        for estimator in (il.Truncated(0), il.FirstOrder(), il.Unrolled())
    )
    assert relative_error(found, expected) == 0
    assert loss.item() == expected_loss.item() == pytest.approx(whole.item(), rel=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.0, 0.3, 0.4]])
def test_a_mixture_is_the_weighted_sum_of_truncations(solver, weights):
    batch, shares = model_and_batch("mlp")[1], {0: 0.1, 3: 0.2, 1: 0.3, 5: 0.4}
    mixed = il.Mixed(tuple(shares), tuple(shares.values()))
    found, loss = gradients(learner_for("mlp", solver, "everything", 5, meta_gradient=mixed), batch, weights)
    parts = {
        horizon: gradients(
            learner_for("mlp", solver, "everything", 5, meta_gradient=il.Truncated(horizon)), batch, weights
        )
        for horizon in shares
    }
    expected = {name: sum(share * parts[horizon][0][name] for horizon, share in shares.items()) for name in found}
    assert relative_error(found, expected) < 1e-13
    assert loss.item() == pytest.approx(parts[0][1].item(), rel=1e-14)


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
