"""The outer loop: validation, the best model kept, checkpoints, logs, several processes."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from innerloop.bilevel import Bilevel
from innerloop.compiled import proposal
from innerloop.errors import Diverged
from innerloop.learner import MetaLearner
from innerloop.meta_gradient import FirstOrder
from innerloop.problem import Task
from innerloop.training import health, processes
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint, save_weights, take_weights
from innerloop.training.evaluation import Source, draw, evaluate, shape_of
from innerloop.training.logs import JsonLines, Log, ProgressDisplay, Record, TensorBoard
from innerloop.training.record import settings_of
from innerloop.training.settings import SETTINGS

TRIED = 20  # outer steps after which compiling is thought of
_log = logging.getLogger("innerloop")
BEST, LAST, METRICS, TENSORBOARD = "best.safetensors", "last.safetensors", "metrics.jsonl", "tensorboard"


class Fitted(NamedTuple):
    """How training ended.

    Attributes:
        step: outer steps done, those of earlier sessions included.
        stopped: what ended it: ``"steps"``, ``"patience"`` or ``"minutes"``.
        best_step: the step whose weights the learner now has; None without validation, when it has the last ones.
        best: validation accuracy at that step, for regression minus the loss.
        seconds: time taken, earlier sessions included.
    """

    step: int
    stopped: str
    best_step: int | None
    best: float
    seconds: float


def fit(
    learner: Bilevel,
    tasks: Source,
    *,
    steps: int,
    tasks_per_batch: int = 16,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    clip: float | None = None,
    multi_step_loss: int | None = None,
    first_order: int | None = None,
    validate_every: int = 500,
    validation_tasks: int = 200,
    patience: int | None = None,
    minutes: float | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    log: Log | None = None,
) -> Fitted:
    """Meta-train a learner; afterwards it has the weights that were best in validation.

    Step s draws tasks ``s * tasks_per_batch`` to ``(s + 1) * tasks_per_batch - 1`` of the training stream and seeds
    torch with (seed, s), so a run that is killed and resumed ends in the same numbers, on the CPU bit for bit.

    Where ``torch.distributed`` is initialised, each process takes its share of every batch and gradients are
    averaged. Rank 0 alone writes; to resume, every rank must be able to read ``folder``. For mixed precision call
    this inside ``torch.autocast``.

    Args:
        learner: a `MetaLearner` or any `Bilevel`, trained in place, on the device and in the precision of its
            parameters. What it carries from batch to batch is in the checkpoint.
        tasks: where tasks come from: any object with ``batch(split, start, count)``, which gives a batch of tasks, a
            list of them, or the one asked for, and is a pure function of its arguments.
        steps: outer steps, those of earlier sessions included.
        tasks_per_batch: tasks in one outer step, over all processes.
        optimizer: any optimiser of torch over ``learner.parameters()``; by default Adam at 1e-3.
        scheduler: any schedule of torch over it, advanced once a step (``ReduceLROnPlateau``: once a validation).
        clip: largest norm of the whole meta-gradient; longer ones are shortened.
        multi_step_loss: anneal `multi_step_weights` over so many outer steps; None trains on the last inner step alone.
        first_order: outer steps that take the meta-gradient of `FirstOrder` before those of the learner's own, MAML++'s
            annealing of derivatives (arXiv 1810.09502); None takes the learner's own from the first on.
        validate_every: outer steps between validations, each followed by a checkpoint. The last step has one too.
        validation_tasks: tasks in a validation, always the same ones; 0 for none.
        patience: stop after so many validations in a row without a better one.
        minutes: stop, after a last validation, when training has taken this long, earlier sessions included. The
            scheduler and what is annealed run over this time or over the steps, whichever is used up sooner; where
            it is the time, only the log says at which rates a run was trained.
        folder: where ``metrics.jsonl``, ``tensorboard/``, ``best.safetensors`` and ``last.safetensors`` go, and, of a
            `MetaLearner`, ``settings.json``, with which the commands make it again (``innerloop evaluate FOLDER``).
        resume: continue from ``folder``; from the beginning if it holds no checkpoint yet.
        start_from: the folder of another run, whose best weights the learner begins with where they fit by name and
            shape; a head of another width stays as it is. A run that is resumed goes on from its own.
        seed: seeds what is random inside the model, such as dropout.
        progress: show a progress bar; where there is no terminal, a line now and then.
        log: also called with every record, see `innerloop.training.logs`.

    Raises:
        ValueError: a setting outside its range, an optimiser that holds none of the learner's parameters, a learner
            with ``carry="task"``, a source that gives another number of tasks than asked for, weights to start from
            that do not fit, a folder that not every process can read, or one that already holds a run while ``resume``
            is False.
        FileNotFoundError: ``start_from`` holds no weights.
        Diverged: loss or gradient not finite, with the task at fault and what is wrong in it; weights and the last
            checkpoint stay as they were. Or three validations in a row at chance, with a loss ten times that of
            guessing: nothing is learned there any more. What is wrong sooner is a warning in the log.
        KeyboardInterrupt: Ctrl-C or a termination signal, after the step at hand, once the checkpoint is written.

    Example:
        >>> tasks = il.tasks.glyphs(ways=5, shots=1, queries=5)
        >>> learner = il.MetaLearner(il.models.Conv4(in_channels=1), adapts=il.Head(), inner=il.SGD(lr=0.1, steps=5))
        >>> il.fit(learner, tasks, steps=1000, tasks_per_batch=4, folder="run")
    """
    _check_positive(
        steps=steps, tasks_per_batch=tasks_per_batch, clip=clip, multi_step_loss=multi_step_loss, patience=patience,
        first_order=first_order, validate_every=validate_every, minutes=minutes,
    )  # fmt: skip
    processes.check_batch(tasks_per_batch)
    optimizer = optimizer or torch.optim.Adam(learner.parameters(), lr=1e-3)
    mine = {id(parameter) for parameter in learner.parameters()}
    if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} given holds none of the learner's parameters, so that training would "
            "change nothing: make it over learner.parameters() (a learner trains a copy of the model that it was given)"
        )
    if learner.carry == "task":
        raise ValueError(
            "carry='task' resumes tasks that come again, and those of a training stream never do: choose 'slot' or "
            "'none', or call meta_step with task_ids in a training loop of your own"
        )
    if first_order:
        learner.accepts(FirstOrder())
        if not learner.meta_gradient.learn_start:
            raise ValueError(
                "first_order learns the start of the inner loop, and learn_start=False does not: leave one out"
            )
    run = _Run(learner, optimizer, scheduler, None if folder is None else Path(folder))
    if run.folder and resume:
        run.restore()
    elif run.folder and (run.folder / LAST).exists():
        raise ValueError(f"{folder} already holds a run; resume it, or choose another folder")
    if len(found := set(processes.gather([run.progress.step]))) > 1:
        raise ValueError(
            f"the processes found checkpoints of steps {sorted(found)} in {folder}: give a folder that all of them read"
        )
    if start_from is not None and not run.progress.step:
        fresh = take_weights(learner, Path(start_from) / BEST)
        logging.getLogger("innerloop").info("starts from %s; left as they are: %s", start_from, fresh or "none")
    processes.broadcast(learner)
    tasks = learner.meta_gradient.trains_on(tasks)

    at = run.progress
    began = time.monotonic() - at.seconds
    limit = math.inf if minutes is None else 60 * minutes
    share = tasks_per_batch // processes.world()
    late, warned = at.seconds >= limit, False
    taken: list[float] = []
    with ExitStack() as stack, _deferred_interrupts() as interrupted:
        own = learner.meta_gradient
        stack.callback(setattr, learner, "meta_gradient", own)
        logs: list[Log] = [log] if log else []
        if processes.rank() == 0 and run.folder:
            run.folder.mkdir(parents=True, exist_ok=True)
            logs.append(stack.enter_context(closing(JsonLines(run.folder / METRICS, at.step))))
            logs.append(stack.enter_context(closing(TensorBoard(run.folder / TENSORBOARD, at.step))))
        if processes.rank() == 0 and progress:
            logs.append(stack.enter_context(closing(ProgressDisplay(steps, at.step, limit - at.seconds))))

        def tell(kind: str, record: Record) -> None:
            at.seconds = time.monotonic() - began
            for each in logs:
                each({"kind": kind, "step": at.step, "seconds": round(at.seconds, 3), **record})

        if processes.rank() == 0 and run.folder and not (run.folder / SETTINGS).exists():
            _record(run, tasks, steps=steps, tasks_per_batch=tasks_per_batch)
        while at.step < steps and not late and (patience is None or at.stale < patience):
            torch.manual_seed(int(np.random.SeedSequence((seed, at.step, processes.rank())).generate_state(1)[0]))
            place = at.step + at.ahead
            learner.meta_gradient = FirstOrder() if place < (first_order or 0) else own
            batch = draw(tasks, learner, "train", at.step * tasks_per_batch + processes.rank() * share, share)
            weights = multi_step_weights(learner.inner.steps, place, multi_step_loss) if multi_step_loss else None
            # The processes must stop at the same step: what one of them sees is averaged along with the gradients.
            flags = [float(interrupted()), (time.monotonic() - began) / limit]
            before = time.monotonic()
            record, (stop, used) = run.step(batch, weights, clip, flags)
            run.anneal(max(int(min(used, 1.0) * steps) - at.step, 0))
            taken.append(time.monotonic() - before)
            if len(taken) == TRIED and processes.rank() == 0:
                _propose(learner, min(taken), steps - at.step)
            if not warned and record.get("negative_curvature"):
                warned = True
                _warn_of_curvature(learner, at.step, record["negative_curvature"])
            if not warned and record.get("reach", 0) > 1:
                warned = True
                warnings.warn(
                    f"outer step {at.step}: lr * |H| of the inner problem is {record['reach']:.3g} or more, and above "
                    f"1 a low order of {type(learner.meta_gradient).__name__} can be worse than first order; lower the "
                    "inner rate, or use Unrolled(), which takes no more curvature products. The log has it as reach",
                    stacklevel=2,
                )
            late = used >= 1
            tell("train", record)
            due = at.step % validate_every == 0 or at.step == steps or late
            if due and validation_tasks:
                tell("validation", run.validate(tasks, validation_tasks))
            if due or stop:
                run.save()
            if stop:
                raise KeyboardInterrupt
            if due and at.hopeless >= health.PATIENCE:
                raise Diverged(
                    f"stopped at step {at.step}, after {at.hopeless} hopeless validations: {run.warned}"
                    f"{run.saved and f' ({run.saved})'}"
                )
        if interrupted():
            raise KeyboardInterrupt

    if run.best_weights is not None:
        learner.load_state_dict(run.best_weights)
    stopped = "steps" if at.step >= steps else "minutes" if late else "patience"
    return Fitted(at.step, stopped, at.best_step, at.best, at.seconds)


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
class _Progress:
    """What a checkpoint keeps of the loop itself.

    ``stale`` counts the validations since the best one, ``hopeless`` those in a row of which `health.hopeless` says so,
    and ``ahead`` the steps by which the schedule is ahead of the run, where time runs faster.
    """

    step: int = 0
    best_step: int | None = None
    best: float = -math.inf
    stale: int = 0
    hopeless: int = 0
    ahead: int = 0
    seconds: float = 0.0


@dataclass
class _Run:
    """A learner in training, with all that a checkpoint holds."""

    learner: Bilevel
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    folder: Path | None
    progress: _Progress = field(default_factory=_Progress)
    best_weights: dict[str, Tensor] | None = None
    saved: str = ""
    warned: str = ""

    def step(
        self, batch: Task | Sequence[Task], weights: list[float] | None, clip: float | None, flags: list[float]
    ) -> tuple[Record, list[float]]:
        """One outer step; returns its record and the flags, each averaged over the processes."""
        like = next(self.learner.parameters())
        self.optimizer.zero_grad()
        metrics = self.learner.meta_step(batch, step_weights=weights)
        numbers = {"loss": metrics.loss, "accuracy": metrics.accuracy, **metrics.diagnostics}
        values = {
            name: value.detach().to(like).mean()
            for name, value in numbers.items()
            if value is not None and value.numel()
        }
        gradients = [parameter.grad for parameter in self.learner.parameters() if parameter.grad is not None]
        shared = torch.stack([*values.values(), *like.new_tensor(flags)])
        processes.average([*gradients, shared])

        norm = torch.nn.utils.get_total_norm(gradients)
        *means, size = torch.cat([shared, norm.view(1).to(shared)]).tolist()
        record: Record = dict(
            zip(values, means, strict=False), gradient_norm=size, lr=float(self.optimizer.param_groups[0]["lr"])
        )
        if not (math.isfinite(record["loss"]) and math.isfinite(size)):
            raise Diverged(
                f"outer step {self.progress.step + 1}: loss {record['loss']:.4g}, norm of its gradient {size:.4g}"
                f"{self._cause(batch, len(metrics.losses), weights)}; "
                f"lower the inner rate, then the outer one, or clip the gradient{self.saved and f' ({self.saved})'}"
            )
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.learner.parameters(), clip, norm)
        self.optimizer.step()
        self.progress.step += 1
        return record, means[len(values) :]

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

    def _cause(self, batch: Task | Sequence[Task], share: int, weights: list[float] | None) -> str:
        """What `Bilevel.diagnose` finds, on the first process that finds something."""
        self.optimizer.zero_grad()
        mine = self.learner.diagnose(batch, weights)
        tasks = share * processes.world()
        for rank, reason in enumerate(processes.gather([mine])):
            if reason is not None:
                first = self.progress.step * tasks + rank * share
                whose = f" of process {rank}" if processes.world() > 1 else ""
                return f"; {reason} (the batch{whose} is tasks {first} to {first + share - 1} of the training stream)"
        return ""

    def validate(self, tasks: Source, count: int) -> Record:
        """Score the learner on the validation split, keep its weights if they are the best yet, and return a record."""
        if buffers := [buffer for buffer in self.learner.buffers() if buffer.is_floating_point()]:
            processes.average(buffers)  # running statistics are each process's own
        scores = evaluate(self.learner, tasks, "validation", count)
        better = scores.quality > self.progress.best
        self.progress.stale = 0 if better else self.progress.stale + 1
        if better:
            self.progress.best, self.progress.best_step = scores.quality, self.progress.step
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.learner.state_dict().items()}
            if self.folder and processes.rank() == 0:
                notes = {"step": self.progress.step, **shape_of(tasks)}
                save_weights(self.folder / BEST, self.best_weights, notes)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(scores.loss.mean if self.scheduler.mode == "min" else scores.quality)
        ways = getattr(tasks, "ways", None)
        self.progress.hopeless = self.progress.hopeless + 1 if health.hopeless(scores, ways) else 0
        known = self.warned
        self.warned = health.ailment(scores, ways, health.inner_losses(self.learner, tasks, "validation", count))
        if self.warned and not known and processes.rank() == 0:
            _log.warning("step %s, validation: %s", self.progress.step, self.warned)
        judged = scores.accuracy or scores.loss
        accuracy = scores.accuracy and scores.accuracy.mean
        record = {"loss": scores.loss.mean, "accuracy": accuracy, "interval": judged.interval, "best": better}
        return record | ({"warning": self.warned} if self.warned else {})

    def save(self) -> None:
        """Write the checkpoint, on rank 0 and where there is a folder."""
        if self.folder:
            self.saved = f"the checkpoint of step {self.progress.step} is in {self.folder}"
        carried = processes.gather([self.learner.carried.state_dict()])
        if self.folder and processes.rank() == 0:
            save_checkpoint(
                self.folder / LAST,
                {
                    "kinds": self._kinds(),
                    "progress": asdict(self.progress),
                    "learner": self.learner.state_dict(),
                    "best": self.best_weights or {},
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict() if self.scheduler else {},
                    "carried": dict(enumerate(carried)),
                },
            )
        processes.wait()  # what comes next on the others may read it

    def restore(self) -> None:
        """Read the folder's checkpoint, if it has one."""
        assert self.folder
        if not (self.folder / LAST).exists():
            return
        states = load_checkpoint(self.folder / LAST)
        if states["kinds"] != self._kinds():
            raise ValueError(
                f"{self.folder} was trained with {states['kinds']}, not {self._kinds()}; resume it with the same ones"
            )
        self.progress = _Progress(**states["progress"])
        self.learner.load_state_dict(states["learner"])
        self.best_weights = states["best"] or None
        self.optimizer.load_state_dict(states["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(states["scheduler"])
        carried = states.get("carried", {})
        if any(carried.values()) and len(carried) != processes.world():
            raise ValueError(
                f"{self.folder} holds where {len(carried)} processes left their tasks, not {processes.world()}; "
                "resume it with as many"
            )
        self.learner.carried.load_state_dict(carried.get(processes.rank(), {}))

    def _kinds(self) -> dict[str, str]:
        return {"optimizer": type(self.optimizer).__name__, "scheduler": type(self.scheduler).__name__}


@contextmanager
def _deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and termination set a flag, which the yielded function reads; a second one interrupts.

    So no parameter update and no file is cut in half. Only the main thread can do this; elsewhere signals stay as
    they are.
    """
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    here = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _warn_of_curvature(learner: Bilevel, step: int, share: float) -> None:
    cure = "proximal" if learner.inner.proximal else "weight_decay"
    name = type(learner.meta_gradient).__name__
    warnings.warn(
        f"outer step {step}: in {share:.0%} of the tasks the linear solve of {name} met a direction in which the inner "
        f"problem does not curve upwards, and stopped there; give a larger {cure}, or more inner steps. Later steps "
        "are counted as negative_curvature in the log",
        stacklevel=3,
    )


def _propose(learner: Bilevel, seconds: float, remaining: int) -> None:
    """Log that compiling would pay, where kernels are small and many steps are left."""
    if learner.compiler is not None or learner.engine is not None or learner.way is None or not learner.way.small:
        return
    moving = len(learner.adapted) or len(list(learner.parameters()))
    if text := proposal(seconds, learner.inner.steps * moving, remaining):
        _log.info("%s", text)


def _record(run: _Run, tasks: Source, **outer: int) -> None:
    """Write the settings of a learner that was made in Python, for the commands to make it again."""
    assert run.folder
    if isinstance(run.learner, MetaLearner):
        settings_of(run.learner, tasks, shape_of(tasks), **outer).save(run.folder / SETTINGS)


def _check_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
