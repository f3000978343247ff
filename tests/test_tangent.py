"""Meta-RKHS II: a model's tangent adapts as kernel regression with the tangent kernel does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev

import innerloop as il


def one_hot_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - F.one_hot(target, output.shape[-1])).square().mean()


def line(**options: Any) -> tuple[il.MetaLearner, il.Task]:
    torch.manual_seed(0)
    model = il.models.Tangent(il.models.MLP([1, 8, 8, 1], activation=torch.nn.Tanh)).double()
    learner = il.MetaLearner(model, "named:move.*", loss=F.mse_loss, **options)
    return learner, il.tasks.sinusoid(shots=6, queries=5).batch("train", 0, 2).to(dtype=torch.float64)


def pictures(**options: Any) -> tuple[il.MetaLearner, il.Task]:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 1, 8, 8).double()
    y = torch.arange(2).repeat(8).expand(2, -1)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.BatchNorm2d(3), torch.nn.Tanh(), torch.nn.MaxPool2d(4),
        torch.nn.Flatten(), torch.nn.Linear(12, 2),
    )  # fmt: skip
    learner = il.MetaLearner(
        il.models.Tangent(net).double(), "named:move.*", loss=one_hot_error, chunk_size=1, **options
    )
    return learner, il.Task((x[:, :6], y[:, :6]), (x[:, 6:], y[:, 6:]))


def kernels(learner: il.MetaLearner, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K(X, X), K(x, X), f(X) and f(x) of the base, all outputs in one row."""
    base: Any = learner.model.base
    tree = {name: value.detach() for name, value in base.named_parameters()}
    parts = []
    for inputs in (support, query):
        jacobian = jacrev(lambda tree, inputs=inputs: functional_call(base, tree, (inputs,)).flatten())(tree)
        parts.append(torch.cat([value.flatten(1) for value in jacobian.values()], 1))
    values = [base(inputs).detach().flatten() for inputs in (support, query)]
    return parts[0] @ parts[0].mT, parts[1] @ parts[0].mT, *values


SOLVED = {
    "inner": il.NewtonCG(steps=3, iterations=40, weight_decay=1e-2),
    "meta_gradient": il.Implicit(il.CG(40), learn_start=False),
}


def test_the_solved_tangent_is_kernel_ridge_regression() -> None:
    learner, batch = line(**SOLVED)
    found = learner.evaluate(batch).outputs.flatten(1)
    for task in range(2):
        (x, y), (z, _) = ((part[task] for part in pair) for pair in batch)
        gram, across, here, there = kernels(learner, x, z)
        ridge = 1e-2 * len(y) / 2 * torch.eye(len(y))
        expected = there - across @ torch.linalg.solve(gram + ridge, here - y.flatten())
        torch.testing.assert_close(found[task], expected, rtol=1e-7, atol=1e-9)


def test_steps_of_the_tangent_approach_the_published_exponential() -> None:
    time, errors = 0.1, []
    for steps in (200, 400):
        learner, batch = line(inner=il.SGD(lr=6 / 2 * time / steps, steps=steps), meta_gradient=il.FirstOrder())
        (x, y), (z, _) = ((part[0] for part in pair) for pair in batch)
        gram, across, here, there = kernels(learner, x, z)
        change = torch.linalg.solve(gram, torch.linalg.matrix_exp(-time * gram) - torch.eye(6))
        expected = there + across @ change @ (here - y.flatten())
        errors.append((learner.evaluate(batch).outputs[0].flatten() - expected).abs().max().item())
        assert (expected - there).abs().max() > 0.1, "otherwise nothing is adapted"
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("problem", [line, pictures])
@pytest.mark.parametrize(
    "options",
    [SOLVED, {"inner": il.SGD(lr=0.05, steps=3), "meta_gradient": il.Unrolled(learn_start=False)}],
    ids=["solved", "steps"],
)
def test_the_meta_gradient_is_that_of_finite_differences(problem: Any, options: dict[str, Any]) -> None:
    learner, batch = problem(**options)
    learner.meta_step(batch)
    assert all(value.grad is None or not value.grad.any() for value in learner.model.move), "every task begins at zero"
    h = 1e-5
    for value in learner.model.base.parameters():
        place = int(value.grad.abs().argmax())
        found, losses = value.grad.flatten()[place].item(), []
        for shift in (h, -2 * h, h):
            with torch.no_grad():
                value.view(-1)[place] += shift
            losses.append(learner.evaluate(batch).loss.mean().item())
        assert found == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-8)


def test_an_adapted_tangent_stands_alone_and_adapts_its_copy_alone() -> None:
    learner, batch = line(**SOLVED)
    (x, y), (z, _) = ((part[0] for part in pair) for pair in batch)
    adapted = learner.adapt(x, y)
    bases: list[Any] = [adapted.base, learner.model.base]
    torch.testing.assert_close(adapted(z), learner.evaluate(batch).outputs[0])
    pairs = zip(*(base.parameters() for base in bases), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="has no parameters"):
        il.models.Tangent(torch.nn.ReLU())
