"""What a method costs, measured alone in fresh processes, so that no number leaks into another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop.blocks import leading
from innerloop.errors import Failed
from innerloop.learner import MetaLearner
from innerloop.problem import Task
from innerloop.reporting import Timing, in_fresh_process, peak_memory, time_of
from innerloop.training.build import arithmetic, build_learner, build_tasks
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint
from innerloop.training.session import multi_step_weights
from innerloop.training.settings import Settings
from innerloop.trees import tree_leaves, tree_map

SECONDS, MOST_REPETITIONS = 4.0, 50  # for which, and how often at most, something is repeated to be timed


class Cost(NamedTuple):
    """What is measured of a method before it is trained.

    Attributes:
        meta_step: seconds of one.
        memory_at: peak bytes of a meta-step above model and tasks, by the number of inner steps; without the numbers
            at which it could not be measured.
        products: curvature products of a task's meta-gradient.
        adaptation: seconds of adapting to one task.
        rates: validation accuracy by outer rate, of those tried; None where training diverged.
    """

    meta_step: Timing
    memory_at: dict[int, int]
    products: float
    adaptation: Timing
    rates: dict[str, float | None] = {}  # noqa: RUF012  # never changed

    @classmethod
    def of(cls, found: dict[str, Any]) -> Cost:
        """The cost that was written to a file as `_asdict`."""
        memory_at = {int(number): size for number, size in found["memory_at"].items()}
        meta_step, adaptation = (Timing(*found[name]) for name in ("meta_step", "adaptation"))
        return cls(meta_step, memory_at, found["products"], adaptation, found.get("rates", {}))


def save_tasks(path: Path, settings: Settings, split: str = "train") -> None:
    """Keep one batch of tasks in a file, so that the processes that measure need not load a data set."""
    tasks = build_tasks(settings, [split])
    shape = {"shape": tasks.input_shape, "outputs": tasks.output_size, "regression": tasks.ways is None}
    save_checkpoint(path, {"task": tasks.batch(split, 0, settings.tasks_per_batch)._asdict(), "model": shape})


def cost(settings: Settings, tasks: Path, memory_steps: Sequence[int]) -> Cost:
    """Measure a method.

    Args:
        settings: of the method.
        tasks: file that `save_tasks` has written.
        memory_steps: numbers of inner steps at which memory is measured, besides those of the settings.

    Raises:
        Failed: the process that measured with the settings' own number of inner steps did not end well.
    """
    found = in_fresh_process(measure_here, asdict(settings), str(tasks), True)
    memory_at = {settings.inner_steps: found.pop("memory")}
    for steps in memory_steps:
        if steps not in memory_at:
            with contextlib.suppress(Failed):
                memory_at[steps] = peak(replace(settings, inner_steps=steps), tasks)
    return Cost.of(found | {"memory_at": dict(sorted(memory_at.items()))})


def peak(settings: Settings, tasks: Path) -> int:
    """Peak bytes of a method's meta-step above model and tasks; arguments as in `cost`.

    Raises:
        Failed: the process that measured did not end well.
    """
    return int(in_fresh_process(measure_here, asdict(settings), str(tasks), False)["memory"])


def measure_here(settings: dict[str, Any], tasks: str, everything: bool) -> dict[str, Any]:
    """Measure in this process, which should be a fresh one.

    Args:
        settings: of the method.
        tasks: file that `save_tasks` has written.
        everything: and not peak memory alone.
    """
    chosen, stored = Settings(**settings), load_checkpoint(Path(tasks))
    if chosen.carry == "task":  # one batch again and again, in which the place names the task
        chosen = replace(chosen, carry="slot")
    few = replace(chosen, inner_steps=min(chosen.inner_steps, 2) or 1)  # one is too few for some solvers
    learner, short = (build_learner(each, **stored["model"]) for each in (chosen, few))
    place = leading(learner)
    batch = Task(**stored["task"]).to(place.device, place.dtype)
    with arithmetic(chosen):
        return _measure(learner, batch, short, chosen, everything)


def _measure(
    learner: MetaLearner, batch: Task, short: MetaLearner, settings: Settings, everything: bool
) -> dict[str, Any]:
    """Memory is that of the dearest meta-step; seconds are the mean where the first ones have the multi-step loss."""
    device = tree_leaves(batch)[0].device
    first = multi_step_weights(learner.inner.steps, 0, 1) if settings.multi_step_steps else None
    few: Task = tree_map(lambda each: each[:2], batch)  # which are computed at once where more are
    short.meta_step(few)  # libraries load their kernels on first use; that is not the method's memory
    short.zero_grad(set_to_none=True)
    products: list[Tensor] = []

    def meta_step(weights: Sequence[float] | None = None) -> None:
        products[:] = [learner.meta_step(batch, step_weights=weights).diagnostics["curvature_products"]]

    found: dict[str, Any] = {"memory": peak_memory(partial(meta_step, first), device)}
    if everything:
        inputs, targets = tree_map(lambda each: each[0], batch.support)
        share = min(1.0, (settings.multi_step_steps or 0) / settings.steps)
        dear = _timed(partial(meta_step, first), device) if share else Timing(0.0, 0.0, 0.0)
        plain = _timed(meta_step, device)
        found["meta_step"] = Timing(
            *(share * one + (1 - share) * other for one, other in zip(dear, plain, strict=True))
        )
        found["products"] = products[0].item()
        learner.eval()
        found["adaptation"] = _timed(lambda: learner.adapt(inputs, targets), device)
    return found


def _timed(function: Callable[[], object], device: torch.device) -> Timing:
    """Some seconds' worth of calls, at least three."""
    began = time.perf_counter()
    function()
    once = time.perf_counter() - began
    return time_of(function, max(3, min(MOST_REPETITIONS, int(SECONDS / once))), device)
