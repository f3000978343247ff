"""Exact estimators against plain autograd through the unrolled loop, over the whole shared table, in float64."""

import pytest
import torch

import innerloop as il
from problems import SOLVERS, combinations, model_and_batch, relative_error, subset
from reference import meta_gradient


def learner_for(model: str, solver: str, chosen: str, steps: int, **settings) -> il.MetaLearner:
    return il.MetaLearner(model_and_batch(model)[0], subset(model, chosen), SOLVERS[solver](steps), **settings)


def gradients(learner: il.MetaLearner, batch: il.Task, step_weights=None) -> tuple[dict, torch.Tensor]:
    metrics = learner.meta_step(batch, step_weights)
    return {name: p.grad for name, p in learner.named_parameters()}, metrics.loss


@pytest.mark.parametrize(("model", "solver", "chosen", "steps"), combinations())
def test_unrolled_is_plain_autograd(model, solver, chosen, steps):
    batch = model_and_batch(model)[1]
    learner = learner_for(model, solver, chosen, steps)
    found, loss = gradients(learner, batch)
    expected, expected_loss = meta_gradient(learner, batch)
    assert relative_error(found, expected) < 1e-9
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


@pytest.mark.parametrize("model", ["mlp", "conv4", "encoder"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["head", "pattern"])
def test_frozen_prefix_changes_nothing(model, solver, chosen):
    batch = model_and_batch(model)[1]
    reusing = learner_for(model, solver, chosen, 3)
    assert reusing._prefix is not None
    plain = learner_for(model, solver, chosen, 3, reuse_prefix=False)
    assert plain._prefix is None
    assert relative_error(gradients(reusing, batch)[0], gradients(plain, batch)[0]) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("keep_every", [2, 3, 7, "sqrt"])
def test_thinned_snapshots_change_nothing(solver, keep_every):
    batch = model_and_batch("mlp")[1]
    full, _ = gradients(learner_for("mlp", solver, "everything", 5), batch)
    learner = learner_for("mlp", solver, "everything", 5, meta_gradient=il.Unrolled(keep_every=keep_every))
    assert relative_error(gradients(learner, batch)[0], full) < 1e-14


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["everything", "head"])
def test_multi_step_loss_is_plain_autograd(solver, chosen):
    batch, weights = model_and_batch("conv4")[1], [0.1, 0.2, 0.0, 0.7]
    learner = learner_for("conv4", solver, chosen, 4)
    found, loss = gradients(learner, batch, weights)
    expected, expected_loss = meta_gradient(learner, batch, weights)
    assert relative_error(found, expected) < 1e-9
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_truncation_to_all_steps_is_exact_and_to_none_is_not(solver):
    batch = model_and_batch("mlp")[1]
    exact, _ = gradients(learner_for("mlp", solver, "everything", 3), batch)
    whole, _ = gradients(learner_for("mlp", solver, "everything", 3, meta_gradient=il.Truncated(3)), batch)
    none, _ = gradients(learner_for("mlp", solver, "everything", 3, meta_gradient=il.Truncated(0)), batch)
    assert relative_error(whole, exact) < 1e-14
    assert relative_error(none, exact) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["everything", "head"])
@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_truncated_is_autograd_with_the_earlier_steps_detached(solver, chosen, horizon):
    batch = model_and_batch("mlp")[1]
    learner = learner_for("mlp", solver, chosen, 4, meta_gradient=il.Truncated(horizon))
    assert relative_error(gradients(learner, batch)[0], meta_gradient(learner, batch, horizon=horizon)[0]) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chosen", ["everything", "head", "pattern"])
def test_first_order_is_autograd_with_constant_inner_gradients(solver, chosen):
    batch = model_and_batch("mlp")[1]
    learner = learner_for("mlp", solver, chosen, 4, meta_gradient=il.FirstOrder())
    assert relative_error(gradients(learner, batch)[0], meta_gradient(learner, batch, second_order=False)[0]) < 1e-12


def test_reptile_points_from_the_adapted_parameters_to_the_start():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.Adam(lr=0.01, steps=4, betas=(0.0, 0.999)), meta_gradient=il.Reptile())
    found, _ = gradients(learner, batch)
    for name, start in learner.model.named_parameters():
        adapted = [learner.adapt(x, y).get_parameter(name) for x, y in zip(*batch.support, strict=True)]
        torch.testing.assert_close(found[f"model.{name}"], start.detach() - torch.stack(adapted).mean(0))


@pytest.mark.parametrize("chosen", ["head", "pattern"])
def test_a_start_that_is_not_learned_leaves_the_rest_of_the_gradient_as_it_is(chosen):
    batch = model_and_batch("conv4")[1]
    anil, itd_bio = (
        learner_for("conv4", "momentum", chosen, 3, meta_gradient=il.Unrolled(learn_start=learned))
        for learned in (True, False)
    )
    found, expected = gradients(itd_bio, batch)[0], gradients(anil, batch)[0]
    adapted = {f"model.{name}" for name in anil.adapted}
    assert all(found[name] is None for name in adapted)
    rest = expected.keys() - adapted
    assert relative_error({n: found[n] for n in rest}, {n: expected[n] for n in rest}) < 1e-14
