"""A meta-step compiled whole: one graph for a chunk of tasks, its inner steps and the way back through them.

Compiling pays for small kernels and long runs, where Python and the dispatch of operators take most of the time. The
function is traced first, with every derivative inside it, and its graph goes to ``torch.compile``.

Python runs once for each shape of task. What it reads then stays as it was: numbers and tensors that the losses hold
beside their arguments, and what a model decides by the value of a buffer. Tensors of the learner, frozen parameters and
buffers too, are read anew in every step.

``torch.compile`` keeps its results in a folder (``TORCHINDUCTOR_CACHE_DIR``), from which later processes take them:
half a minute becomes a few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.curvature import python_states
from innerloop.problem import Steps

SHAPES = 16  # graphs that a learner compiles at most
TOLERANCE = 1e-3  # of the first result, as a whole, against the same step not compiled; rounding is some 1e-6

_log = logging.getLogger("innerloop")


class Refused(Exception):
    """Why a meta-step is not compiled."""


class Compiler:
    """Functions of trees of tensors, compiled when a shape is first seen.

    What cannot be compiled is computed as it is from then on, with one warning.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend, self.active, self.compilations = backend, True, 0
        self._compiled: dict[Any, Callable[[list[Tensor]], Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiler, (self.backend,)  # a copy compiles for itself

    def __call__(self, function: Callable[..., Any], arguments: tuple[Any, ...], key: Any, module: nn.Module) -> Any:
        """``function(*arguments)``.

        Args:
            function: of trees of tensors, to such a tree; what it reads beside them is in ``key`` or ``module``.
            arguments: trees of tensors and of numbers.
            key: whatever else the function depends on.
            module: whose parameters and buffers it may read.
        """
        if not self.active:
            return function(*arguments)
        leaves, structure = pytree.tree_flatten(arguments)
        shapes = tuple(map(_kind, leaves))
        modes = tuple(each.training for each in module.modules())
        full = (key, structure, shapes, modes, _settings())
        if full in self._compiled:
            return self._compiled[full](leaves)
        result = function(*arguments)  # an error of its own is the clearer one
        try:
            if len(self._compiled) == SHAPES:
                raise Refused(
                    f"it has compiled for {SHAPES} kinds of batch, and there is another: their shapes differ, or tasks "
                    "are taken up at ever new steps"
                )
            run = self._compile(function, leaves, structure, module)
            result = _same(run(leaves), result)
            self._compiled[full] = run
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever torch's compiler meets
            self.active = False
            self._compiled.clear()
            warnings.warn(f"the meta-step is not compiled, same result, slower: {_cause(error)}", stacklevel=5)
        return result

    def _compile(
        self, function: Callable[..., Any], leaves: list[Any], structure: Any, module: nn.Module
    ) -> Callable[[list[Any]], Any]:
        if any(isinstance(x, Steps) and callable(x.rows) for x in _nodes(structure, leaves)):
            raise Refused("Steps of a function gives other batches in every step: give tensors")
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and seldom needed

        began = time.perf_counter()
        numbers = [place for place, x in enumerate(leaves) if isinstance(x, float)]
        fixed = {place: x for place, x in enumerate(leaves) if not isinstance(x, (float, Tensor))}
        device = next(x.device for x in leaves if isinstance(x, Tensor))
        shape: list[Any] = []

        def flat(values: Tensor, *tensors: Tensor) -> list[Tensor]:
            others = fixed | {n: Factor(value) if leaves[n] else 0.0 for n, value in zip(numbers, values, strict=True)}
            given: list[Any] = list(tensors)
            for place in sorted(others):
                given.insert(place, others[place])
            found, where = pytree.tree_flatten(function(*pytree.tree_unflatten(given, structure)))
            shape[:] = [where]
            return found

        def values(leaves: list[Any]) -> list[Tensor]:
            known = torch.tensor([float(leaves[place]) for place in numbers], dtype=torch.float64, device=device)
            return [known, *(x for x in leaves if isinstance(x, Tensor))]

        with _no_draws():
            graph = make_fx(flat)(*values(leaves))
        _refuse_draws(graph)
        live = _lift(graph, module)
        traced = time.perf_counter()
        compiled: Callable[..., Any] = graph  # which is what the backend "eager" makes of it
        if self.backend != "eager":
            # No guards: when a graph is right, the key says. Kernels are called from C++ where that is mature.
            options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
            if self.backend == "inductor" and device.type == "cpu":
                options["cpp_wrapper"] = True
            compiled = torch.compile(graph, backend=self.backend, dynamic=False, fullgraph=True, options=options)

        def run(leaves: list[Any]) -> Any:
            with torch.autocast(device.type, enabled=False):  # the graph has its casts
                found = compiled(*values(leaves), *(getattr(owner, name).detach() for owner, name in live))
            return pytree.tree_unflatten(list(found), shape[0])

        run(leaves)
        self.compilations += 1
        _log.info(
            "the meta-step is compiled: %d operations traced in %.1f s, compiled in %.1f s",
            len(graph.graph.nodes),
            traced - began,
            time.perf_counter() - traced,
        )
        return run


class Factor:
    """A number other than 0 that is an argument of the compiled function; code may multiply tensors by it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __mul__(self, other: Tensor) -> Tensor:
        return self.value.to(other.dtype) * other

    __rmul__ = __mul__


def proposal(seconds: float, operations: int, remaining: int) -> str | None:
    """Whether to compile a meta-step of small kernels, in words; None where it would not pay.

    Args:
        seconds: that a meta-step takes.
        operations: inner steps times tensors that move in them, which the time to compile grows with.
        remaining: meta-steps still to be taken.
    """
    compiling, saved = 10 + operations, 0.75 * seconds * remaining  # measured on the networks of few-shot regression
    if saved < 2 * compiling:
        return None
    return f"compile=True would save some {saved / 60:.0f} of {seconds * remaining / 60:.0f} minutes, for {compiling} s"


def _kind(leaf: Any) -> Any:
    """What of an argument is compiled in."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return leaf == 0 if isinstance(leaf, float) else leaf


def _settings() -> tuple[Any, ...]:
    """What torch computes by, beside the arguments."""
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return (*casts, torch.get_default_dtype())


def _nodes(structure: Any, leaves: list[Any]) -> list[Any]:
    """The leaves, where a `Steps` is one."""
    tree = pytree.tree_unflatten(leaves, structure)
    found: list[Any] = pytree.tree_leaves(tree, is_leaf=lambda node: isinstance(node, Steps))
    return found


def _refuse_draws(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags:
            raise Refused(
                f"it draws random numbers ({node.target}), which would be the same ones in every step: leave compile "
                "out, or the dropout"
            )


@contextlib.contextmanager
def _no_draws() -> Iterator[None]:
    """Refuse what draws within the block from a generator that leaves nothing in the graph."""
    before = python_states()
    yield
    if before != python_states():
        raise Refused("it draws random numbers in Python, which would be the same ones in every step")


def _lift(graph: torch.fx.GraphModule, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Make arguments of the tensors that the graph holds of a module; returns whose, and by what name."""
    owners: dict[tuple[int, Any], tuple[nn.Module, str]] = {}
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and tensor.numel():
                owners[tensor.data_ptr(), tensor.shape] = (part, name)
    found: list[tuple[nn.Module, str]] = []
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, node.target, None)
        place = owners.get((tensor.data_ptr(), tensor.shape)) if isinstance(tensor, Tensor) else None
        if place is None:
            continue
        with graph.graph.inserting_after(inputs[-1]):
            inputs.append(graph.graph.placeholder(f"live_{len(found)}"))
        node.replace_all_uses_with(inputs[-1])
        graph.graph.erase_node(node)
        found.append(place)
    graph.recompile()
    return found


def _same(found: Any, expected: Any) -> Any:
    """A compiled result, refused where it is not that of the function itself."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return found  # what is rounded when is the compiler's choice
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    apart, size = 0.0, 0.0
    for one, other in pairs:
        if other.is_floating_point() and other.isfinite().all():
            apart, size = apart + float((one - other).square().sum()), size + float(other.square().sum())
    if not apart <= TOLERANCE**2 * size:
        raise Refused(f"compiled, its result differs by {(apart / size) ** 0.5 if size else apart:.1e}")
    return found


def _cause(error: Exception) -> str:
    if isinstance(error, Refused):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
