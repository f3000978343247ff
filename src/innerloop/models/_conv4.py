"""The four-block convolutional network of the few-shot papers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from innerloop.models._film import FiLM
from innerloop.models._stack import Stack

BLOCKS = 4


class Conv4(Stack):
    """Four blocks of 3x3 convolution, batch norm and ReLU, each of which halves the image, and a linear head.

    ======================== ========================================================= =============
    images                   arguments                                                 features
    ======================== ========================================================= =============
    Omniglot, glyphs 28x28   ``in_channels=1``                                         64
    the same, MAML           ``in_channels=1, downsample="stride", spatial_mean=True`` 64
    the same, iMAML          ``in_channels=1, downsample="stride"``                    2*2*64 = 256
    CIFAR-FS, FC100 32x32    the defaults                                              2*2*64 = 256
    miniImageNet 84x84, MAML ``filters=32, size=84``                                   5*5*32 = 800
    miniImageNet 84x84, ANIL ``size=84``                                               5*5*64 = 1600
    ======================== ========================================================= =============

    Maps images ``[examples, in_channels, size, size]`` to scores ``[examples, ways]``. Children: ``block1`` to
    ``block4``, the parameterless ``features``, ``head``; hence five blocks, and five characters in a pattern such as
    ``"00011"``.

    Weights start Xavier-uniform and biases at zero, in convolutions and head alike. Batch norm is PyTorch's own, with
    scale 1 and shift 0; which statistics it uses in a task is the learner's choice.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        ways: scores an image.
        filters: channels of every block.
        downsample: how a block halves the image: ``"pool"``, a 2x2 max-pool that rounds odd sizes down, or
            ``"stride"``, a convolution of stride 2 that rounds them up (and costs about a quarter of the arithmetic).
        size: side of the square images. By default 28 for one channel and 32 for more.
        spatial_mean: average the last block's map over its positions instead of flattening it: ``filters`` features for
            images of any size.
        context: numbers in the context vector of a `FiLM` layer behind the third block's batch norm (CAVIA); None for
            none.

    Raises:
        ValueError: if ``downsample`` is neither of the two or the images are too small for four max-pools; and from the
            forward pass if the images are not of the size that the model was built for.

    Sources:
        Vinyals et al. 2016, arXiv 1606.04080 (max-pooling); Finn et al. 2017, arXiv 1703.03400, section 5.2 (strides
        for Omniglot, 32 filters for miniImageNet); Rajeswaran et al. 2019, arXiv 1909.04630, released code (strides,
        flattened).

    Example:
        >>> il.models.Conv4(in_channels=1, ways=5)(torch.zeros(25, 1, 28, 28)).shape
        torch.Size([25, 5])
    """

    head: nn.Linear

    def __init__(
        self,
        in_channels: int = 3,
        ways: int = 5,
        filters: int = 64,
        downsample: Literal["pool", "stride"] = "pool",
        size: int | None = None,
        spatial_mean: bool = False,
        context: int | None = None,
    ) -> None:
        if downsample not in ("pool", "stride"):
            raise ValueError(f"downsample is {downsample!r}: choose 'pool' or 'stride'")
        if size is None:
            size = 28 if in_channels == 1 else 32
        # Halving four times, rounded down each time or up each time, is one division by 16.
        side = size // 2**BLOCKS if downsample == "pool" else -(-size // 2**BLOCKS)
        if side < 1 and not spatial_mean:
            raise ValueError(f"four max-pools need images of 16x16 or more, not {size}x{size}: use downsample='stride'")

        blocks = {
            f"block{n}": conv_block(
                in_channels if n == 1 else filters, filters, downsample, context if n == 3 else None
            )
            for n in range(1, BLOCKS + 1)
        }
        width = filters if spatial_mean else filters * side**2
        features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if spatial_mean else Flatten(width, size)
        super().__init__(**blocks, features=features, head=nn.Linear(width, ways))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)


def conv_block(
    in_channels: int, filters: int, downsample: Literal["pool", "stride"], context: int | None
) -> nn.Sequential:
    """Build one block: ``[examples, in_channels, s, s]`` to ``[examples, filters, s/2, s/2]``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, filters, kernel_size=3, stride=2 if downsample == "stride" else 1, padding=1),
        norm=nn.BatchNorm2d(filters),
        **({} if context is None else {"film": FiLM(context, filters)}),
        relu=nn.ReLU(),
    )
    if downsample == "pool":
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


class Flatten(nn.Module):
    """``[examples, filters, side, side]`` to ``[examples, width]``; refuses images of another size than expected."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.width = width
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        flat = maps.flatten(1)
        if flat.shape[1] != self.width:
            raise ValueError(
                f"this Conv4 was built for {self.size}x{self.size} images, {self.width} features, and was given images "
                f"that make {flat.shape[1]}: pass size=, the side of your images, or spatial_mean=True"
            )
        return flat

    def extra_repr(self) -> str:
        return f"width={self.width}, size={self.size}"
