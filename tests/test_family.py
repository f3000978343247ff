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
