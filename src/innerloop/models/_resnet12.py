"""The twelve-layer residual network of the few-shot papers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from innerloop.models._stack import Stack

leaky_relu = partial(nn.LeakyReLU, 0.1)


class ResNet12(Stack):
    """Four residual blocks of three 3x3 convolutions and a 2x2 max-pool, then the spatial mean and a linear head.

    Maps images ``[examples, in_channels, size, size]``, size 16 or more, to scores ``[examples, ways]``. Children:
    ``block1`` to ``block4``, the parameterless ``pool`` and ``flatten``, ``head``; hence five blocks. The default
    widths have 12 424 320 parameters below the head.

    Convolutions start Kaiming-normal (fan out), batch norm with scale 1 and shift 0, the head as PyTorch starts it.
    DropBlock, with which MetaOptNet regularises this network, is left out: it would draw at random in every inner step.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        ways: scores an image.
        widths: channels of the blocks, one a block.

    Raises:
        RuntimeError: from the forward pass, images of which four max-pools leave nothing.

    Sources:
        Oreshkin et al. 2018 (TADAM), arXiv 1805.10123; Lee et al. 2019 (MetaOptNet), arXiv 1904.03758, whose widths,
        slope of 0.1 and 1x1 shortcut with batch norm these are.

    Example:
        >>> il.models.ResNet12(ways=5)(torch.zeros(25, 3, 84, 84)).shape
        torch.Size([25, 5])
    """

    head: nn.Linear

    def __init__(self, in_channels: int = 3, ways: int = 5, widths: Sequence[int] = (64, 160, 320, 640)) -> None:
        inputs = (in_channels, *widths)
        super().__init__(
            **{f"block{n}": ResidualBlock(inputs[n - 1], width) for n, width in enumerate(widths, start=1)},
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(inputs[-1], ways),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")


class ResidualBlock(nn.Module):
    """``[examples, in_channels, s, s]`` to ``[examples, width, s/2, s/2]``: convolutions plus shortcut, pooled."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *conv_norm(in_channels, width, 3),
            leaky_relu(),
            *conv_norm(width, width, 3),
            leaky_relu(),
            *conv_norm(width, width, 3),
        )
        self.shortcut = nn.Sequential(*conv_norm(in_channels, width, 1))
        self.activation = leaky_relu()
        self.pool = nn.MaxPool2d(2)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.pool(self.activation(self.convs(maps) + self.shortcut(maps)))
        return out


def conv_norm(in_channels: int, width: int, kernel: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Build a convolution that keeps the image size, and its batch norm, whose shift stands for the bias."""
    return nn.Conv2d(in_channels, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width)
