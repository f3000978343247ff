"""The blocks of a model: its parts in the order in which the input passes them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call

from innerloop.problem import Tree


def chain_of(model: nn.Module) -> list[nn.Module] | None:
    """The parts whose composition is the model, or None if it does not say which.

    Such are the children of an ``nn.Sequential`` whose forward pass is torch's own and has no hooks; and what any other
    module names by an attribute ``blocks``, a sequence of sub-modules that hold all of its parameters and buffers. That
    these are its whole forward pass still has to be seen on real inputs.
    """
    hooks = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks
    plain = type(model).forward is nn.Sequential.forward and "forward" not in vars(model)
    if isinstance(model, nn.Sequential) and plain and not hooks:
        return list(model)
    declared = getattr(model, "blocks", None)
    if not isinstance(declared, (Sequence, nn.ModuleList, nn.Sequential)):
        return None
    parts = list(declared)
    if not all(isinstance(part, nn.Module) for part in parts):
        return None
    inside = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return parts if all(id(tensor) in inside for tensor in (*model.parameters(), *model.buffers())) else None


def blocks_of(model: nn.Module) -> list[list[nn.Module]] | None:
    """Split a model into blocks, or return None if it does not say how.

    Parts without parameters join the block before them (the first ones the block after them).
    """
    chain = chain_of(model)
    blocks: list[list[nn.Module]] = []
    leading: list[nn.Module] = []
    for part in chain or ():
        if next(part.parameters(), None) is not None:
            blocks.append([*leading, part])
            leading = []
        elif blocks:
            blocks[-1].append(part)
        else:
            leading.append(part)
    return blocks or None


def parameter_names(model: nn.Module, parts: Iterable[nn.Module]) -> list[str]:
    """Names in ``model.named_parameters()`` of the parameters that the parts hold; a shared parameter has one name."""
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def leading(module: nn.Module) -> nn.Parameter:
    """The parameter whose precision data take: the first that learns. Others may be frozen indices."""
    return max(module.parameters(), key=lambda each: (each.requires_grad, each.is_floating_point()))


def call(module: nn.Module, tree: Tree, inputs: Any, recomputes: bool = False) -> Any:
    """A module as a function of its parameters.

    A dict of inputs is given by keywords where the module's forward pass takes those; all else is its one argument.

    Args:
        module: the module.
        tree: parameters and buffers by name; those left out are its own.
        inputs: what it is given.
        recomputes: it checkpoints itself, so that backward passes run parts of it again and read its parameters then.
    """
    if type(inputs) is dict and _takes(module, inputs):
        return _applied(module, tree, (), inputs, recomputes)
    return _applied(module, tree, (inputs,), {}, recomputes)


def _applied(module: nn.Module, tree: Tree, args: tuple[Any, ...], keywords: dict[str, Any], recomputes: bool) -> Any:
    if not recomputes:
        return _swapped(module, tree, args, keywords)
    # the module's own parameters are back before the backward pass
    named = (*module.named_parameters(), *module.named_buffers())
    return copy.deepcopy(module, {id(value): tree.get(name, value) for name, value in named})(*args, **keywords)


Slots = dict[str, list[tuple[dict[str, Any], str]]]
_slots: WeakKeyDictionary[nn.Module, tuple[list[int], Slots]] = WeakKeyDictionary()


def _swapped(module: nn.Module, tree: Tree, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """``torch.func.functional_call``, which looks for every name anew in every call, in a tenth of its time."""
    stores = [store for each in module.modules() for store in (each._parameters, each._buffers)]
    facts = [id(store) for store in stores] + [id(value) for store in stores for value in store.values()]
    known, slots = _slots.get(module, (None, {}))
    if known != facts:
        slots = _slots_of(module)
        _slots[module] = facts, slots
    if not tree.keys() <= slots.keys():
        return functional_call(module, tree, args, keywords)
    before = [(store, key, store[key]) for name in tree for store, key in slots[name]]
    try:
        for name, value in tree.items():
            for store, key in slots[name]:
                store[key] = value
        return module(*args, **keywords)
    finally:
        for name in tree:  # as functional_call does: a forward pass may have put another tensor there
            store, key = slots[name][0]
            tree[name] = store[key]
        for store, key, value in before:
            store[key] = value


def _slots_of(module: nn.Module) -> Slots:
    """Where a module keeps its parameters and buffers, by name; a shared one in several places."""
    shared: dict[int, list[tuple[dict[str, Any], str]]] = {}
    names: dict[str, int] = {}
    for prefix, each in module.named_modules():
        for store in (each._parameters, each._buffers):
            for key, value in store.items():
                if value is not None:
                    names[f"{prefix}.{key}" if prefix else key] = id(value)
                    shared.setdefault(id(value), []).append((store, key))
    return {name: shared[place] for name, place in names.items()}


def twin(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` of a module, in half the time: plain settings and empty dicts of hooks are not looked into."""
    kind = type(module)
    if id(module) in memo:
        return memo[id(module)]
    odd = "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in odd):
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = kind.__new__(kind)
    for name, value in vars(module).items():
        if name == "_modules":
            vars(made)[name] = {key: each if each is None else twin(each, memo) for key, each in value.items()}
        elif value is None or isinstance(value, (bool, int, float, str)):
            vars(made)[name] = value
        else:
            vars(made)[name] = (
                type(value)() if type(value) in (dict, OrderedDict) and not value else copy.deepcopy(value, memo)
            )
    return made


@contextlib.contextmanager
def recomputation() -> Iterator[list[str]]:
    """Collects something where a model checkpoints itself within the block (``use_reentrant=False``).

    Raises:
        ValueError: within the block, it does so in the reentrant way.
    """
    seen: list[str] = []
    original = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    reentrant = torch.utils.checkpoint.CheckpointFunction

    def noted(*args: Any, **keywords: Any) -> Any:
        seen.append("checkpoint")
        return original(*args, **keywords)

    class Refused:
        @staticmethod
        def apply(*args: Any) -> None:
            raise ValueError(
                "the model checkpoints itself in the reentrant way, whose gradients no function can take: use "
                "use_reentrant=False (of transformers: gradient_checkpointing_kwargs={'use_reentrant': False})"
            )

    torch.utils.checkpoint._checkpoint_without_reentrant_generator = noted
    torch.utils.checkpoint.CheckpointFunction = Refused  # type: ignore[assignment, misc]
    try:
        yield seen
    finally:
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = original
        torch.utils.checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


def _takes(module: nn.Module, keywords: dict[str, Any]) -> bool:
    try:
        inspect.signature(module.forward).bind(**keywords)
    except TypeError:
        return False
    return True


class Chain:
    """A run of a model's parts as a pure function of a tree that is named as the whole model's parameters are.

    Args:
        model: the whole model.
        parts: some of its sub-modules, in order.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self.recomputes, self._chain = False, nn.Sequential(*parts)
        own = (*self._chain.named_parameters(), *self._chain.named_buffers())
        self._named = {local: names[id(tensor)] for local, tensor in own}
        self.names = parameter_names(model, parts)
        self.buffers = {names[id(buffer)] for part in parts for buffer in part.buffers()}

    def __call__(self, tree: Tree, inputs: Any) -> Any:
        """Pass the inputs through the parts; what the tree does not name keeps its own value."""
        values = {local: tree[name] for local, name in self._named.items() if name in tree}
        return _applied(self._chain, values, (inputs,), {}, self.recomputes)
