"""How a batch of tasks is computed: how many at once, whether graphs of inner steps are kept, and what takes products.

All are chosen by the bytes that one task takes, measured once for each shape of task, and never show in the result
beyond rounding. On a CPU, tasks whose activations outgrow its caches are computed one by one, which is faster there
than all at once; small ones, and all on an accelerator, are vmapped. Deep models whose graphs are not kept are computed
block by block.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from innerloop.blockwise import Blockwise
from innerloop.curvature import replayed
from innerloop.differences import Differences
from innerloop.inner import InnerLoop
from innerloop.problem import Engine
from innerloop.trees import tensors

CACHE = 2**18  # bytes of activations up to which several tasks at once are faster on a CPU
# Products go block by block from so many stages that move, none of them with more than this share of the activations
# (ResNet-12 saves 40 % of a product's peak, Conv4, whose first block holds most, 7 %; both take twice the time), and
# from so many bytes of those, or of what a meta-step may take: below them there is memory enough for a product.
STAGES, SHARE = 3, 1 / 3
DEEP, PART = 2**24, 1 / 16
BUDGET = 2**30  # bytes for a meta-step on a CPU, where none are given; on a GPU half of what is free

Products = Literal["auto", "autograd", "blocks", "differences"]
ENGINES: dict[str, Engine | None] = {
    "auto": None,
    "autograd": None,
    "blocks": Blockwise(),
    "differences": Differences(),
}

_log = logging.getLogger("innerloop")


class Way(NamedTuple):
    """How tasks of one shape are computed.

    Attributes:
        chunk: how many at once.
        keep_graphs: whether the graphs of all inner steps of so many tasks fit into the budget.
        engine: what computes gradients and products; None is plain autograd.
        small: whether kernels are so small that calling them takes most of the time.
    """

    chunk: int
    keep_graphs: bool
    engine: Engine | None = None
    small: bool = False


def engine_of(products: Engine | str) -> Engine | None:
    """The engine that ``products=`` names; None leaves it to ``choose``, or to autograd.

    Raises:
        ValueError: it names none.
    """
    if isinstance(products, Engine):
        return products
    if products not in ENGINES:
        raise ValueError(f"products={products!r}: choose {', '.join(map(repr, ENGINES))}, or give an engine")
    return ENGINES[products]


def choose(
    whole: InnerLoop,
    reduced: InnerLoop,
    tasks: int,
    chunk: int | None,
    memory: int | None,
    products: Engine | str = "auto",
    compiled: bool = False,
) -> Way:
    """Measure one task, and choose.

    Args:
        whole: its inner loop on the whole problem, which nothing is computed ahead of.
        reduced: its inner loop as it will be run.
        tasks: how many there are in a batch.
        chunk: how many at once, if that is given.
        memory: bytes for a meta-step; None takes ``BUDGET``.
        products: as the learner was given it.
        compiled: whether chunks are compiled: then they are large, even on a CPU, and all of one size.
    """
    named = engine_of(products)
    if named is not None:  # which takes tasks one by one, and keeps no graph
        return Way(1, False, named)
    device = next(iter(whole.begin.params.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else BUDGET
    activations, _ = saved_bytes(whole, mixed=True, most=0)
    if chunk is None:
        fits = max(1, memory // max(1, 4 * activations))  # a product holds some four times a gradient's activations
        if compiled:
            chunk = next(size for size in range(min(tasks, fits), 0, -1) if tasks % size == 0)
        else:
            chunk = 1 if device.type == "cpu" and activations > CACHE else min(tasks, fits)
    each = memory // (max(1, reduced.solver.steps) * chunk)
    own, step = saved_bytes(reduced, mixed=False, most=each)
    keep = step is not None and step <= each
    large = not keep and chunk == 1 and own > max(DEEP, PART * memory)
    blocks = products == "auto" and not compiled and large and _deep(reduced)
    engine = Blockwise() if blocks else None
    way = Way(chunk, keep, engine, activations <= CACHE)
    _log.info(
        "%d tasks at once, graphs of the inner steps %s, products %s: a task has %.1f MiB of activations, an inner "
        "step's graph %s, of %.0f MiB; chunk_size=, memory= and products= set all three",
        way.chunk,
        "kept" if keep else "not kept",
        "by autograd" if engine is None else "block by block",
        activations / 2**20,
        "more than its share" if step is None else f"{step / 2**20:.1f} MiB",
        memory / 2**20,
    )
    return way


def saved_bytes(loop: InnerLoop, mixed: bool, most: int | None = None) -> tuple[int, int | None]:
    """What autograd keeps for one inner loss, and for its gradient with a graph: bytes of distinct storages.

    Args:
        loop: of one task.
        mixed: differentiate in the meta-parameters too.
        most: where the first is more than so many, the second, which is larger, is not measured, and is None.
    """
    held: dict[int, int] = {}
    own = {_place(leaf) for leaf in tensors((loop.begin.params, loop.meta, loop.support))}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor._is_zerotensor() and _place(tensor) not in own:
            held[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: value.detach().requires_grad_() for name, value in loop.begin.params.items()}
    meta = {name: value.detach().requires_grad_() for name, value in loop.meta.items()} if mixed else loop.meta
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = replace(loop, meta=meta).value(loop.begin.step, leaves)
        activations = sum(held.values())
        if most is not None and activations > most:
            return activations, None
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        kept = sum(held.values())
    del loss, grads
    return activations, kept


def _deep(loop: InnerLoop) -> bool:
    """Whether the inner loss is a chain in which enough stages move, and none holds too much of the activations."""
    chain = loop.problem.inner_chain
    if chain is None or loop.problem.engine is not None:
        return False
    held: dict[int, int] = {}
    stages = chain(loop.meta, loop.batch(loop.begin.step))
    params = {name: value.detach().requires_grad_() for name, value in loop.begin.params.items()}
    own = {_place(leaf) for leaf in tensors((loop.begin.params, loop.meta))}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor._is_zerotensor() and _place(tensor) not in own:
            held[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    value: Any = None
    after = [0]
    with (
        replayed(loop.problem.seed, loop.begin.step, params),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        for stage in stages:
            value = stage.run(params, loop.meta, value)
            after.append(sum(held.values()))
    largest = max(end - begin for begin, end in pairwise(after))
    moving = sum(any(name in params for name in stage.reads) for stage in stages)
    return moving >= STAGES and largest <= SHARE * after[-1]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
