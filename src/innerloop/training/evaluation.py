"""How good a learner is: means over many tasks, with their 95 % intervals."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from innerloop.batch_norm import TaskBatchNorm
from innerloop.bilevel import Bilevel
from innerloop.few_shot import scores
from innerloop.learner import MetaLearner
from innerloop.problem import Task
from innerloop.tasks import TaskSource
from innerloop.training import baselines, processes
from innerloop.training.logs import tracked
from innerloop.training.store import resumable
from innerloop.trees import tensors


class Source(Protocol):
    """Where a learner's tasks come from: a `TaskSource`, or any object with this one method."""

    def batch(self, split: str, start: int, count: int) -> Task | Sequence[Task]:
        """Tasks ``start`` to ``start + count - 1`` of a split's stream: a pure function of its arguments.

        What `Bilevel.meta_step` takes: a list of tasks; one `Task` with a leading task dimension, for a learner whose
        tasks are stacked; a lone `Task` where one is asked for.
        """


def draw(tasks: Source, learner: Bilevel, split: str, start: int, count: int) -> Task | Sequence[Task]:
    """So many tasks of a split, counted.

    Raises:
        ValueError: the source gives more or fewer.
    """
    batch = tasks.batch(split, start, count)
    found = 1
    if not isinstance(batch, Task):
        found = len(batch)
    elif learner.stacked:
        leaves = [leaf for leaf in tensors(batch) if leaf.ndim]
        found = len(leaves[0]) if leaves else count
    if found != count:
        raise ValueError(
            f"batch({split!r}, {start}, {count}) of the task source gives {found} of {count} tasks: let it give a list "
            "of as many tasks as asked for, or ask for one at a time (tasks_per_batch=1)"
        )
    return batch


def shape_of(tasks: Source) -> dict[str, Any]:
    """``input_shape``, ``output_size`` and ``ways`` (None for regression) of a source's tasks.

    A source that does not say is asked for one task: classes are targets that are whole numbers.
    """
    names = "input_shape", "output_size", "ways"
    if all(hasattr(tasks, name) for name in names):
        return {name: getattr(tasks, name) for name in names}
    found = tasks.batch("train", 0, 1)
    stacked = isinstance(found, Task)
    support = found.support if isinstance(found, Task) else found[0].support
    try:
        inputs, targets = (tensors(part)[0] for part in support)
        example, target = (part[0, 0] if stacked else part[0] for part in (inputs, targets))
        classes = None if targets.is_floating_point() else int(targets.max()) + 1
    except (IndexError, RuntimeError, TypeError, ValueError):  # no few-shot task
        return dict.fromkeys(names)
    return dict(zip(names, (tuple(example.shape), classes or target.numel(), classes), strict=True))


class Estimate(NamedTuple):
    """A mean over n tasks and the half-width of its 95 % interval, 1.96 standard deviations over the root of n."""

    mean: float
    interval: float

    @staticmethod
    def of(values: Tensor) -> Estimate:
        """The estimate from the values of the tasks, ``[tasks]``; the interval of a single task is unknown, NaN."""
        values = values.double()
        spread = values.std().item() if len(values) > 1 else math.nan
        return Estimate(values.mean().item(), 1.96 * spread / math.sqrt(len(values)))


class Baseline(NamedTuple):
    """The accuracy of a baseline, and what adaptation's is above it over the same tasks."""

    accuracy: Estimate
    difference: Estimate

    @property
    def better(self) -> bool:
        """Whether it is better than adaptation, by more than the interval of the difference."""
        return self.difference.mean < -self.difference.interval


class Scores(NamedTuple):
    """What `evaluate` measures; accuracies are None for regression, curves where none was asked.

    Curves hold one estimate for each number of adaptation steps, from 0 on; ``accuracies`` that of every task,
    ``[tasks]``, by which two learners are compared task by task; ``answers`` the label and the guess of every query,
    ``[tasks, queries, 2]``; ``losses`` the loss of every task, ``[tasks]``; ``baselines`` those asked for, by
    name.
    """

    tasks: int
    steps: int
    inductive: bool
    loss: Estimate
    accuracy: Estimate | None
    loss_curve: list[Estimate] | None
    accuracy_curve: list[Estimate] | None
    accuracies: Tensor | None
    losses: Tensor
    answers: Tensor | None = None
    baselines: dict[str, Baseline] = {}  # noqa: RUF012  # never changed

    @property
    def protocol(self) -> str:
        """How queries are predicted: all of a task together, or each alone."""
        return "inductive" if self.inductive else "transductive"

    @property
    def quality(self) -> float:
        """The number by which learners are compared, more is better: the accuracy, or for regression minus the loss."""
        return self.accuracy.mean if self.accuracy else -self.loss.mean


def evaluate(
    learner: Bilevel,
    tasks: Source,
    split: str = "test",
    count: int = 1000,
    *,
    tasks_per_batch: int = 32,
    steps: int | None = None,
    inductive: bool = False,
    curve: bool = False,
    beside: bool = False,
    label: str = "",
    kept: Path | None = None,
) -> Scores:
    """Adapt to the first ``count`` tasks of a split, without dropout, and score them; the learner stays as it is.

    Several processes share the work and all get the same scores. Every task begins at the start, whatever the learner
    carries on in training.

    Args:
        learner: the learner to score.
        tasks: where the tasks come from.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        count: number of tasks.
        tasks_per_batch: tasks given to the learner at once; 1 where its tasks are not stacked.
        steps: adaptation steps; None takes the inner solver's.
        inductive: predict each query without seeing the others.
        curve: score after every adaptation step as well.
        beside: score the `innerloop.training.baselines` on the same tasks as well, which must be of classification.
        label: what a terminal shows beside a progress bar; empty shows none.
        kept: file to which each batch's results are appended, and from which those of the same evaluation, interrupted
            before, are taken; not with several processes.

    Raises:
        ValueError: ``count`` or ``tasks_per_batch`` below 1, or what the source refuses.
    """
    if count < 1 or tasks_per_batch < 1:
        raise ValueError(f"evaluation needs at least 1 task and 1 task a batch, not {count} and {tasks_per_batch}")
    size = tasks_per_batch if learner.stacked else 1
    kept = kept if processes.world() == 1 else None
    key = key_of(learner, tasks, (split, size, steps, inductive, curve, beside)) if kept else ""
    found: list[tuple[int, dict[str, Tensor]]] = []
    with resumable(kept, key) as (before, keep), evaluation_mode(learner):
        for start in tracked(range(processes.rank() * size, count, processes.world() * size), label):
            number = min(size, count - start)
            part = before.get(start)
            if part is None or any(len(value) != number for value in part.values()):
                batch = draw(tasks, learner, split, start, number)
                part = _part(learner, batch, steps=steps, inductive=inductive, curve=curve)
                if beside:
                    part |= baselines.accuracies(learner, batch, tasks.ways, inductive)  # type: ignore[arg-type, attr-defined]
                keep(start, part)
            found.append((start, part))
    parts = [part for _, part in sorted(processes.gather(found), key=lambda each: each[0])]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    accuracies = values.get("accuracy")
    others = {name: values[name] for name in baselines.WHAT if name in values}
    return Scores(
        tasks=count,
        steps=learner.inner.adaptation_steps if steps is None else steps,
        inductive=inductive,
        loss=Estimate.of(values["loss"]),
        accuracy=None if accuracies is None else Estimate.of(accuracies),
        loss_curve=_curve(values.get("loss_curve")),
        accuracy_curve=_curve(values.get("accuracy_curve")),
        accuracies=accuracies,
        losses=values["loss"],
        answers=values.get("answers"),
        baselines={
            name: Baseline(Estimate.of(each), Estimate.of(values["accuracy"] - each)) for name, each in others.items()
        },
    )


def _part(learner: Bilevel, batch: Task | Sequence[Task], **asked: Any) -> dict[str, Tensor]:
    """What is found of a batch of tasks, on the CPU; label and guess of every query where it is stacked."""
    found = learner.evaluate(batch, **asked)._asdict()
    outputs = scores(found.pop("outputs"))
    stacked = isinstance(outputs, Tensor) and outputs.ndim == 3
    if stacked and isinstance(batch, Task) and found["accuracy"] is not None:
        found["answers"] = torch.stack([batch.query[1].cpu(), outputs.argmax(-1).cpu()], dim=-1)
    return {name: value.cpu() for name, value in found.items() if value is not None}


def _curve(values: Tensor | None) -> list[Estimate] | None:
    return None if values is None else [Estimate.of(column) for column in values.T]


def key_of(learner: Bilevel, tasks: Source, asked: tuple[Any, ...]) -> str:
    """A hash of all that results follow from but the data beyond the first task; ``asked`` begins with the split."""
    digest = hashlib.sha256(repr((asked, learner)).encode())
    for value in (*learner.state_dict().values(), *tensors(draw(tasks, learner, asked[0], 0, 1))):
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def evaluation_mode(learner: Bilevel) -> Iterator[None]:
    """Within the block nothing of the learner is random that is so in training alone."""
    modes = {module: module.training for module in learner.modules()}
    learner.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Assessment(NamedTuple):
    """Scores under both protocols, with those of the baselines on the same tasks.

    Attributes:
        transductive: queries predicted together; None where the learner predicts each alone anyway.
        inductive: each query predicted without seeing the others.
        no_features: why there are no baselines on features; empty where there are.
    """

    transductive: Scores | None
    inductive: Scores
    no_features: str = ""

    @property
    def nearest_neighbour(self) -> Estimate | None:
        """Accuracy of `innerloop.tasks.nearest_neighbour`; None for regression."""
        found = self.inductive.baselines.get(baselines.PIXELS)
        return found and found.accuracy

    @property
    def protocols(self) -> list[Scores]:
        """The scores there are."""
        return [scores for scores in (self.transductive, self.inductive) if scores]


def verdict(found: Mapping[str, Baseline]) -> str:
    """Which baseline is better than adaptation, by how much, and what to do, in a line; empty if none is.

    Of several the best one.
    """
    lost = [name for name, each in found.items() if each.better]
    if not lost:
        return ""
    name = min(lost, key=lambda name: found[name].difference.mean)
    by = found[name].difference
    return (
        f"{baselines.WHAT[name]} is {-100 * by.mean:.1f} ± {100 * by.interval:.1f} points better than adaptation: "
        f"{baselines.CURE[name]}"
    )


def assess(
    learner: MetaLearner,
    tasks: TaskSource,
    split: str = "test",
    count: int = 1000,
    *,
    curve: bool = False,
    label: str = "",
    kept: Path | None = None,
) -> Assessment:
    """Evaluate a learner under both protocols beside the baselines; arguments as in `evaluate`."""
    # Only batch norm that takes statistics from the queries lets one query see another.
    mixes = learner.batch_norm in ("batch", "step") and any(
        isinstance(module, TaskBatchNorm) for module in learner.modules()
    )
    first, reason = tasks.batch(split, 0, 1), ""
    beside = tasks.ways is not None and isinstance(first.query[0], Tensor)
    if beside:
        with evaluation_mode(learner):
            reason = baselines.no_features(learner, first)
    asked: dict[str, Any] = dict(curve=curve, beside=beside, label=label, kept=kept)
    transductive = evaluate(learner, tasks, split, count, **asked) if mixes else None
    return Assessment(transductive, evaluate(learner, tasks, split, count, inductive=True, **asked), reason)
