"""Trees are mapped as torch's pytree maps them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop as il
from innerloop.trees import tensors, tree_leaves, tree_map, unflatten

ONE, TWO = torch.ones(2), torch.zeros(3)
TREES = [
    ONE,
    {"b": ONE, "a": (TWO, [ONE, None])},
    il.Task((ONE, {"ids": TWO}), []),
    OrderedDict(b=ONE, a=TWO),
    il.Steps((ONE, TWO)),
    {"empty": {}, "number": 3, "tuple": (), "text": "x"},
]


@pytest.mark.parametrize("tree", TREES)
def test_leaves_and_structure_are_those_of_pytree(tree: Any) -> None:
    leaves = pytree.tree_leaves(tree)
    assert [id(leaf) for leaf in tree_leaves(tree)] == [id(leaf) for leaf in leaves]
    assert [id(leaf) for leaf in tensors(tree)] == [id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    numbered = unflatten(tree, list(range(len(leaves))))
    expected = pytree.tree_unflatten(list(range(len(leaves))), pytree.tree_structure(tree))
    assert pytree.tree_structure(numbered) == pytree.tree_structure(expected)
    assert pytree.tree_leaves(numbered) == list(range(len(leaves)))


def test_several_trees_go_by_key_whatever_their_order() -> None:
    first, second = {"a": ONE, "b": (TWO,)}, {"b": (TWO + 5,), "a": ONE + 1}
    found = tree_map(torch.add, first, second)
    assert found["a"].tolist() == [3, 3]
    assert found["b"][0].tolist() == [5, 5, 5]


def test_trees_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        tree_map(torch.add, (ONE, ONE), (ONE,))
