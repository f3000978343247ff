"""The faster way of max-pooling is torch's in every number and every derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop as il
from innerloop import pooling
from innerloop.pooling import Pool


def images(*shape: int, ties: bool = False) -> Tensor:
    drawn = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (drawn.round() if ties else drawn).requires_grad_()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 28, 28), (4, 8, 27, 25), (16, 40, 42), (2, 3, 8, 22, 24)])
@pytest.mark.parametrize(
    "settings",
    [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "ceil_mode": True}],
)
def test_values_and_two_derivatives_are_torchs(shape: tuple[int, ...], settings: dict[str, Any], ties: bool) -> None:
    inputs = images(*shape, ties=ties)
    assert inputs.numel() >= pooling.LEAST

    def derivatives(pool: nn.Module) -> list[Tensor]:
        pooled = pool(inputs) if inputs.ndim < 5 else torch.func.vmap(pool)(inputs)
        weights = torch.linspace(-1, 1, pooled.numel(), dtype=torch.float64).view_as(pooled).requires_grad_()
        (grad,) = torch.autograd.grad(pooled, inputs, weights, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), weights)
        return [pooled, grad, again]

    for found, expected in zip(derivatives(Pool(**settings)), derivatives(nn.MaxPool2d(**settings)), strict=True):
        assert torch.equal(found, expected)


def test_forward_mode_over_the_gradient() -> None:
    inputs, tangent = images(3, 16, 28, 28).detach(), images(3, 16, 28, 28).detach() + 1

    def tangents(pool: nn.Module) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(lambda image: pool(image).pow(3).sum())
        return torch.func.jvp(pool, (inputs,), (tangent,)) + torch.func.jvp(gradient, (inputs,), (tangent,))

    for found, expected in zip(tangents(Pool(2)), tangents(nn.MaxPool2d(2)), strict=True):
        assert torch.equal(found, expected)


def test_gradients_per_image_under_vmap() -> None:
    inputs = images(3, 1, 16, 30, 30).detach()

    def loss(pool: nn.Module) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda image: pool(image).square().sum()))(inputs)

    assert torch.equal(loss(Pool(2)), loss(nn.MaxPool2d(2)))


def test_small_images_and_turned_ones_go_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling._Maximum, "apply", None)
    for inputs in (images(1, 1, 4, 4), images(3, 16, 28, 28).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(Pool(2)(inputs), F.max_pool2d(inputs, 2))


def test_a_learner_pools_so_and_hands_out_torchs_own_layers() -> None:
    model = il.models.Conv4(in_channels=1, filters=8)
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2))
    assert sum(type(module) is Pool for module in learner.modules()) == 4
    adapted = learner.adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
    for given in (model, adapted):
        assert sum(type(module) is nn.MaxPool2d for module in given.modules()) == 4


def test_layers_that_return_places_or_are_anothers_stay() -> None:
    class Own(nn.MaxPool2d):
        pass

    layers = nn.Sequential(nn.MaxPool2d(2, return_indices=True), Own(2))
    pooling.convert(layers)
    assert [type(layer) for layer in layers] == [nn.MaxPool2d, Own]
