"""Sources whose training tasks come again: a finite list of them, and a buffer of those that are hard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from innerloop.problem import Task
from innerloop.tasks._episodes import TaskSource, random_bits, uniform


class Recurring(TaskSource):
    """The first ``count`` training tasks of a source, one after the other, over and over: for ``carry="task"``.

    Validation and test tasks stay as they are. Let no fewer recur than are in a batch, and for several processes a
    multiple of that: ``il.tasks.Recurring(il.tasks.sinusoid(), 100)``.

    Raises:
        ValueError: ``count`` below 1.
    """

    def __init__(self, source: TaskSource, count: int) -> None:
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(f"{count} tasks recur; give a whole number from 1")
        self.source, self.count = source, count
        self.made = source.made and {**source.made, "recurring": count}

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # before it is there
            raise AttributeError(name)
        return getattr(self.source, name)

    def ids(self, split: str, start: int, count: int) -> list[int]:
        """The numbers, in the source's own stream, of the tasks that `batch` gives."""
        return [place % self.count if split == "train" else place for place in range(start, start + count)]

    def batch(self, split: str, start: int, count: int) -> Task:
        """See `TaskSource.batch`."""
        if split != "train":
            return self.source.batch(split, start, count)
        parts = [self.source.batch(split, each, 1) for each in self.ids(split, start, count)]
        found: Task = pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
        return found


class Prioritised(Recurring):
    """A source that comes back to hard training tasks: Robust MAML's prioritised buffer (arXiv 2103.08233).

    A place in a batch is, by chance, a fresh task of the stream or one of the buffer, drawn in proportion to a power of
    its last loss after adaptation. A batch is a pure function of place, seed and the losses in the buffer, which
    `innerloop.fit` keeps in its checkpoints. The rule is reconstructed, since the paper's is not known; its priorities
    come from tasks like those of the test, and the share grows.

    Args:
        source: where tasks come from.
        count: tasks in the buffer, those of the largest losses.
        share: of the places that the buffer fills, from 0 to 1.
        power: of the losses; 0 draws evenly.
        seed: selects the draws.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, source: TaskSource, count: int = 1000, share: float = 0.5, power: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(source, count)
        if not (0 <= share <= 1 and power >= 0):
            raise ValueError(f"share is {share} and power {power}; they must be from 0 to 1, and 0 or more")
        self.share, self.power, self.seed, self.made = share, power, seed, None
        self.losses: dict[int, float] = {}

    def ids(self, split: str, start: int, count: int) -> list[int]:
        """As of `Recurring`, by the losses known now."""
        fresh = np.arange(start, start + count)
        if split != "train" or not self.losses:
            return fresh.tolist()
        draws = uniform(random_bits("priority", self.seed, start, count, 2))
        sums = np.cumsum(np.array(list(self.losses.values())) ** self.power)
        places = np.searchsorted(sums, draws[:, 1] * sums[-1], side="right").clip(max=len(sums) - 1)
        return np.where(draws[:, 0] < self.share, np.array(list(self.losses))[places], fresh).tolist()

    def seen(self, ids: Sequence[int], losses: Sequence[float]) -> None:
        """Take in the losses of tasks, which must not be below 0; `innerloop.fit` calls it every step."""
        found = self.losses | {each: max(loss, 1e-30) for each, loss in zip(ids, losses, strict=True)}
        self.losses = dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[: self.count])

    def state_dict(self) -> dict[str, Any]:
        """The losses of the tasks in the buffer."""
        return {"losses": dict(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.losses = dict(state["losses"])
