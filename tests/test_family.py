"""The wider family: solvers and estimators beside the five papers, against formulas and draws of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import innerloop as il
from problems import model_and_batch, relative_error, subset
from reference import meta_gradient

Tree = dict[str, Tensor]

# --- ALFA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("settings", [{}, {"attenuate": True}, {"detach": True}, {"attenuate": True, "detach": True}])
def test_a_trained_alfa_has_the_meta_gradient_of_autograd(settings, record):
    """Away from the first values, where the network gives each tensor another rate."""
    model, batch = model_and_batch("mlp")
    inner = il.ALFA(lr=0.1, steps=3, decay=0.3, **settings)
    learner = il.MetaLearner(model, subset("mlp", "pattern"), inner, il.Unrolled(record=record))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for rate in learner.rates.values():
            rate += 0.3 * rate.abs().mean() * torch.randn(rate.shape, generator=generator, dtype=torch.float64)
    learner.meta_step(batch)
    found = {name: p.grad for name, p in learner.named_parameters()}
    expected, _ = meta_gradient(learner, batch)
    for part in ("model.", "rates."):
        mine, wanted = ({n: g for n, g in each.items() if n.startswith(part)} for each in (found, expected))
        assert relative_error(mine, wanted) < 1e-10
    assert all(found[name].any() for name in found if name.startswith("rates."))


def test_alfa_starts_near_its_rate_and_goes_on_with_the_last_column():
    params = {"w": torch.ones(4), "b": torch.zeros(2)}
    inner = il.ALFA(lr=0.1, steps=2, decay=0.0)
    learned = inner.learned(params)
    assert all(torch.equal(value, learned[name]) for name, value in inner.learned(params).items())
    grad = {"w": torch.full((4,), 0.2), "b": torch.full((2,), -0.1)}
    (first, _), (second, _), (beyond, _) = (inner.update(k, params, grad, {}, learned, params) for k in (0, 1, 9))
    for name in params:
        torch.testing.assert_close(first[name], params[name] - 0.1 * grad[name], rtol=0.05, atol=1e-3)
        assert torch.equal(second[name], beyond[name])


@pytest.mark.parametrize(("settings", "message"), [({"decay": -1}, "0 or more"), ({"attenuate": True}, "steps=2")])
def test_alfa_outside_its_ranges_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        il.ALFA(lr=0.1, steps=1, **settings)


# --- CAVIA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda size: il.models.MLP((6, 8, 8, 3), torch.nn.Tanh, context=size), (6,)),
        (lambda size: il.models.Conv4(in_channels=1, ways=3, filters=3, downsample="stride", context=size), (1, 28, 28)),
    ],
    ids=["mlp", "conv4"],
)
def test_a_context_begins_at_zero_where_it_changes_nothing(build, shape):
    torch.manual_seed(0)
    model, plain, inputs = build(4).double(), build(None).double(), torch.randn(5, *shape, dtype=torch.float64)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(inputs), plain(inputs))
    batch = il.Task(*2 * [(inputs.expand(2, *inputs.shape), torch.tensor([0, 1, 2, 0, 1]).expand(2, -1))])
    learner = il.MetaLearner(model, il.Named("*.context"), il.SGD(lr=1.0, steps=2), il.Unrolled(learn_start=False))
    learner.meta_step(batch)
    expected, _ = meta_gradient(learner, batch)
    found = {f"model.{name}": p.grad for name, p in learner.model.named_parameters()}
    (context,) = (name for name in found if name.endswith("context"))
    assert found.pop(context) is None
    expected.pop(context)
    assert relative_error(found, expected) < 1e-9
    adapted = learner.adapt(*(part[0] for part in batch.support))
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, learner.model.get_parameter(n))}
    assert moved == {context.removeprefix("model.")}


def test_cavia_learns_sinusoids():
    torch.manual_seed(0)
    model = il.models.MLP((1, 40, 40, 1), context=5)
    learner = il.MetaLearner(
        model, "named:*.context", il.SGD(lr=1.0, steps=2), il.Unrolled(learn_start=False), torch.nn.functional.mse_loss
    )
    tasks = il.tasks.sinusoid()
    il.fit(
        learner, tasks, steps=150, tasks_per_batch=25, validation_tasks=0, progress=False, clip=10.0,
        optimizer=torch.optim.Adam(learner.parameters(), lr=5e-3),
    )  # fmt: skip
    curve = learner.evaluate(tasks.batch("test", 0, 50), curve=True).loss_curve.mean(0)
    assert curve[-1] < 0.6 * curve[0]
    assert not learner.model.get_parameter("film.context").any()


def test_a_context_needs_a_size_and_a_hidden_layer():
    with pytest.raises(ValueError, match="1 or more"):
        il.models.Conv4(context=0)
    with pytest.raises(ValueError, match="hidden widths"):
        il.models.MLP((1, 1), context=5)
