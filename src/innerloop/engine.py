"""How a batch of tasks is computed: how many at once, and whether the graphs of the inner steps are kept.

Both are chosen by the bytes that one task takes, measured once for each shape of task, and never show in the result
beyond rounding. On a CPU, tasks whose activations outgrow its caches are computed one by one, which is faster there than
all at once; small ones, and all on an accelerator, are vmapped.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.inner import InnerLoop

CACHE = 2**18  # bytes of activations up to which several tasks at once are faster on a CPU
BUDGET = 2**30  # bytes for a meta-step on a CPU, where none are given; on a GPU half of what is free

_log = logging.getLogger("innerloop")


class Way(NamedTuple):
    """How tasks of one shape are computed.

    Attributes:
        chunk: how many at once.
        keep_graphs: whether the graphs of all inner steps of so many tasks fit into the budget.
    """

    chunk: int
    keep_graphs: bool


def choose(whole: InnerLoop, reduced: InnerLoop, tasks: int, chunk: int | None, memory: int | None) -> Way:
    """Measure one task, and choose.

    Args:
        whole: its inner loop on the whole problem, which nothing is computed ahead of.
        reduced: its inner loop as it will be run.
        tasks: how many there are in a batch.
        chunk: how many at once, if that is given.
        memory: bytes for a meta-step; None takes ``BUDGET``.
    """
    device = next(iter(whole.begin.params.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else BUDGET
    activations, _ = saved_bytes(whole, mixed=True)
    _, step = saved_bytes(reduced, mixed=False)
    if chunk is None:
        fits = max(1, memory // max(1, 4 * activations))  # a product holds some four times a gradient's activations
        chunk = 1 if device.type == "cpu" and activations > CACHE else min(tasks, fits)
    way = Way(chunk, step * reduced.solver.steps * chunk <= memory)
    _log.info(
        "%d tasks at once, graphs of the inner steps %s: a task has %.1f MiB of activations, an inner step's graph "
        "%.1f MiB, of %.0f MiB; chunk_size= and memory= set both",
        way.chunk,
        "kept" if way.keep_graphs else "not kept",
        activations / 2**20,
        step / 2**20,
        memory / 2**20,
    )
    return way


def saved_bytes(loop: InnerLoop, mixed: bool) -> tuple[int, int]:
    """What autograd keeps for one inner loss, and for its gradient with a graph: bytes of distinct storages.

    Args:
        loop: of one task.
        mixed: differentiate in the meta-parameters too.
    """
    held: dict[int, int] = {}
    own = {_place(leaf) for leaf in pytree.tree_leaves((loop.begin.params, loop.meta, loop.support)) if _is(leaf)}

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            held[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: value.detach().requires_grad_() for name, value in loop.begin.params.items()}
    meta = {name: value.detach().requires_grad_() for name, value in loop.meta.items()} if mixed else loop.meta
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = replace(loop, meta=meta).value(loop.begin.step, leaves)
        activations = sum(held.values())
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        kept = sum(held.values())
    del loss, grads
    return activations, kept


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
