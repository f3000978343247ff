"""Plain autograd through the unrolled inner loop, written as one would on a blackboard: what exactness is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import innerloop as il


def rate(solver: il.inner.InnerSolver, step: int, name: str) -> float:
    """The inner rate: a number, a schedule, or either for the first glob that the parameter's name matches."""
    given = solver.lr
    if isinstance(given, Mapping):
        given = next(value for glob, value in given.items() if fnmatchcase(name, glob))
    return given(step) if callable(given) else given


def clipped(grads: dict[str, Tensor], longest: float | None) -> dict[str, Tensor]:
    """Gradients shortened to a joint norm by ``clip_grad_norm_``'s formula."""
    if longest is None:
        return grads
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    return {name: min(1.0, longest / (norm + 1e-6)) * grad for name, grad in grads.items()}


def rule(solver: il.inner.InnerSolver, learned: dict[str, Tensor], start: dict[str, Tensor]):
    """The solver's update by torch's published formulas: of step, parameters, gradients and a state dict."""

    def update(step: int, params: dict[str, Tensor], grads: dict[str, Tensor], state: dict) -> dict[str, Tensor]:
        new = {}
        grads = clipped(grads, solver.clip)
        if isinstance(solver, il.ALFA):
            return alfa(solver, learned, step, params, grads)
        decoupled = isinstance(solver, il.AdamW)
        for name, value in params.items():
            decay = 0.0 if decoupled else solver.weight_decay
            grad = grads[name] + decay * value + solver.proximal * (value - start[name])
            lr = rate(solver, step, name)
            if isinstance(solver, il.Momentum):
                state[name] = solver.momentum * state[name] + grad if name in state else grad
                move = lr * state[name]
            elif isinstance(solver, il.Adam):
                mean, square = state.get(name, (0.0, 0.0))
                (b1, b2), t = solver.betas, step + 1
                mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
                state[name] = mean, square
                # plain autograd gives NaN where a gradient is exactly zero; the library takes the root's slope as 0
                zero = square == 0
                root = (square + zero).sqrt() * ~zero / (1 - b2**t) ** 0.5
                move = lr * (mean / (1 - b1**t)) / (root + solver.eps)
                if decoupled:
                    move = move + lr * solver.weight_decay * value
            elif isinstance(solver, il.LearnedRates):
                move = (learned[name] if solver.per == "parameter" else learned[name][step]) * grad
            else:
                move = lr * grad
            new[name] = value - move
        return new

    return update


def alfa(solver: il.ALFA, learned: dict[str, Tensor], step: int, params: dict[str, Tensor], grads: dict[str, Tensor]):
    """One step of ALFA, or L2F's attenuation, with torch's own layers."""

    def network(name: str, inputs: Tensor) -> Tensor:
        layers = [[learned[f"{name}{layer}.{part}"] for part in ("weight", "bias")] for layer in ("read", "give")]
        return F.linear(F.relu(F.linear(inputs, *layers[0])), *layers[1])

    means = torch.stack([grad.mean() for grad in grads.values()])
    means = means.detach() if solver.detach else means
    if solver.attenuate and step == 0:
        gate = torch.sigmoid(network("gate ", means))
        return {name: gate[i] * value for i, (name, value) in enumerate(params.items())}
    found = network("", torch.cat([torch.stack([value.mean() for value in params.values()]), means]))
    new = {}
    for i, (name, value) in enumerate(params.items()):
        rate, decay = found[i] * learned["rates"][i, step], found[len(params) + i] * learned["decays"][i, step]
        new[name] = (1 - decay) * value - rate * grads[name]
    return new


def meta_gradient(
    learner: il.MetaLearner,
    batch: il.Task,
    step_weights: list[float] | None = None,
    horizon: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Meta-gradient of the mean query loss by ``create_graph=True``, named as the learner's parameters, and the loss.

    ``horizon`` detaches the inner gradients of all but so many of the last steps; 0 is first order.
    """
    model = learner.model
    weights = step_weights or [0.0] * (learner.inner.steps - 1) + [1.0]
    meta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    rates = {name.replace("/", "."): r.detach().clone().requires_grad_() for name, r in learner.rates.items()}
    total = torch.zeros((), dtype=next(iter(meta.values())).dtype)
    with sdpa_kernel(SDPBackend.MATH):
        for task in range(len(batch.support[1])):
            loss = _task_loss(learner, model, meta, rates, batch, task, weights, horizon)
            total = total + loss / len(batch.support[1])
        leaves = [*meta.values(), *rates.values()]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    names = [f"model.{name}" for name in meta] + [f"rates.{name.replace('.', '/')}" for name in rates]
    filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return dict(zip(names, filled, strict=True)), total.detach()


def _task_loss(
    learner: il.MetaLearner,
    model: nn.Module,
    meta: dict[str, Tensor],
    rates: dict[str, Tensor],
    batch: il.Task,
    task: int,
    weights: list[float],
    horizon: int | None,
) -> Tensor:
    (inputs, targets), (query, wanted) = ((x[task], y[task]) for x, y in batch)
    start = {name: meta[name] for name in learner.adapted}
    update = rule(learner.inner, rates, start)
    params, loss = start, torch.zeros((), dtype=inputs.dtype)
    state: dict = {}
    for step in range(learner.inner.steps):
        inner = F.cross_entropy(functional_call(model, {**meta, **params}, (inputs,)), targets)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True, materialize_grads=True)
        if horizon is not None and step < learner.inner.steps - horizon:
            grads = tuple(grad.detach() for grad in grads)
        params = update(step, params, dict(zip(params, grads, strict=True)), state)
        if weights[step]:
            loss = loss + weights[step] * F.cross_entropy(functional_call(model, {**meta, **params}, (query,)), wanted)
    return loss
