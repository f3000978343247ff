"""ALFA: a small network gives each layer its rate and decay in every inner step (Baik et al., arXiv 2011.00209).

    tau     =  ( mean(params_1) .. mean(params_N), mean(g_1) .. mean(g_N) )              N tensors that adapt, step j
    (a, b)  =  W2 relu(W1 tau + c1) + c2                                                 N numbers each
    params_i  <-  (1 - b_i B_ij) params_i  -  a_i A_ij g_i                               A_ij, B_ij learned as well

With L2F's attenuation (Baik, Hong and Lee, arXiv 1906.05905) a second network of the gradients' means first shrinks the
start,  params_i <- sigmoid(V2 relu(V1 tau' + d1) + d2)_i params_i. Both rules are read off the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.inner._base import InnerSolver, State
from innerloop.problem import Tree

_OPEN = 3.0  # the gates' first bias: they begin at 0.95


@dataclass(frozen=True, kw_only=True)
class ALFA(InnerSolver):
    """Gradient descent whose rates and decays a learned network makes of the means of weights and gradients.

    The first rates are ``lr`` and the first decays ``lr * decay``, each within some percent; that beginning is ours.
    The learner's ``rates`` holds the network (``read`` and ``give``), A as ``rates`` and B as ``decays``, both
    ``[tensors, steps]``. Steps beyond those of training reuse the last column. The exact meta-gradient of all of them
    costs no more than with `SGD`, but for a copy of each gradient.

    Attributes:
        decay: where the learned decay starts, 0 or more; the authors' code has 5e-4.
        attenuate: the first of ``steps`` is L2F's attenuation in place of a gradient step: give one more.
        detach: the gradients that the networks read count as constants, as in the authors' code. That is no exact
            meta-gradient, and a little cheaper.

    Source:
        Baik, Choi, Choi, Kim and Lee 2020, arXiv 2011.00209.

    Example:
        >>> il.MetaLearner(model, inner=il.ALFA(lr=0.01, steps=5))
        >>> il.MetaLearner(model, inner=il.ALFA(lr=0.01, steps=6, attenuate=True))
    """

    decay: float = 5e-4
    attenuate: bool = False
    detach: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.decay >= 0:
            raise ValueError(f"ALFA(decay={self.decay}): give where the learned decay starts, 0 or more")
        if self.attenuate and self.steps < 2:
            raise ValueError("ALFA(attenuate=True) takes its first step for the attenuation: give steps=2 or more")

    def learned(self, params: Tree) -> Tree:
        """Both layers of the networks, always the same first values, and the factors A and B."""
        count, like = len(params), next(iter(params.values()))
        draw = torch.Generator().manual_seed(0)

        def layers(name: str, width: int, bias: float) -> Tree:
            first, second = (torch.randn(width, width, generator=draw, dtype=torch.float64) for _ in range(2))
            found = {"read.weight": first / width**0.5, "read.bias": torch.zeros(width)}
            found |= {"give.weight": 0.1 * second / width**0.5, "give.bias": torch.full((width,), bias)}
            return {f"{name}{key}": value.to(like) for key, value in found.items()}

        rates = [[self.rate(step, name) for step in range(self.steps)] for name in params]
        found = layers("", 2 * count, 1.0) | {"rates": like.new_tensor(rates)}
        found |= {"decays": self.decay * found["rates"]}
        return found | layers("gate ", count, _OPEN) if self.attenuate else found

    def update(
        self, step: int, params: Tree, grad: Tree, state: State, learned: Tree, start: Tree
    ) -> tuple[Tree, State]:
        """One step at the rates and decays that the network gives, or the attenuation."""
        grad = self.full_gradient(params, grad, start)
        slopes = torch.stack([(g.detach() if self.detach else g).mean() for g in grad.values()])
        if self.attenuate and step == 0:
            gates = _network(learned, "gate ", slopes).sigmoid()
            return {name: gate * p for gate, (name, p) in zip(gates, params.items(), strict=True)}, state
        weights = torch.stack([p.mean() for p in params.values()])
        given, place = _network(learned, "", torch.cat([weights, slopes])), min(step, self.steps - 1)
        rates = given[: len(params)] * learned["rates"][:, place]
        decays = given[len(params) :] * learned["decays"][:, place]
        rows = zip(rates, decays, params.items(), strict=True)
        return {name: (1 - decay) * p - rate * grad[name] for rate, decay, (name, p) in rows}, state


def _network(learned: Tree, name: str, inputs: Tensor) -> Tensor:
    hidden = (learned[f"{name}read.weight"] @ inputs + learned[f"{name}read.bias"]).relu()
    return learned[f"{name}give.weight"] @ hidden + learned[f"{name}give.bias"]
