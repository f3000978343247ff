"""A function of one task over a batch of tasks: by vmap, in chunks, and task by task where that will not do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop.problem import End, Task
from innerloop.trees import map_tensors, tree_map

Out = TypeVar("Out")


class OverTasks:
    """Maps functions of one task over batches.

    Args:
        what: the model or problem, for the warning that vmap cannot take it; it is tried no more after that.
    """

    def __init__(self, what: str) -> None:
        self.what, self.vectorise = what, True

    def __call__(
        self,
        function: Callable[..., Out],
        given: Any,
        tasks: Task | list[Task],
        starts: Sequence[End | None],
        *,
        chunk: int,
        seed: int,
        rows: Sequence[Tensor] | Tensor | None,
        weights: Tensor | None = None,
        run: Callable[[Callable[..., Any], tuple[Any, ...], tuple[int, bool, int]], Any] | None = None,
    ) -> Iterator[tuple[list[int], Out]]:
        """Map ``function(given, task, start, seed, rows)``; yields places in the batch, and results stacked.

        A batch is computed by chunks of tasks that are taken up at the same step. A model that vmap cannot take is
        computed task by task from then on, with one warning.

        Args:
            function: of one task.
            given: what it reads beside the task, tensors and numbers.
            tasks: stacked, or a list of which each is computed by itself.
            starts: where each is taken up.
            chunk: how many at once, 1 or more.
            seed: from which each task's own is counted.
            rows: what each task sees in each step, where the solver takes minibatches.
            weights: by which the first of three results is summed in place of being stacked, ``[tasks]``.
            run: calls in its own way the function of a chunk that it is given, with the arguments that it is given.
                It is told the chunk's first place, whether that stands alone, and the step that it is taken up at.
        """
        groups: dict[int | None, list[int]] = {}
        for place, start in enumerate(starts):
            groups.setdefault(None if start is None else start.step, []).append(place)
        size = 1 if isinstance(tasks, list) else chunk
        todo = [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
        refusal: Exception | None = None
        with torch.inference_mode(False), torch.no_grad():
            while todo:
                places = todo.pop(0)
                if len(places) > 1 and (not self.vectorise or refusal is not None):
                    todo[:0] = [[place] for place in places]
                    continue
                try:
                    computed, arguments, about = _chunk(function, given, tasks, starts, places, seed, rows, weights)
                    out = computed(*arguments) if run is None else run(computed, arguments, about)
                except torch.OutOfMemoryError as error:
                    error.add_note(f"{len(places)} tasks were computed at once: give a smaller chunk_size")
                    raise
                except RuntimeError as error:
                    if len(places) == 1:
                        if str(error).startswith("the derivative for"):
                            error.add_note(
                                "the model has an operation without a second derivative: products='differences' does "
                                "without one (--products differences), and so does meta_gradient=FirstOrder()"
                            )
                        raise
                    # If the loop fails as well, the fault is not vmap's, and the loop's error is the clearer one.
                    refusal = error
                    todo.insert(0, places)
                    continue
                if refusal is not None:
                    self.vectorise = False
                    warnings.warn(
                        f"{self.what} is computed task by task, same result, slower, because vmap cannot take it: "
                        f"{str(refusal).splitlines()[0]}",
                        stacklevel=3,
                    )
                    refusal = None
                yield places, out


def _chunk(
    function: Callable[..., Out],
    given: Any,
    tasks: Any,
    starts: Sequence[End | None],
    places: list[int],
    seed: int,
    rows: Any,
    weights: Tensor | None,
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, bool, int]]:
    """The function of one chunk, by vmap, or of a lone task as it is; its arguments; and where and when it begins."""
    alone, seed = len(places) == 1, seed + 1000 * places[0]
    whole = places == list(range(places[0], places[-1] + 1))
    part: Any = places[0] if alone else slice(places[0], places[-1] + 1) if whole else places
    chunk = tasks if whole and not alone and len(places) == len(starts) else one_of(tasks, part)
    known = [start for start in (starts[place] for place in places) if start is not None]
    step = known[0].step if known else 0
    left = [(start.params, start.state, start.solution) for start in known]
    begin = None if not left else left[0] if alone else tree_map(lambda *parts: torch.stack(parts), *left)
    mine = None if rows is None else rows[part]

    def computed(given: Any, shares: Tensor | None, chunk: Any, begin: Any, rows: Any) -> Any:
        def one(task: Task, begin: Any, row: Any) -> Any:
            start = None if begin is None else End(begin[0], begin[1], step, begin[2])
            return function(given, task, start, seed, row)

        if alone:
            first, *others = one(chunk, begin, rows)
            stacked = tree_map(lambda value: value.unsqueeze(0), others if shares is not None else [first, *others])
            return tuple(stacked) if shares is None else (_scaled(shares[0], first), *stacked)
        dims = (0, None if begin is None else 0, None if rows is None else 0)
        out = torch.func.vmap(one, in_dims=dims, randomness="different")(chunk, begin, rows)
        return out if shares is None else (weighted(shares, out[0]), *out[1:])

    arguments = given, None if weights is None else weights[places], chunk, begin, mine
    return computed, arguments, (places[0], alone, step)


def weighted(weights: Tensor, tree: Any) -> Any:
    """The weighted sum over the first dimension, in the tree's own precision, whatever autocast would make of it."""
    with torch.autocast(weights.device.type, enabled=False):
        return tree_map(lambda value: torch.tensordot(weights.to(value), value, 1), tree)


def _scaled(weight: Tensor, tree: Any) -> Any:
    """A tree times a number, in the tree's own precision."""
    return tree_map(lambda value: value * weight.to(value), tree)


def in_order(found: list[tuple[list[int], Any, Any]], count: int) -> Any:
    """Numbers of all tasks, stacked in the batch's order."""
    if len(found) == 1:
        return found[0][1]
    order = torch.tensor([place for places, _, _ in found for place in places]).argsort()
    return tree_map(lambda *parts: torch.cat(parts)[order.to(parts[0].device)], *(each for _, each, _ in found))


def one_of(tasks: Any, place: int) -> Task:
    """One task of a batch."""
    found: Task = tasks[place] if isinstance(tasks, list) else map_tensors(lambda value: value[place], tasks)
    return found
