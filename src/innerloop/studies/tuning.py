"""A short search over the outer rate, the same for every method of a comparison."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from innerloop.errors import Diverged
from innerloop.reporting import in_fresh_process
from innerloop.tasks import TaskSource
from innerloop.training.allocator import keep_freed_memory
from innerloop.training.build import arithmetic, build_learner, build_outer, build_tasks, with_inner_rate
from innerloop.training.evaluation import evaluate
from innerloop.training.fit import fit
from innerloop.training.settings import Settings

RATES, FACTOR = 3, 3.0
BUDGET = 0.3  # of a training's outer steps, that all rates of a method take together


def rates(own: float, count: int) -> list[float]:
    """So many outer rates, a factor of 3 apart, around a method's own, which is one of them."""
    return [float(f"{own * FACTOR ** (place - (count - 1) // 2):.3g}") for place in range(count)]


def search(settings: Settings, count: int, steps: int) -> dict[str, float | None]:
    """Validation accuracy after a short training at each of the `rates`, by rate; None where training diverged.

    Args:
        settings: of the method; the schedule runs over the short training.
        count: how many rates.
        steps: of a whole training, of which all rates together take `BUDGET`, each one step or more.

    Raises:
        Failed: the process that trained did not end well.
    """
    tried = rates(settings.outer_lr, count)
    found = in_fresh_process(search_here, asdict(settings), tried, max(1, int(BUDGET * steps / count)))
    return dict(zip(map(str, tried), found, strict=True))


def best(found: dict[str, float | None], own: float) -> float:
    """The rate of the highest accuracy; the method's own where all diverged."""
    known = {float(rate): accuracy for rate, accuracy in found.items() if accuracy is not None}
    return max(known, key=known.__getitem__) if known else own


def search_here(settings: dict[str, Any], tried: list[float], steps: int) -> list[float | None]:
    """As `search`, in this process, which should be a fresh one."""
    keep_freed_memory()  # such a process is slow otherwise
    chosen = Settings(**settings)
    tasks = build_tasks(chosen, ["train", "validation"])
    chosen = with_inner_rate(chosen, tasks)
    return [_accuracy(replace(chosen, outer_lr=rate, steps=steps), tasks) for rate in tried]


def _accuracy(settings: Settings, tasks: TaskSource) -> float | None:
    outputs = settings.method()[2].trains_on(tasks).output_size
    learner = build_learner(settings, tasks.input_shape, outputs)
    try:
        with arithmetic(settings):
            fit(
                learner, tasks, steps=settings.steps, start_from=settings.start_from, validation_tasks=0,
                progress=False, **build_outer(settings, learner),
            )  # fmt: skip
            return evaluate(learner, tasks, "validation", settings.validation_tasks).quality
    except Diverged:
        return None
