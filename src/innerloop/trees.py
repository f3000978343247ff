"""Maps over trees of tensors: torch's own pytree, with a short way through what it mostly gets, dicts and tuples.

torch 2.13 flattens trees in Python, which for a small model takes longer than the arithmetic on its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """``function`` of every leaf, and of those at its place in trees of the same structure."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    kind = type(tree)
    if kind is dict:
        if not others:
            return {key: tree_map(function, value) for key, value in tree.items()}
        return {key: tree_map(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if kind is tuple or kind is list:
        return kind(tree_map(function, *values) for values in zip(tree, *others, strict=True))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(tree_map(function, *values) for values in zip(tree, *others, strict=True)))
    return pytree.tree_map(function, tree, *others)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves in order."""
    leaves: list[Any] = []
    tree_map(leaves.append, tree)
    return leaves


def tensors(tree: Any) -> list[Tensor]:
    """The leaves that are tensors, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def unflatten(tree: Any, leaves: list[Any]) -> Any:
    """A tree of the same structure with other leaves."""
    left = iter(leaves)
    return tree_map(lambda _: next(left), tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``function`` of every leaf that is a tensor; the others stay."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
