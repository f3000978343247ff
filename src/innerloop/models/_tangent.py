"""A model that is linear in what adapts, its tangent: Meta-RKHS II (Zhou et al., arXiv 2102.03909).

    f(x)  =  f_base(x)  +  J(x) move,         J(x) = d f_base(x) / d base,    move at zero at first

Adapting ``move`` is kernel regression with the tangent kernel  K(x, x') = J(x) J(x')',  in the space of parameters. By
mean squared error over the N numbers of the support set X, Y, with R = f_base(X) - Y:

    solved with weight decay w:   f(x) = f_base(x) - K(x, X) (K(X, X) + w N / 2  I)^-1 R
    SGD, steps * lr = N t / 2:    f(x) = f_base(x) - K(x, X) K(X, X)^-1 (I - exp(-t K(X, X))) R,   to first order in lr

The second is published as a matrix exponential. No kernel is formed here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jvp


class Tangent(nn.Module):
    """A model plus its derivative along ``move``, parameters like the model's own, which alone are to adapt.

    ``adapts="named:move.*"``, and estimators with ``learn_start=False``: every task begins at ``move`` = 0, where this
    is the model itself. The inner problem of a squared error is convex, so that `Implicit` is exact where it is solved:
    conjugate gradient needs as many iterations as the support set has numbers, or fewer. A pass costs about
    two of the model's, and a copy of its parameters adapts.

    Args:
        model: copied; any that ``torch.func.jvp`` takes.

    Raises:
        ValueError: the model has no parameters.

    Source:
        Zhou, Wang, Xian, Chen and Xu 2021, arXiv 2102.03909, version II.

    Example:
        >>> model, solver = il.models.Tangent(il.models.MLP([1, 40, 40, 1])), il.CG(10)
        >>> inner = il.NewtonCG(steps=1, iterations=10, weight_decay=1e-3)
        >>> il.MetaLearner(model, "named:move.*", inner, il.Implicit(solver, learn_start=False), F.mse_loss)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = copy.deepcopy(model)
        self.move = nn.ParameterList(torch.zeros_like(value) for value in self.base.parameters())
        if not len(self.move):
            raise ValueError(f"Tangent({type(model).__name__}): the model has no parameters, so nothing could adapt")

    def forward(self, *inputs: Any) -> Any:
        base = dict(self.base.named_parameters())
        move = dict(zip(base, self.move, strict=True))
        # A learner's batch norm takes torch's kernel where it has no rows, and that kernel's tangent has no gradient.
        layers: list[Any] = [layer for layer in self.base.modules() if getattr(layer, "rows", 0) is None]
        for layer in layers:
            layer.rows = len(inputs[0])
        value, change, *_ = jvp(lambda tree: functional_call(self.base, tree, inputs), (base,), (move,))
        for layer in layers:
            layer.rows = None
        return value + change
