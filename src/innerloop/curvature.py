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
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop.problem import Batch, Problem, Tree

_without_forward_mode: weakref.WeakSet[Callable[..., Tensor]] = weakref.WeakSet()
_observer: ContextVar[Callable[[int, Tree, tuple[Tree, Tree]], None] | None] = ContextVar("observer", default=None)


def gradient(problem: Problem, params: Tree, meta: Tree, support: Batch, step: int = 0) -> tuple[Tree, Tensor]:
    """Gradient of the inner loss in the parameters, and the loss itself.

    Args:
        problem: the bilevel problem.
        params: where to differentiate.
        meta: the meta-parameters, held fixed.
        support: what the inner loss reads.
        step: which inner step this is; the same step always sees the same random draws.

    Returns:
        A tree like ``params``, and a scalar.
    """
    with replayed(problem.seed, step):
        return torch.func.grad_and_value(problem.inner_loss)(params, meta, support)


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
    if problem.inner_loss not in _without_forward_mode:
        try:
            return _forward_over_reverse(problem, params, meta, support, direction, step)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "vmap" in str(error):
                raise
            # The loss could be differentiated once, so forward mode is what it lacks.
            reason = str(error).splitlines()[0]
            warnings.warn(f"curvature falls back to reverse-over-reverse, same result, slower: {reason}", stacklevel=3)
            _without_forward_mode.add(problem.inner_loss)
    return _reverse_over_reverse(problem, params, meta, support, direction, step)


def _forward_over_reverse(
    problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int
) -> tuple[Tree, Tree]:
    def gradients(at: Tree) -> tuple[Tree, Tree]:
        return torch.func.grad(problem.inner_loss, argnums=(0, 1))(at, meta, support)

    # jvp refuses overlapping memory, which parameters broadcast over tasks or expanded by the user have.
    primal = {name: value.contiguous() for name, value in params.items()}
    with replayed(problem.seed, step):
        products: tuple[Tree, Tree] = torch.func.jvp(gradients, (primal,), (direction,))[1]
    return products


def _reverse_over_reverse(
    problem: Problem, params: Tree, meta: Tree, support: Batch, direction: Tree, step: int
) -> tuple[Tree, Tree]:
    def gradient_in_params(at: Tree, given: Tree) -> Tree:
        return torch.func.grad(problem.inner_loss)(at, given, support)

    with replayed(problem.seed, step):
        products: tuple[Tree, Tree] = torch.func.vjp(gradient_in_params, params, meta)[1](direction)
    return products


@contextlib.contextmanager
def replayed(seed: int | None, step: int) -> Iterator[None]:
    """Draw the random numbers of ``step`` from their own seed, so that a step recomputed is the same step.

    Dropout masks and the like repeat whenever the step's gradient is taken again; with ``seed=None`` nothing is
    touched.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed + step)
        yield


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
