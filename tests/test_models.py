"""The models: shapes, sizes as published, blocks, and second derivatives."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, replace_all_batch_norm_modules_
from torch.nn import functional as F

from innerloop.models import MLP, Conv4, ResNet12

CONV4_VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
    # name: arguments, image side, features below the head
    "glyphs": (dict(in_channels=1), 28, 64),
    "omniglot-maml": (dict(in_channels=1, downsample="stride", spatial_mean=True), 28, 64),
    "omniglot-imaml": (dict(in_channels=1, downsample="stride"), 28, 256),
    "cifar-fs": (dict(), 32, 256),
    "mini-imagenet-maml": (dict(filters=32, size=84), 84, 800),
    "mini-imagenet-anil": (dict(size=84), 84, 1600),
}


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("variant", CONV4_VARIANTS)
def test_conv4_variants_have_the_features_of_the_papers(variant: str) -> None:
    arguments, side, features = CONV4_VARIANTS[variant]
    model = Conv4(ways=7, **arguments)
    images = torch.rand(3, arguments.get("in_channels", 3), side, side)
    assert model.head.in_features == features
    assert model(images).shape == (3, 7)
    assert model[:-1](images).shape == (3, features)


@pytest.mark.parametrize(("filters", "published"), [(64, 113_088), (32, 28_896)])
@pytest.mark.parametrize("downsample", ["pool", "stride"])
def test_conv4_backbone_has_the_published_size(
    filters: int, published: int, downsample: Literal["pool", "stride"]
) -> None:
    assert parameter_count(Conv4(filters=filters, downsample=downsample)[:-1]) == published


def test_resnet12_backbone_has_the_published_size() -> None:
    assert parameter_count(ResNet12()[:-1]) == 12_424_320


def test_mlp_of_the_sinusoids() -> None:
    model = MLP([1, 40, 40, 1])
    assert parameter_count(model) == 1 * 40 + 40 + 40 * 40 + 40 + 40 * 1 + 1
    assert model(torch.rand(10, 1)).shape == (10, 1)
    assert list(dict(model.named_children())) == ["layer1", "activation1", "layer2", "activation2", "head"]


@pytest.mark.parametrize("side", [28, 32, 84])
def test_resnet12_takes_images_of_any_size(side: int) -> None:
    model = ResNet12(in_channels=1, ways=4, widths=(4, 5, 6, 7))
    assert model(torch.rand(2, 1, side, side)).shape == (2, 4)


@pytest.mark.parametrize("model", [Conv4(filters=4), ResNet12(widths=(4, 4, 4, 4))], ids=["Conv4", "ResNet12"])
def test_image_models_are_four_blocks_and_a_head(model: nn.Sequential) -> None:
    with_parameters = [name for name, child in model.named_children() if parameter_count(child)]
    assert with_parameters == ["block1", "block2", "block3", "block4", "head"]


def test_a_slice_shares_the_weights_and_composes() -> None:
    model = Conv4(in_channels=1, filters=4).eval()
    images = torch.rand(2, 1, 28, 28)
    backbone = model[:-1]
    assert type(backbone) is nn.Sequential
    assert all(mine is theirs for mine, theirs in zip(backbone.parameters(), model.parameters(), strict=False))
    assert model[-1] is model.head
    torch.testing.assert_close(model.head(backbone(images)), model(images), rtol=0, atol=0)


def test_conv4_starts_xavier_uniform_with_zero_biases() -> None:
    model = Conv4()
    for layer in (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))):
        fan_out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
        bound = math.sqrt(6 / (fan_in + fan_out * layer.weight[0, 0].numel()))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is not None
        assert not layer.bias.any()


def test_conv4_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="'avg': choose 'pool' or 'stride'"):
        Conv4(downsample="avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="16x16 or more, not 12x12"):
        Conv4(size=12)
    with pytest.raises(ValueError, match=r"built for 32x32 images, 256 features, .* make 1600: pass size="):
        Conv4()(torch.rand(1, 3, 84, 84))


def test_mlp_refuses_fewer_than_two_sizes() -> None:
    with pytest.raises(ValueError, match=r"sizes is \[5\]: give inputs"):
        MLP([5])


SMALL_MODELS = {
    "conv4": (lambda: Conv4(in_channels=1, filters=3), (6, 1, 28, 28)),
    "conv4-stride-mean": (
        lambda: Conv4(in_channels=1, filters=3, downsample="stride", spatial_mean=True),
        (6, 1, 28, 28),
    ),
    "resnet12": (lambda: ResNet12(in_channels=1, widths=(2, 3, 4, 5)), (6, 1, 28, 28)),
    "mlp": (lambda: MLP([4, 8, 5], nn.Tanh), (6, 4)),
}


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_hessian_products_agree_with_double_backward(name: str) -> None:
    build, shape = SMALL_MODELS[name]
    torch.manual_seed(0)
    model = replace_all_batch_norm_modules_(build().double())
    inputs, targets = torch.rand(shape, dtype=torch.float64), torch.arange(shape[0]) % 5
    params = {key: value.detach() for key, value in model.named_parameters()}
    direction = {key: torch.randn_like(value) for key, value in params.items()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (inputs,)), targets)

    forward_over_reverse = jvp(grad(loss), (params,), (direction,))[1]

    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    gradients = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    along = torch.stack([(g * v).sum() for g, v in zip(gradients, direction.values(), strict=True)]).sum()
    double_backward = torch.autograd.grad(along, list(leaves.values()))

    for product, expected in zip(forward_over_reverse.values(), double_backward, strict=True):
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}")
