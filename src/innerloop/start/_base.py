"""What every start of the inner loop answers: the head that a support set gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from innerloop.problem import Steps, Task, short_repr


class Start:
    """The head begins at a function of the support set's features; subclass it and write ``head``.

    The head is the model's last linear layer. The exact gradient flows through the function. Any number of classes
    will do, whatever the model's head was built for; the head's own weights are not learned. The inner loop may take
    no step at all, ``SGD(lr=0.1, steps=0)``: then the head is the function's.
    """

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        if "__repr__" not in vars(cls):
            cls.__repr__ = short_repr  # type: ignore[method-assign]  # here, so that dataclass makes none

    def head(self, features: Tensor, targets: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """Weight ``[ways, width]`` and bias ``[ways]`` from features ``[examples, width]`` and their classes.

        A function of tensors that can be differentiated, and mapped over tasks.
        """
        raise NotImplementedError

    def layer(self, model: nn.Module, adapted: Sequence[str]) -> str:
        """The name of the linear layer that is the head.

        Raises:
            ValueError: the model ends in no linear layer with a bias, or that does not adapt.
        """
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        last = names[-1] if names else None
        if last is None or not {f"{last}.weight", f"{last}.bias"} <= set(adapted):
            raise ValueError(
                f"{type(self).__name__}() sets weight and bias of the model's last linear layer, but "
                f"{'there is none' if last is None else f'{last} has no bias or does not adapt'}: use adapts=Head() or "
                "Everything(), and a head nn.Linear(..., bias=True)"
            )
        return last

    def ways(self, task: Task) -> int:
        """How many classes a task, or each of a batch, has, all of them with an example in every support set.

        Raises:
            ValueError: targets that are no class numbers, or a class without an example.
        """
        name = type(self).__name__
        labels = None if isinstance(task.support, Steps) else task.support[1]
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise ValueError(
                f"{name}() needs one support set with class numbers as targets, in a tensor of integers: leave "
                "start out for anything else"
            )
        rows, mine = labels.reshape(-1, labels.shape[-1]), int(labels.max()) + 1
        there = (rows.unsqueeze(-1) == torch.arange(mine, device=rows.device)).any(1)
        if not there.all() or labels.min() < 0:
            gone = (~there).any(0).nonzero().flatten().tolist()
            raise ValueError(
                f"{name}() needs an example of every class below {mine} in every support set, and class "
                f"{gone or 'numbers from 0'} is missing in one: number the classes 0, 1, ..."
            )
        return mine


def members(targets: Tensor, ways: int, like: Tensor) -> Tensor:
    """1 where an example is of a class, else 0, ``[examples, ways]``."""
    return (targets.unsqueeze(-1) == torch.arange(ways, device=targets.device)).to(like.dtype)
