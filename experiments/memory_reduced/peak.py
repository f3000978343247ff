"""Peak memory of one meta-step of one method, in this process, which should be a fresh one; see run.py.

One 5-way 5-shot task with 5 queries a class, of random images, on a GPU where there is one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

import innerloop as il
from innerloop.reporting import peak_memory

LABELS = torch.arange(5).repeat_interleave(5)
RECORDED, HELD = il.Unrolled(record=True), il.Unrolled(record=True, learn_start=False)

# What adapts, and by which meta-gradient. The authors' code computes all methods but theirs by back-propagation through
# the recorded inner loop. With features cached that is `cached_step`: the library keeps more of their computation.
METHODS: dict[str, dict[str, Any]] = {
    "Algorithm 1": {"adapts": "head", "meta_gradient": il.MemoryReduced()},
    "ITD-BiO": {"adapts": "head", "meta_gradient": HELD, "reuse_prefix": False},
    "MAML": {"adapts": "everything", "meta_gradient": RECORDED},
    "ANIL, features recomputed": {"adapts": "head", "meta_gradient": RECORDED, "reuse_prefix": False},
    "ANIL, features cached": {"adapts": "head"},
    "ITD-BiO, ours": {"adapts": "head", "meta_gradient": il.Unrolled(learn_start=False)},
    "MAML, ours": {"adapts": "everything"},
    "ANIL, features recomputed, ours": {"adapts": "head", "reuse_prefix": False},
    "ANIL, features cached, ours": {"adapts": "head"},
}


def images(size: int, device: str) -> il.Task:
    """One task as a batch."""
    inputs = torch.rand(2, 1, len(LABELS), 3, size, size, generator=torch.Generator().manual_seed(0))
    return il.Task(*((part, LABELS.expand(1, -1)) for part in inputs)).to(device)


def learner(method: str, size: int, filters: int, steps: int, device: str) -> il.MetaLearner:
    inner = il.SGD(lr=0.1, steps=steps, weight_decay=0.05 if method == "Algorithm 1" else 0.0)
    model = il.models.Conv4(filters=filters, size=size)
    return il.MetaLearner(model, inner=inner, memory=0, **METHODS[method]).to(device)


def cached_step(learner: il.MetaLearner, task: il.Task) -> None:
    """ANIL by plain autograd, its features computed once."""
    body, head = learner.model[:-1], learner.model[-1]
    (inputs, targets), (query, wanted) = ((body(x[0]), y[0]) for x, y in task)
    params = dict(head.named_parameters())
    for _ in range(learner.inner.steps):
        loss = F.cross_entropy(functional_call(head, params, (inputs,)), targets)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - learner.inner.lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
    F.cross_entropy(functional_call(head, params, (query,)), wanted).backward()


def measure(method: str, size: int, filters: int, steps: int) -> dict[str, float]:
    """Peak bytes above model and task, seconds, and the norm of the meta-gradient, of one meta-step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta_step = cached_step if method == "ANIL, features cached" else il.MetaLearner.meta_step
    torch.manual_seed(0)
    first, measured = learner(method, 16, 2, 1, device), learner(method, size, filters, steps, device)
    # Libraries load their kernels on first use; that is not the meta-step's memory.
    meta_step(first, images(16, device))
    task = images(size, device)
    began = time.perf_counter()
    peak = peak_memory(lambda: meta_step(measured, task), device)
    seconds = time.perf_counter() - began
    norm = sum(float(p.grad.double().square().sum()) for p in measured.parameters() if p.grad is not None) ** 0.5
    return {"bytes": peak, "seconds": seconds, "gradient_norm": norm}
