"""Where tasks were left, for inner loops that go on from batch to batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop.meta_gradient import finite
from innerloop.problem import End, Tree
from innerloop.trees import map_tensors


class Carried:
    """Where tasks were left, by key: the place in the batch, or whatever names a task that recurs.

    Holds the adapted parameters, solver state and solution of every key seen. It is no part of a learner's
    ``state_dict()`` and has its own; `innerloop.fit` keeps both.
    """

    def __init__(self) -> None:
        self._left: dict[Hashable, End] = {}

    def gather(self, keys: Sequence[Hashable], place: torch.device) -> list[End | None]:
        """Where the tasks were left, moved to a device; None for a key not seen."""
        return map_tensors(lambda value: value.to(place), [self._left.get(key) for key in keys])

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, as a module's buffers are where it changes its precision."""
        self._left = {key: map_tensors(function, left) for key, left in self._left.items()}

    def forget(self, *keys: Hashable) -> None:
        """Let the tasks of these keys begin at the start again; without keys all of them."""
        for key in keys or list(self._left):
            self._left.pop(key, None)

    def store(self, keys: Sequence[Hashable], ends: Sequence[End]) -> None:
        """Keep where tasks were left; one in which something is not finite stays where it was."""
        for key, end in zip(keys, ends, strict=True):
            if finite((end.params, end.state, end.solution)):
                self._left[key] = end

    def change(self, function: Callable[[Tree], Tree], besides: Collection[Hashable]) -> None:
        """Replace the parameters of all tasks but those of some keys."""
        for key in self._left.keys() - set(besides):
            self._left[key] = self._left[key]._replace(params=function(self._left[key].params))

    def state_dict(self) -> dict[Hashable, dict[str, Any]]:
        """Where every task was left, in dicts and tensors alone."""
        return {key: left._asdict() for key, left in self._left.items()}

    def load_state_dict(self, state: Mapping[Hashable, Mapping[str, Any]]) -> None:
        """Take over what ``state_dict`` gave, in place of what is held."""
        self._left = {key: End(**left) for key, left in state.items()}
