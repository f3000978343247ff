"""The one operator of the library: products with the second derivatives of the inner loss.

    curvature(problem, params, meta, support, w)  =  ( H w , B w )

    H = d2 inner_loss / d params d params          B = d2 inner_loss / d meta d params

Forward-over-reverse (Pearlmutter's product): the derivative, along ``w``, of the gradients of the inner loss in the
parameters and in the meta-parameters. One call costs one forward-mode sweep over one backward pass, keeps no tape,
and its memory is that of one gradient. The opposite order, reverse-over-forward, is silently wrong through native
normalisation layers (pytorch issue 196699), so it is not used anywhere.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from innerloop.problem import Batch, Problem, Tree

Graph = Literal["transform", "none", "kept"]

_observer: ContextVar[Callable[[int, Tree, tuple[Tree, Tree]], None] | None] = ContextVar("observer", default=None)


def gradient(
    problem: Problem, params: Tree, meta: Tree, support: Batch, step: int = 0, graph: Graph = "transform"
) -> tuple[Tree, Tensor]:
    """Gradient of the inner loss in the parameters, and the loss itself.

    Args:
        problem: the bilevel problem.
        params: where to differentiate.
        meta: the meta-parameters, held fixed.
        support: what the inner loss reads.
        step: which inner step this is; the same step always sees the same random draws.
        graph: ``"transform"`` is ``torch.func.grad``, which can be vmapped and differentiated by other transforms, and
            builds a graph of the backward pass for that; ``"none"`` and ``"kept"`` are plain autograd's, without such a
            graph and with one that outlives the call.

    Returns:
        A tree like ``params``, and a scalar.
    """
    with replayed(problem.seed, step, params):
        if graph == "transform":
            return torch.func.grad_and_value(problem.inner_loss)(params, meta, support)
        keep = graph == "kept"
        with torch.enable_grad():
            # views, since one parameter may be a function of another, or of meta, which the loss reads as well
            leaves = {n: p.view_as(p) if keep and p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
            loss = problem.inner_loss(leaves, meta, support)
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=keep, materialize_grads=True)
        return dict(zip(leaves, grads, strict=True)), loss.detach()


def curvature(
    problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int = 0
) -> tuple[Tree, Tree]:
    """Products of a direction with the Hessian and with the mixed derivative of the inner loss.

    Where an operation of the loss has no forward-mode rule, the same products are taken by reverse-over-reverse, which
    keeps the graph of one gradient, after one warning that names the operation.

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
    products = _products(problem, params, meta, support, direction, step)
    observe = _observer.get()
    if observe is not None:
        observe(step, direction, products)
    return products


@contextlib.contextmanager
def observed(observe: Callable[[int, Tree, tuple[Tree, Tree]], None]) -> Iterator[None]:
    """Within the block, call ``observe(step, direction, products)`` after every `curvature`, also inside vmap."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def _products(
    problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int
) -> tuple[Tree, Tree]:
    if problem.known.forward_mode:
        try:
            return _forward_over_reverse(problem, params, meta, support, direction, step)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "vmap" in str(error):
                raise
            # The loss could be differentiated once, so forward mode is what it lacks.
            reason = str(error).splitlines()[0]
            warnings.warn(f"curvature falls back to reverse-over-reverse, same result, slower: {reason}", stacklevel=3)
            problem.known.forward_mode = False
    return _reverse_over_reverse(problem, params, meta, support, direction, step)


def _forward_over_reverse(
    problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int
) -> tuple[Tree, Tree]:
    def gradients(at: Tree) -> tuple[Tree, Tree]:
        return torch.func.grad(problem.inner_loss, argnums=(0, 1))(at, meta, support)

    # jvp refuses overlapping memory, which parameters broadcast over tasks or expanded by the user have.
    primal = {name: value.contiguous() for name, value in params.items()}
    with replayed(problem.seed, step, params):
        products: tuple[Tree, Tree] = torch.func.jvp(gradients, (primal,), (direction,))[1]
    return products


def _reverse_over_reverse(
    problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int
) -> tuple[Tree, Tree]:
    def gradient_in_params(at: Tree, given: Tree) -> Tree:
        return torch.func.grad(problem.inner_loss)(at, given, support)

    with replayed(problem.seed, step, params):
        products: tuple[Tree, Tree] = torch.func.vjp(gradient_in_params, params, meta)[1](direction)
    return products


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is active, under which values cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def fresh_seed() -> int:
    """A seed from torch's global generator, which moves on; under a transform, one that its state stands for."""
    if in_transform():
        return zlib.crc32(torch.default_generator.get_state().numpy().tobytes())
    return int(torch.randint(2**31, ()))


@contextlib.contextmanager
def replayed(seed: int | None, step: int, like: Any) -> Iterator[None]:
    """Draw the random numbers of ``step`` from their own seed, so that a step recomputed is the same step.

    Whatever draws, dropout masks and the like repeat when the step's gradient is taken again. Generators other than
    the CPU's and that of the device in use are left alone, so that no other device is initialised.

    Args:
        seed: with None nothing is touched.
        step: added to it.
        like: a tree of tensors; the device is theirs.
    """
    if seed is None:
        yield
        return
    generators = [torch.default_generator]
    device = next((leaf.device for leaf in pytree.tree_leaves(like) if isinstance(leaf, Tensor)), torch.device("cpu"))
    if device.type == "cuda":
        place = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[place])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed + step)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextlib.contextmanager
def second_order_kernels(recurrent: bool = False) -> Iterator[None]:
    """Choose kernels that can be differentiated twice.

    Fused attention has neither a forward-mode rule nor a second derivative, so the math kernel is selected, and the
    encoder layer's fused inference path is left out; the recurrent layers of cuDNN and oneDNN have no second
    derivative, so both are off where the model holds one. Autocast must not reuse a weight's cast from one level of
    differentiation in another.

    Args:
        recurrent: the model holds recurrent layers.
    """
    fast_path, casts = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
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
