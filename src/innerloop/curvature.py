"""The one operator of the library: products with the second derivatives of the inner loss.

    curvature(problem, params, meta, support, w)  =  ( H w , B w )

    H = d2 inner_loss / d params d params          B = d2 inner_loss / d meta d params

Reverse-over-reverse: the gradient of ``<d inner_loss / d params, w>``. One call costs a gradient and the way back
through it. Outside the transforms of ``torch.func`` all derivatives are plain autograd's, which keeps no graph of a
backward pass that nobody differentiates; under ``vmap`` they are the transforms'. Reverse-over-forward, and forward
mode through normalisation layers, are silently wrong in torch 2.13 (pytorch issues 196699, 196700, 198017), so they
are used nowhere.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop.problem import Batch, Engine, Problem, Tree
from innerloop.trees import map_tensors, tensors, tree_leaves, tree_map, unflatten

Products = tuple[Tree, Tree]

# Which numbers are drawn beside those of the steps: by a start, an outer loss, minibatches and estimators.
START, OUTER, ROWS, OWN = 2**40, 2**41, 2**42, 2**43

_observer: ContextVar[Callable[[int, Tree, Products], None] | None] = ContextVar("observer", default=None)


def gradient(
    problem: Problem, params: Tree, meta: Tree, support: Batch, step: int = 0, record: bool = False
) -> tuple[Tree, Tensor]:
    """Gradient of the inner loss in the parameters, and the loss itself.

    Args:
        problem: the bilevel problem.
        params: where to differentiate.
        meta: the meta-parameters, held fixed.
        support: what the inner loss reads.
        step: which inner step this is; the same step always sees the same random draws.
        record: keep the graph of the backward pass, so that autograd can go back through the gradient.

    Returns:
        A tree like ``params``, and a scalar.
    """
    if problem.engine is not None and not record:
        return problem.engine.gradient(problem, params, meta, support, step)
    with replayed(problem.seed, step, params):
        if in_transform():
            return torch.func.grad_and_value(problem.inner_loss)(params, meta, support)
        with torch.enable_grad():
            # views, since one parameter may be a function of another, or of meta, which the loss reads as well
            leaves = {
                name: p.view_as(p) if record and p.requires_grad else p.detach().requires_grad_()
                for name, p in params.items()
            }
            loss = scalar(problem.inner_loss(leaves, meta, support), "inner")
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=record, materialize_grads=True)
        return dict(zip(leaves, grads, strict=True)), loss.detach()


def curvature(problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int = 0) -> Products:
    """Products of a direction with the Hessian and with the mixed derivative of the inner loss.

    Args:
        problem: the bilevel problem.
        params: where to differentiate.
        meta: the meta-parameters, where to differentiate for the mixed part.
        support: what the inner loss reads.
        direction: a tree like ``params``.
        step: which inner step this is; the same step always sees the same random draws.

    Returns:
        ``H w``, a tree like ``params``, and ``B w``, a tree like ``meta``.
    """
    return linearised(problem, params, meta, support, step, keep=False)(direction)


def linearised(
    problem: Problem,
    params: Tree,
    meta: Tree,
    support: Batch,
    step: int = 0,
    *,
    mixed: bool = True,
    keep: bool = True,
) -> Callable[..., Products]:
    """``w -> (H w, B w)`` at one point; by autograd the gradient is taken once, and its graph kept between products.

    By autograd, a product called with ``only=0`` leaves ``B w`` empty, and one with ``only=1`` ``H w``.

    Args:
        problem: the bilevel problem.
        params: where to differentiate.
        meta: the meta-parameters.
        support: what the inner loss reads.
        step: which inner step this is.
        mixed: False leaves ``B w`` empty, and spares the way back to the meta-parameters.
        keep: more than one product will be taken.
    """

    def grad(at: Tree, given: Tree) -> Tree:
        return gradient(problem, at, {**meta, **given}, support, step, record=True)[0]

    pull: Any
    if problem.engine is not None:
        pull = problem.engine.products(problem, params, meta, support, step, mixed=mixed, keep=keep)
    else:
        pull = pullback(grad, params, meta if mixed else {}, keep=keep)[1]

    def product(direction: Tree, only: int | None = None) -> Products:
        products: Products = pull(direction) if only is None else pull(direction, only)
        observe = _observer.get()
        if observe is not None:
            observe(step, direction, products)
        return products

    return product


def judged(problem: Problem, params: Tree, meta: Tree, query: Batch) -> tuple[Tensor, Any, Tree, Tree]:
    """The outer loss, what it returned beside it (None if nothing), and its gradients in params and in meta."""
    if problem.engine is not None:
        return problem.engine.judge(problem, params, meta, query)

    def loss(params: Tree, meta: Tree) -> tuple[Tensor, Any]:
        value, extra = outer(problem, params, meta, query)
        return value, () if extra is None else extra  # torch.func takes no None beside a value

    value, pull, extra = pullback(loss, params, meta, aux=True)
    in_params, in_meta = pull(torch.ones_like(value))
    return value, None if isinstance(extra, tuple) and not extra else extra, in_params, in_meta


def nothing(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape that take no memory: one number, expanded. They cannot be changed in place."""
    return like.detach().new_zeros(()).expand_as(like)


def is_expanded(value: Tensor) -> bool:
    """Whether a tensor is one number in memory."""
    return value.numel() > 1 and not any(value.stride())


def dense(tree: Any) -> Any:
    """A tree in which every tensor has memory of its own shape."""
    return tree_map(lambda value: value.clone() if is_expanded(value) else value, tree)


def started(problem: Problem, meta: Tree, support: Batch) -> Tree:
    """Where the inner loop begins; a start that draws at random draws the same whenever it is asked."""
    with replayed(problem.seed, START, (meta, support)):
        return problem.begin(meta, support)


def outer(problem: Problem, params: Tree, meta: Tree, query: Batch) -> tuple[Tensor, Any]:
    """The outer loss and what it returned beside it; it draws from a seed of its own, the same after every step."""
    with replayed(problem.seed, OUTER, params):
        return parted(problem.outer_loss(params, meta, query))


def parted(value: Any) -> tuple[Tensor, Any]:
    """An outer loss and what it returned beside it, None if nothing; what is no tensor there is left out.

    Raises:
        ValueError: neither a scalar nor a pair of a scalar and something else.
    """
    if isinstance(value, tuple) and len(value) != 2:
        raise ValueError(f"the outer loss returned {len(value)} things: return a scalar, or (scalar, extra)")
    loss, extra = value if isinstance(value, tuple) else (value, None)
    return scalar(loss, "outer"), None if extra is None else only_tensors(extra)


def only_tensors(tree: Any) -> Any:
    """A tree of tensors as it is; of any other, its tensors in a tuple."""
    found = tuple(tensors(tree))
    return tree if len(found) == len(tree_leaves(tree)) else found


def scalar(value: Any, which: str) -> Tensor:
    """A loss, checked.

    Raises:
        ValueError: it is no scalar tensor.
    """
    if not isinstance(value, Tensor) or value.ndim:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the {which} loss returned {what}: return one number, such as losses.mean()")
    return value


def pullback(function: Callable[..., Any], *trees: Any, aux: bool = False, keep: bool = False) -> tuple[Any, ...]:
    """A function's value, and what takes cotangents of it to those of its arguments: ``torch.func.vjp`` by autograd.

    Args:
        function: of trees of tensors, to a tree of tensors; it must read what it is differentiated in as arguments.
        *trees: where.
        aux: the function returns a pair, of which the second part is handed on, detached.
        keep: the way back is taken more than once.

    Returns:
        The value, the function from a cotangent like it to a tuple of trees like the arguments, and with ``aux`` the
        second part. By autograd that function also takes the place of the one argument it is to go back to.
    """
    if in_transform():
        return torch.func.vjp(function, *trees, has_aux=aux)
    leaves = tree_map(lambda value: value.detach().requires_grad_(), trees)
    with torch.enable_grad():
        value = function(*leaves)
    value, more = value if aux else (value, ())

    def pull(cotangent: Any, only: int | None = None) -> Any:
        wanted = tuple(leaf if only in (None, place) else {} for place, leaf in enumerate(leaves))
        flat = tree_leaves(wanted)
        reached = [
            (out, given)
            for out, given in zip(tree_leaves(value), tree_leaves(cotangent), strict=True)
            if out.requires_grad
        ]
        if not reached or not flat:
            return tree_map(nothing, wanted)
        outs, given = zip(*reached, strict=True)
        grads = torch.autograd.grad(outs, flat, given, retain_graph=keep, allow_unused=True)
        found = [nothing(leaf) if grad is None else grad for leaf, grad in zip(flat, grads, strict=True)]
        return unflatten(wanted, found)

    found = tree_map(torch.detach, value), pull
    return (*found, map_tensors(Tensor.detach, more)) if aux else found


@contextlib.contextmanager
def observed(observe: Callable[[int, Tree, Products], None]) -> Iterator[None]:
    """Within the block, call ``observe(step, direction, products)`` after every product, also inside vmap."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def in_transform(kind: str | None = None) -> bool:
    """Whether a transform of ``torch.func`` is active, or one of a kind ("Grad"); values cannot be looked at there."""
    if kind is None or torch._C._functorch.peek_interpreter_stack() is None:
        return torch._C._functorch.peek_interpreter_stack() is not None
    return any(str(each.key()).endswith(kind) for each in torch._C._functorch.get_interpreter_stack() or ())


def fresh_seed() -> int:
    """A seed from torch's global generator, which moves on; under a transform, one that its state stands for."""
    if in_transform():
        with contextlib.suppress(RuntimeError):
            return zlib.crc32(torch.default_generator.get_state().numpy().tobytes())
        return torch.default_generator.initial_seed() % 2**31  # where values cannot be looked at
    return int(torch.randint(2**31, ()))


def seed_of(seed: int, step: int) -> int:
    """The seed of one of many steps, in 32 bits: the CPU's generator takes no notice of more."""
    return zlib.crc32(f"{seed} {step}".encode())


@contextlib.contextmanager
def replayed(seed: int | None, step: int, like: Any) -> Iterator[None]:
    """Draw the random numbers of ``step`` from their own seed, so that a step recomputed is the same step.

    Whatever draws, dropout masks and the like repeat when the step's gradient is taken again. Generators other than
    the CPU's and that of the device in use are left alone, so that no other device is initialised.

    Args:
        seed: with None nothing is touched.
        step: every step, and whatever else draws, has numbers of its own.
        like: a tree of tensors; the device is theirs.
    """
    if seed is None:
        yield
        return
    states = random_states(like)
    for generator, _ in states:
        generator.manual_seed(seed_of(seed, step))
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def random_states(like: Any) -> list[tuple[torch.Generator, Tensor]]:
    """The generators that a computation draws from, the CPU's and that of a tree's device, and where each stands."""
    generators = [torch.default_generator]
    device = next((leaf.device for leaf in tensors(like)), torch.device("cpu"))
    if device.type == "cuda":
        place = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[place])
    return [(generator, generator.get_state()) for generator in generators]


def python_states() -> tuple[Any, ...]:
    """Where the generators of Python and numpy stand, which no step replays."""
    return random.getstate(), str(np.random.get_state(legacy=False))  # noqa: NPY002


@contextlib.contextmanager
def second_order_kernels(recurrent: bool = False, engine: Engine | None = None) -> Iterator[None]:
    """Choose kernels that can be differentiated twice.

    Fused attention has neither a forward-mode rule nor a second derivative, so the math kernel is selected, and the
    encoder layer's fused inference path is left out; the recurrent layers of cuDNN and oneDNN have no second
    derivative, so both are off where the model holds one. Autocast must not reuse a weight's cast from one level of
    differentiation in another.

    Args:
        recurrent: the model holds recurrent layers.
        engine: how derivatives are computed; where it takes no second ones, all kernels stay as they are.
    """
    casts = torch.is_autocast_cache_enabled()
    if engine is not None and not engine.second_order:
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(casts)
        return
    fast_path = torch.backends.mha.get_fastpath_enabled()
    cudnn, mkldnn = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_autocast_cache_enabled(False)
    if recurrent:
        torch.backends.cudnn.enabled = torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.set_autocast_cache_enabled(casts)
        torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled = cudnn, mkldnn
