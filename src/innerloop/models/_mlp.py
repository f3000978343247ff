"""The multilayer perceptron of the regression papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from innerloop.models._film import FiLM
from innerloop.models._stack import Stack


class MLP(Stack):
    """Linear layers with an activation between them: ``MLP([1, 40, 40, 1])`` is the sinusoid network of MAML.

    Maps ``[examples, sizes[0]]`` to ``[examples, sizes[-1]]``. Children: ``layer1``, ``activation1``, ``layer2``, ...
    and ``head``, the last linear layer; one block a linear layer. Weights start as PyTorch starts them.

    Args:
        sizes: inputs, widths of the hidden layers, outputs.
        activation: makes the module after every layer but the head, without arguments.
        context: numbers in the context vector of a `FiLM` layer, ``film``, behind the first layer; None for none. It is
            a block of its own.

    Raises:
        ValueError: if ``sizes`` does not name at least inputs and outputs, and with ``context`` a hidden layer.

    Source:
        Finn et al. 2017, arXiv 1703.03400, section 5.1.

    Example:
        >>> il.models.MLP([1, 40, 40, 1])(torch.zeros(10, 1)).shape
        torch.Size([10, 1])
    """

    head: nn.Linear

    def __init__(
        self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, context: int | None = None
    ) -> None:
        if len(sizes) < 2 + (context is not None):
            raise ValueError(f"sizes is {list(sizes)}: give inputs, hidden widths and outputs, such as [1, 40, 40, 1]")
        *hidden, outputs = sizes
        children: dict[str, nn.Module] = {}
        for n in range(1, len(hidden)):
            children[f"layer{n}"] = nn.Linear(hidden[n - 1], hidden[n])
            if n == 1 and context is not None:
                children["film"] = FiLM(context, hidden[1])
            children[f"activation{n}"] = activation()
        super().__init__(**children, head=nn.Linear(hidden[-1], outputs))
