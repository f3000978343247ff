"""One exact meta-gradient by everyone: plain autograd, and the libraries that compute it.

Each function leaves the mean meta-gradient of a batch in the ``.grad`` of a model's parameters. Peers that are not
installed are left out with the reason; four of them have no package that installs today, so put the folder that holds
their source on PYTHONPATH: learn2learn 0.2.0 (its ``algorithms`` and ``utils``), ``hypergrad`` of
github.com/prolearner/hypertorch, and ``metalearn`` of parallel-metalearn 0.5.6, whose own requirements pull in much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop import pooling

Loss = Callable[[Any, Any], Tensor]


def by_autograd(model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int, second: bool = True) -> None:
    """As anyone would write it."""
    (x, y), (a, b) = batch
    for task in range(len(y)):
        params = dict(model.named_parameters())
        for _ in range(steps):
            value = loss(functional_call(model, params, (x[task],)), y[task])
            grads = torch.autograd.grad(value, list(params.values()), create_graph=second)
            params = {name: p - lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
        (loss(functional_call(model, params, (a[task],)), b[task]) / len(y)).backward()


def by_learn2learn(model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int, second: bool = True) -> None:
    """``learn2learn.algorithms.MAML``."""
    maml = import_module("learn2learn.algorithms").MAML(model, lr, first_order=not second)
    (x, y), (a, b) = batch
    for task in range(len(y)):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(loss(learner(x[task]), y[task]))
        (loss(learner(a[task]), b[task]) / len(y)).backward()


def by_higher(model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int) -> None:
    """``higher.innerloop_ctx``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    (x, y), (a, b) = batch
    for task in range(len(y)):
        with import_module("higher").innerloop_ctx(model, optimizer, copy_initial_weights=False) as (adapted, inner):
            for _ in range(steps):
                inner.step(loss(adapted(x[task]), y[task]))
            (loss(adapted(a[task]), b[task]) / len(y)).backward()


def by_torchopt(model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int) -> None:
    """``torchopt.MetaSGD``."""
    torchopt = import_module("torchopt")
    (x, y), (a, b) = batch
    inner = torchopt.MetaSGD(model, lr=lr)
    start = torchopt.extract_state_dict(model, by="reference")
    for task in range(len(y)):
        for _ in range(steps):
            inner.step(loss(model(x[task]), y[task]))
        (loss(model(a[task]), b[task]) / len(y)).backward()
        torchopt.recover_state_dict(model, start)


def by_torch_maml(
    model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int, checkpoints: bool = True
) -> None:
    """``torch_maml.GradientCheckpointMAML``, a checkpoint every second step, or ``NaiveMAML``, without any."""
    torch_maml = import_module("torch_maml")
    kind = partial(torch_maml.GradientCheckpointMAML, checkpoint_steps=2) if checkpoints else torch_maml.NaiveMAML
    (x, y), (a, b) = batch
    for task in range(len(y)):
        maml = kind(
            model,
            lambda model, batch: loss(model(batch[0]), batch[1]),
            optimizer=torch_maml.IngraphGradientDescent(lr),
        )
        adapted = maml([(x[task], y[task])] * steps).model
        (loss(adapted(a[task]), b[task]) / len(y)).backward()


def by_hypertorch(model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int) -> None:
    """``hypergrad.reverse``, which computes every step again; the start is the first map of its history."""
    names, start = zip(*model.named_parameters(), strict=True)
    (x, y), (a, b) = batch

    def outer(params: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(functional_call(model, dict(zip(names, params, strict=True)), (inputs,)), targets)

    for task in range(len(y)):

        def step(params: list[Tensor], _: Any, task: int = task) -> list[Tensor]:
            grads = torch.autograd.grad(outer(params, x[task], y[task]), params, create_graph=True)
            return [p - lr * g for p, g in zip(params, grads, strict=True)]

        def begin(params: list[Tensor], given: list[Tensor]) -> list[Tensor]:
            return [value + 0 * p for value, p in zip(given, params, strict=True)]

        history = [[torch.zeros_like(p) for p in start], [p.detach() for p in start]]
        for _ in range(steps):
            history.append([p.detach() for p in step([p.requires_grad_() for p in history[-1]], None)])
        grads = import_module("hypergrad").reverse(
            history,
            list(start),
            [begin, *[step] * steps],
            lambda params, _, task=task: outer(params, a[task], b[task]) / len(y),
            set_grad=False,
        )
        for p, grad in zip(start, grads, strict=True):
            p.grad = grad if p.grad is None else p.grad + grad


def by_parallel_metalearn(model: nn.Module, loss: Loss, batch: il.Task, lr: float, steps: int) -> None:
    """``metalearn.algorithms.MAML``, all tasks at once by vmap."""
    rule = import_module("metalearn.inner_optimizers.optimizers").InnerSGD
    (x, y), (a, b) = batch

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = model

        def get_fast_weights(self) -> Any:
            return self.named_parameters()

        def forward(self, inputs: Tensor, **_: Any) -> dict[str, Any]:
            return {"output": self.own(inputs), "buffers": {}}

    class Judge(nn.Module):
        def forward(self, out_dict: Any, targets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            return loss(out_dict["output"], targets), torch.zeros(())

    wrapped = Model()
    maml = import_module("metalearn.algorithms").MAML(
        model=wrapped,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),  # so that the step it takes moves nothing
        inner_optimizer=rule(dict(wrapped.named_parameters()), inner_lr=lr, learn_lr=False, max_inner_steps=steps),
        support_loss_fn=Judge(),
        inner_steps=steps,
    )
    maml.step(iter([(x, y, a, b)]))


PLAIN = "plain autograd"
FIRST_ORDER: dict[str, Any] = {PLAIN: by_autograd, "learn2learn": by_learn2learn}
EXACT: dict[str, Any] = {
    **FIRST_ORDER,
    "higher": by_higher,
    "torchopt": by_torchopt,
    "torch_maml": by_torch_maml,
    "hypertorch": by_hypertorch,
    "parallel-metalearn": by_parallel_metalearn,
}
PEERS = tuple(name for name in EXACT if name != PLAIN)
_PACKAGES = {
    "learn2learn": "learn2learn.algorithms",
    "hypertorch": "hypergrad",
    "parallel-metalearn": "metalearn.algorithms",
}


def absent() -> dict[str, str]:
    """The peers that cannot be raced here, and why."""
    found = {}
    for name in PEERS:
        try:
            import_module(_PACKAGES.get(name, name))
        except ImportError as error:
            found[name] = f"is not installed ({error})"
    return found


def ordinary(model: nn.Module) -> nn.Module:
    """A model as others take it: batch norm without running statistics, and torch's own layers otherwise."""
    model = il.MetaLearner(model).model
    pooling.to_torch(model)
    return model
