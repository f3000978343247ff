"""Peak memory of one meta-step of one method, in this process, which should be a fresh one; see run.py.

    python experiments/memory_reduced/peak.py METHOD --size 32 --filters 64 --steps 5

Writes bytes, seconds and the norm of the meta-gradient to standard output, as JSON. One 5-way 5-shot task with 5
queries a class, of random images. On a GPU where there is one: the bytes are then those that torch has allocated, on
the CPU those of the process that are resident.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop.studies.measure import peak_memory

LR, LABELS = 0.1, torch.arange(5).repeat_interleave(5)


def images(size: int, device: str) -> il.Task:
    """One task as a batch."""
    inputs = torch.rand(2, 1, len(LABELS), 3, size, size, generator=torch.Generator().manual_seed(0))
    return il.Task(*((part, LABELS.expand(1, -1)) for part in inputs)).to(device)


# By back-propagation through the recorded inner loop, as the authors' code computes all methods but theirs.


def autograd(learn_start: bool, everything: bool, cached: bool) -> Callable[[nn.Sequential, int], Callable]:
    """The meta-gradient with a graph of all inner steps; ``cached`` computes the features once and not in each."""

    def build(model: nn.Sequential, steps: int) -> Callable[[il.Task], None]:
        def meta_step(task: il.Task) -> None:
            (inputs, targets), (query, wanted) = ((x[0], y[0]) for x, y in task)
            forward = of_images
            if cached:
                inputs, query, forward = model[:-1](inputs), model[:-1](query), of_features
            whole = dict(model.named_parameters())
            params = {name: value for name, value in whole.items() if everything or name.startswith("head")}
            if not learn_start:
                params = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
            for _ in range(steps):
                grads = torch.autograd.grad(
                    F.cross_entropy(forward(params, inputs), targets), list(params.values()), create_graph=True
                )
                params = {name: value - LR * g for (name, value), g in zip(params.items(), grads, strict=True)}
            F.cross_entropy(forward(params, query), wanted).backward()

        def of_images(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return functional_call(model, params, (inputs,))

        def of_features(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return F.linear(inputs, params["head.weight"], params["head.bias"])

        return meta_step

    return build


def library(adapts: object, estimator: object, **settings: bool) -> Callable[[nn.Sequential, int], Callable]:
    """The meta-step of a learner."""

    def build(model: nn.Sequential, steps: int) -> Callable[[il.Task], None]:
        learner = il.MetaLearner(model, adapts, il.SGD(lr=LR, steps=steps), estimator, **settings)

        def meta_step(task: il.Task) -> None:
            learner.meta_step(task)
            for kept, value in zip(model.parameters(), learner.model.parameters(), strict=True):
                kept.grad = value.grad

        return meta_step

    return build


METHODS = {
    "Algorithm 1": library(il.Head(), il.MemoryReduced()),
    "ITD-BiO": autograd(learn_start=False, everything=False, cached=False),
    "MAML": autograd(learn_start=True, everything=True, cached=False),
    "ANIL, features recomputed": autograd(learn_start=True, everything=False, cached=False),
    "ANIL, features cached": autograd(learn_start=True, everything=False, cached=True),
    "ITD-BiO, ours": library(il.Head(), il.Unrolled(learn_start=False)),
    "MAML, ours": library(il.Everything(), il.Unrolled()),
    "ANIL, features recomputed, ours": library(il.Head(), il.Unrolled(), reuse_prefix=False),
    "ANIL, features cached, ours": library(il.Head(), il.Unrolled()),
}


def measure(method: str, size: int, filters: int, steps: int) -> dict[str, float]:
    """Peak bytes above model and task, seconds, and the norm of the meta-gradient, of one meta-step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # Libraries load their kernels on first use; that is not the meta-step's memory.
    METHODS[method](il.models.Conv4(filters=2, size=16).to(device), 1)(images(16, device))
    model, task = il.models.Conv4(filters=filters, size=size).to(device), images(size, device)
    meta_step = METHODS[method](model, steps)
    began = time.perf_counter()
    peak = peak_memory(lambda: meta_step(task), device)
    seconds = time.perf_counter() - began
    norm = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    return {"bytes": peak, "seconds": seconds, "gradient_norm": norm}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    for name in ("size", "filters", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(measure(**vars(parser.parse_args()))))
