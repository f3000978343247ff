"""A learner in training: its steps, what a checkpoint keeps of it, and what is done about a batch that goes wrong."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from innerloop.bilevel import Bilevel
from innerloop.blocks import leading
from innerloop.data_checks import check_finite
from innerloop.errors import Diverged
from innerloop.learner import MetaLearner
from innerloop.meta_gradient import FirstOrder
from innerloop.meta_gradient._failures import cure
from innerloop.problem import Task
from innerloop.training import health, processes
from innerloop.training.checkpoints import save_weights
from innerloop.training.evaluation import Scores, Source, draw, shape_of
from innerloop.training.store import BEST, JsonLines, Record, load_newest, save_newest
from innerloop.training.weighting import Weights
from innerloop.trees import tensors

_log = logging.getLogger("innerloop")


def multi_step_weights(inner_steps: int, step: int, annealing: int) -> list[float] | None:
    """MAML++'s weights on the query losses after inner steps 1 to K (arXiv 1810.09502, section 4), at one outer step.

    All start at 1/K; those before the last fall linearly to 0.03/K over ``annealing`` outer steps, the last takes the
    rest. From then on the last loss alone counts, and this is None. (The authors anneal by the epoch, this by the
    step.)
    """
    if step >= annealing:
        return None
    early = max(1 - step / annealing, 0.03) / inner_steps
    return [early] * (inner_steps - 1) + [1 - early * (inner_steps - 1)]


@dataclass
class Progress:
    """What a checkpoint keeps of the loop itself.

    Attributes:
        hopeless: validations in a row of which `health.hopeless` says so.
        ahead: steps by which the schedule is ahead of the run, where time runs faster.
        stale: validations since the best one.
        validated: the step of the last validation.
        in_a_row: batches left out since the last that was not; ``skipped``: of the whole run.
        records: of the step itself, which a log may not have got.
    """

    step: int = 0
    best_step: int | None = None
    best: float = -math.inf
    stale: int = 0
    hopeless: int = 0
    ahead: int = 0
    seconds: float = 0.0
    validated: int = 0
    in_a_row: int = 0
    skipped: int = 0
    records: list[Record] = field(default_factory=list)


@dataclass(kw_only=True)
class Session:
    """A learner in training, with all that a checkpoint holds; what is not told here is as in `fit`.

    Attributes:
        skips: batches in a row that may be left out.
        best_kept: the step whose weights the file of the best ones holds.
        records: the file of records, where there is one.
        saved: where the last checkpoint is, in words; empty where there is none.
        warned: what `health.ailment` said last.
    """

    learner: Bilevel
    tasks: Source
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    folder: Path | None
    steps: int
    tasks_per_batch: int
    clip: float | None = None
    multi_step_loss: int | None = None
    first_order: int | None = None
    seed: int
    keep: int = 2
    skips: int = 0
    task_weights: Weights | None = None
    progress: Progress = field(default_factory=Progress)
    best_weights: dict[str, Tensor] | None = None
    best_kept: int | None = None
    records: JsonLines | None = None
    saved: str = ""
    warned: str = ""
    looked: bool = False

    def __post_init__(self) -> None:
        self.own = self.learner.meta_gradient

    @property
    def mine(self) -> range:
        """This process's tasks, by their place in the batch."""
        return processes.shares(self.tasks_per_batch)[processes.rank()]

    def _ids(self) -> list[int]:
        """What names this process's tasks of the next batch."""
        first, count = self.progress.step * self.tasks_per_batch + self.mine.start, len(self.mine)
        tasks: Any = self.tasks
        return tasks.ids("train", first, count) if hasattr(tasks, "ids") else list(range(first, first + count))

    def _remembers(self) -> dict[str, Any]:
        """What has a state of its own beside the learner."""
        found = {"tasks": self.tasks, "task weights": self.task_weights}
        return {name: each for name, each in found.items() if hasattr(each, "load_state_dict")}

    def draw(self) -> tuple[Task | Sequence[Task], dict[str, Any]]:
        """This process's share of the next batch, the weights of its losses and, where tasks are carried, their names.

        What is random is seeded for it, and the learner has the estimator of this step.
        """
        step, rank = self.progress.step, processes.rank()
        first = step * self.tasks_per_batch + self.mine.start
        torch.manual_seed(int(np.random.SeedSequence((self.seed, step, rank)).generate_state(1)[0]))
        batch = draw(self.tasks, self.learner, "train", first, len(self.mine))
        if not self.looked and not self.skips and isinstance(self.learner, MetaLearner):
            self._look(batch, first)
        place = step + self.progress.ahead
        self.learner.meta_gradient = FirstOrder() if place < (self.first_order or 0) else self.own
        weights = multi_step_weights(self.learner.inner.steps, place, self.multi_step_loss or 0)
        return batch, {"step_weights": weights, "task_ids": self._ids() if self.learner.carry == "task" else None}

    def _look(self, batch: Task | Sequence[Task], first: int) -> None:
        """Check the first batch: a source that gives no numbers is not a matter of rates.

        Other problems than few-shot learning may have infinities in their data, as in masks, and are not checked.
        """
        self.looked = True
        for number, task in enumerate([batch] if isinstance(batch, Task) else batch, first):
            where = f" of the batch from task {first} on" if task is batch else f" of task {number}"
            for part, examples in task._asdict().items():
                check_finite(part, examples, f"{where} of the training stream")

    def step(self, flags: list[float]) -> tuple[str, Record, list[float]]:
        """One outer step; returns the kind of its record, the record, and the flags, averaged over the processes."""
        batch, settings = self.draw()
        buffers = [buffer.clone() for buffer in self.learner.buffers()] if self.skips else []
        like = leading(self.learner)
        self.optimizer.zero_grad()
        counts = None
        if self.task_weights is not None:
            losses = self.learner.evaluate(batch, self.learner.inner.steps).loss
            counts = self.task_weights(losses, self._ids(), self.progress.step)
        metrics = self.learner.meta_step(batch, **settings, task_weights=counts)
        numbers = {"loss": metrics.loss, "accuracy": metrics.accuracy, **metrics.diagnostics}
        values = {
            name: value.detach().to(like).mean()
            for name, value in numbers.items()
            if value is not None and value.numel()
        }
        gradients = [parameter.grad for parameter in self.learner.parameters() if parameter.grad is not None]
        shared = torch.stack([*values.values(), *like.new_tensor(flags)])
        processes.average([*gradients, shared], len(self.mine) / self.tasks_per_batch)

        norm = torch.nn.utils.get_total_norm(gradients)
        *means, size = torch.cat([shared, norm.view(1).to(shared)]).tolist()
        kind, record = "train", dict(zip(values, means, strict=False))
        record |= {"gradient_norm": size, "lr": float(self.optimizer.param_groups[0]["lr"])}
        if math.isfinite(record["loss"]) and math.isfinite(size):
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.learner.parameters(), self.clip, norm)
            self.optimizer.step()
            self.progress.in_a_row = 0
            if hasattr(self.tasks, "seen"):
                self.tasks.seen(processes.gather(self._ids()), processes.gather(metrics.losses.tolist()))
        else:
            for buffer, before in zip(self.learner.buffers(), buffers, strict=False):  # running statistics
                buffer.copy_(before)
            kind, record = "skipped", self._skip(batch, settings, record["loss"], size)
        self.progress.step += 1
        return kind, record, means[len(values) :]

    def anneal(self, ahead: int) -> None:
        """Advance the schedule by the step just taken, and to where it is so many steps ahead of the run."""
        if isinstance(self.scheduler, LambdaLR):  # knows its rate anywhere: where more time is given it goes back
            self.scheduler.last_epoch += ahead - self.progress.ahead
            self.scheduler.step()
        elif self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            ahead = max(ahead, self.progress.ahead - 1)
            for _ in range(1 + ahead - self.progress.ahead):
                self.scheduler.step()
        self.progress.ahead = ahead

    def _skip(self, batch: Task | Sequence[Task], settings: dict[str, Any], loss: float, norm: float) -> Record:
        """Leave a batch out, or raise `Diverged` where that is not asked for."""
        at = self.progress
        self.optimizer.zero_grad()
        reason, where = self._cause(batch, settings)
        why = f"{reason}{where}; {cure(reason)}" if reason else cure(None)
        at.in_a_row += 1
        at.skipped += 1
        if at.in_a_row > self.skips or reason.startswith("the learner's own"):
            row = f", number {at.in_a_row} in a row that is not finite" if at.in_a_row > 1 else ""
            numbers = f"loss {loss:.4g}, norm of its gradient {norm:.4g}"
            raise Diverged(f"outer step {at.step + 1}{row}: {numbers}; {why}{self.saved}")
        first = at.step * self.tasks_per_batch
        return {"why": why, "tasks": [first, first + self.tasks_per_batch - 1], "seed": [self.seed, at.step]}

    def _cause(self, batch: Task | Sequence[Task], settings: dict[str, Any]) -> tuple[str, str]:
        """What `Bilevel.diagnose` finds, on the first process that finds something, and which tasks were looked at."""
        mine = self.learner.diagnose(batch, **settings)
        first, shares = self.progress.step * self.tasks_per_batch, processes.shares(self.tasks_per_batch)
        for rank, (reason, share) in enumerate(zip(processes.gather([mine]), shares, strict=True)):
            if reason is not None:
                whose = f" of process {rank}" if processes.world() > 1 else ""
                place = f"tasks {first + share[0]} to {first + share[-1]} of the training stream"
                return reason, f" (the batch{whose} is {place})"
        return "", ""

    def judge(self, scores: Scores) -> Record:
        """Keep the learner's weights if they are the best in validation yet, and return a record.

        Raises:
            Diverged: the loss of a task is not finite.
        """
        bad = (~scores.losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise Diverged(
                f"validation at outer step {self.progress.step}: the loss of {len(bad)} of {scores.tasks} tasks is not "
                f"finite, first that of task {bad[0]}; look at its data, then lower a rate, inner or outer{self.saved}"
            )
        at = self.progress
        better = scores.quality > at.best
        at.stale, at.validated = 0 if better else at.stale + 1, at.step
        if better:
            at.best, at.best_step = scores.quality, at.step
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.learner.state_dict().items()}
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(scores.loss.mean if self.scheduler.mode == "min" else scores.quality)
        ways = getattr(self.tasks, "ways", None)
        at.hopeless = at.hopeless + 1 if health.hopeless(scores, ways) else 0
        known = self.warned
        losses = health.inner_losses(self.learner, self.tasks, "validation", scores.tasks)
        self.warned = health.ailment(scores, ways, losses)
        if self.warned and not known and processes.rank() == 0:
            _log.warning("step %s, validation: %s", at.step, self.warned)
        judged = scores.accuracy or scores.loss
        accuracy = scores.accuracy and scores.accuracy.mean
        record = {"loss": scores.loss.mean, "accuracy": accuracy, "interval": judged.interval, "best": better}
        return record | ({"warning": self.warned} if self.warned else {})

    def save(self) -> None:
        """Write the checkpoint, and the best weights beside it, on rank 0 and where there is a folder."""
        # by the place in the whole batch, so that another number of processes can go on
        left = self.learner.carried.state_dict()
        named = self.learner.carry == "task"
        mine: list[Any] = (
            list(left.items()) if named else [(p, left[at]) for at, p in enumerate(self.mine) if at in left]
        )
        carried = dict(processes.gather(mine))
        if self.folder and processes.rank() == 0:
            if self.records:
                self.records.sync()
            states: dict[str, Any] = {
                "identity": self.identity,
                "free": self._free(),
                "progress": asdict(self.progress),
                "learner": self.learner.state_dict(),
                "best": self.best_weights or {},
                "best_notes": self._notes(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict() if self.scheduler else {},
                "carried": carried,
                "remembered": {name: each.state_dict() for name, each in self._remembers().items()},
            }
            save_newest(self.folder, states, self.keep)
            self.keep_best()
        self._remember()
        processes.wait()  # what comes next on the others may read it

    def _remember(self) -> None:
        if self.folder:
            self.saved = f" (the checkpoint of step {self.progress.step} is in {self.folder})"

    def _notes(self) -> dict[str, Any]:
        return {"step": self.progress.best_step, **shape_of(self.tasks)}

    def keep_best(self) -> None:
        """Write the best weights, where the file does not hold them."""
        assert self.folder
        if self.best_weights is not None and self.best_kept != self.progress.best_step:
            save_weights(self.folder / BEST, self.best_weights, self._notes())
            self.best_kept = self.progress.best_step

    def restore(self, resume: bool, before: int | None = None) -> list[str]:
        """Read the folder's newest checkpoint, if it has one; returns what is other than it was, and may be."""
        assert self.folder
        states = load_newest(self.folder, before)
        if states is None:
            return []
        if not resume:
            raise ValueError(f"{self.folder} already holds a run; resume it, or choose another folder")
        self._refuse_another(states["identity"])
        if before is None and states["progress"]["step"] > self.steps:
            raise ValueError(
                f"{self.folder} has done {states['progress']['step']} outer steps, more than {self.steps}: ask for more"
            )
        self.progress = Progress(**states["progress"])
        self.learner.load_state_dict(states["learner"])
        self.best_weights = states["best"] or None
        given = self._free()
        self.optimizer.load_state_dict(states["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(states["scheduler"])
        self._set_rates(states["free"]["outer rate"], given["outer rate"])
        left = states["carried"]
        if self.learner.carry != "task":
            left = {at: left[place] for at, place in enumerate(self.mine) if place in left}
        self.learner.carried.load_state_dict(left)
        for name, each in self._remembers().items():
            each.load_state_dict(states["remembered"][name])
        self._remember()
        was = states["free"]
        return [f"{name} {was[name]} -> {given[name]}" for name in given if was[name] != given[name]]

    def _refuse_another(self, was: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            same = value == was[name]
            if name == "data" and len(value) == len(was[name]):
                same = np.allclose(value, was[name], rtol=1e-4, atol=1e-6)
            if not same:
                values = "" if name in ("data", "model") else f", {was[name]}, not {value}"
                raise ValueError(
                    f"{self.folder} was trained with another {name}{values}; resume it with the same, or name a new one"
                )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change within a run, by name: it would have changed the steps already taken."""
        learner = self.learner
        shapes = {name: list(tensor.shape) for name, tensor in learner.state_dict().items()}
        choices = {name: getattr(learner, name, None) for name in ("adapts", "inner", "batch_norm", "carry")}
        choices["meta_gradient"] = self.own  # the learner has another one while it is annealed
        method = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in choices.items()}
        # a source that draws by losses gives other training tasks as it learns
        first = draw(self.tasks, learner, "validation" if hasattr(self.tasks, "seen") else "train", 0, 1)
        leaves = [leaf.double() for leaf in tensors(first) if leaf.numel()]
        return {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            "model": f"{getattr(learner, 'model', '')} {shapes}",
            **method,
            "seed": self.seed,
            "number of tasks a batch": self.tasks_per_batch,
            "data": [value for leaf in leaves for value in (leaf.mean().item(), leaf.square().mean().item())],
        }

    def _free(self) -> dict[str, Any]:
        """What may change within a run, and is recorded when it does."""
        groups = self.optimizer.param_groups
        rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
        return {"outer rate": rates, "clip": self.clip, "steps": self.steps}

    def _set_rates(self, was: list[float], given: list[float]) -> None:
        """Put other outer rates in place of those of the checkpoint, wherever the schedule has come to."""
        for place, (old, new) in enumerate(zip(was, given, strict=True)):
            if old == new:
                continue
            group = self.optimizer.param_groups[place]
            group["lr"] *= new / old
            if "initial_lr" in group:
                group["initial_lr"] = new
            if self.scheduler is not None and hasattr(self.scheduler, "base_lrs"):
                self.scheduler.base_lrs[place] = new
