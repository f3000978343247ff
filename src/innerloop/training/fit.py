"""The outer loop: validation, the best model kept, checkpoints, logs, several processes, batches that go wrong."""

from __future__ import annotations

import logging
import math
import time
import warnings
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from innerloop.bilevel import Bilevel
from innerloop.compiled import proposal
from innerloop.errors import Diverged, Stopped
from innerloop.learner import MetaLearner
from innerloop.meta_gradient import FirstOrder
from innerloop.training import health, processes
from innerloop.training.checkpoints import take_weights
from innerloop.training.choices import interval, most_skips
from innerloop.training.evaluation import Source, evaluate, shape_of
from innerloop.training.logs import Log, ProgressDisplay, TensorBoard
from innerloop.training.record import settings_of
from innerloop.training.session import Session
from innerloop.training.settings import SETTINGS
from innerloop.training.signals import heeded
from innerloop.training.store import BEST, METRICS, TENSORBOARD, JsonLines, Record, locked
from innerloop.training.weighting import Weights

TRIED = 20  # outer steps after which compiling is thought of
ALARMS = {
    "negative_curvature": (
        0.0,
        "in {:.0%} of the tasks the linear solve met a direction in which the inner problem does not curve upwards, "
        "and stopped there: give a larger weight_decay or proximal, or more inner steps",
    ),
    "reach": (
        1.0,
        "lr * |H| of the inner problem is {:.3g} or more, where a low order can be worse than first order: lower the "
        "inner rate, or use Unrolled(), which takes no more curvature products",
    ),
}
"""Diagnostics of a step: what one of them means, in words, where it is above a number."""

_log = logging.getLogger("innerloop")


class Fitted(NamedTuple):
    """How training ended.

    Attributes:
        step: outer steps done, those of earlier sessions included.
        stopped: what ended it: ``"steps"``, ``"patience"`` or ``"minutes"``.
        best_step: the step whose weights the learner now has; None without validation, when it has the last ones.
        best: validation accuracy at that step, for regression minus the loss.
        seconds: time taken, earlier sessions included.
        skipped: batches that were left out because their loss or gradient was not finite.
    """

    step: int
    stopped: str
    best_step: int | None
    best: float
    seconds: float
    skipped: int = 0


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
    task_weights: Weights | None = None,
    validate_every: int = 500,
    validation_tasks: int = 200,
    patience: int | None = None,
    minutes: float | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
    checkpoint_every: int | str = "10m",
    keep: int = 2,
    on_nonfinite: str = "stop",
    seed: int = 0,
    progress: bool = True,
    log: Log | None = None,
) -> Fitted:
    """Meta-train a learner; afterwards it has the weights that were best in validation.

    Step s draws tasks ``s * tasks_per_batch`` to ``(s + 1) * tasks_per_batch - 1`` of the training stream and seeds
    torch with (seed, s), so a run that is killed and resumed ends in the same numbers, on the CPU bit for bit.

    A process that is killed loses the steps since its last checkpoint, and a resumed run takes them again. One process
    at a time has the folder. Its newest checkpoints are kept, with checksums: a damaged one is warned of, and the one
    before it used. A log that fails is dropped with a warning.

    Where ``torch.distributed`` is initialised, each process takes its share of every batch and gradients are
    averaged. Rank 0 alone writes; to resume, every rank must be able to read ``folder``. For mixed precision call
    this inside ``torch.autocast``.

    Args:
        learner: a `MetaLearner` or any `Bilevel`, trained in place, on the device and in the precision of its
            parameters. What it carries from batch to batch is in the checkpoint.
        tasks: where tasks come from: any object with ``batch(split, start, count)``, which gives a batch of tasks, a
            list of them, or the one asked for, and is a pure function of its arguments. One whose tasks recur names
            them by ``ids(split, start, count)``, which ``carry="task"`` needs. One that draws by losses
            (`Prioritised`) has ``seen(ids, losses)``, ``state_dict`` and ``load_state_dict`` as well.
        steps: outer steps, those of earlier sessions included.
        tasks_per_batch: tasks in one outer step, over all processes.
        optimizer: any optimiser of torch over ``learner.parameters()``; by default Adam at 1e-3.
        scheduler: any schedule of torch over it, advanced once a step (``ReduceLROnPlateau``: once a validation).
        clip: largest norm of the whole meta-gradient; longer ones are shortened.
        multi_step_loss: anneal `multi_step_weights` over so many outer steps; None trains on the last inner step alone.
        first_order: outer steps that take the meta-gradient of `FirstOrder` before those of the learner's own, MAML++'s
            annealing of derivatives (arXiv 1810.09502); None takes the learner's own from the first on.
        task_weights: ``weights(losses, ids, step)``, how much each task of a batch counts by its loss after adaptation,
            which takes one more pass through the inner loop; see `innerloop.training.weighting`. None counts all alike.
        validate_every: outer steps between validations, each followed by a checkpoint. The last step has one too.
        validation_tasks: tasks in a validation, always the same ones; 0 for none.
        patience: stop after so many validations in a row without a better one.
        minutes: stop, after a last validation, when training has taken this long, earlier sessions included. The
            scheduler and what is annealed run over this time or over the steps, whichever is used up sooner; where
            it is the time, only the log says at which rates a run was trained.
        folder: where ``metrics.jsonl``, ``tensorboard/``, ``best.safetensors`` and ``last.safetensors`` go, and, of a
            `MetaLearner`, ``settings.json``, with which the commands make it again (``innerloop evaluate FOLDER``).
        resume: continue from ``folder``; from the beginning if it holds no run yet. Method, model, data and seed must
            be those of the checkpoint; another outer rate, clipping or length is recorded as ``"changed"``.
        start_from: the folder of another run, whose best weights the learner begins with where they fit by name and
            shape; a head of another width stays as it is. A run that is resumed goes on from its own.
        checkpoint_every: steps, or time such as ``"90s"`` or ``"10m"``, after which a checkpoint is written between
            validations too.
        keep: how many of the newest checkpoints are kept.
        on_nonfinite: ``"stop"`` at a loss or gradient that is not finite, or ``"skip"`` the batch: it is recorded, and
            training stops after ten in a row (``"skip:3"``: three).
        seed: seeds what is random inside the model, such as dropout.
        progress: show a progress bar; where there is no terminal, a line now and then.
        log: also called with every record, see `innerloop.training.logs`.

    Raises:
        ValueError: a setting outside its range, an optimiser that holds none of the learner's parameters, a learner
            with ``carry="task"`` and tasks that do not recur, a source that gives another number of tasks than asked
            for, weights to start from that do not fit, a folder that not every process can read, that another process
            has, that already holds a run while ``resume`` is False, or whose run is of another method, model, data or
            seed.
        FileNotFoundError: ``start_from`` holds no weights.
        Diverged: loss or gradient not finite, with the task at fault and what is wrong in it; weights and the last
            checkpoint stay as they were. Also where a validation is not finite. Or three validations in a row at
            chance, with a loss ten times that of guessing: nothing is learned there any more. What is wrong sooner is
            a warning in the log.
        OSError: a checkpoint cannot be written; the one before is still there.
        Stopped: a `KeyboardInterrupt`: Ctrl-C, SIGTERM or SIGHUP, after the step at hand, once the checkpoint is
            written. SIGUSR1 and SIGUSR2 write a checkpoint, and training goes on.

    Example:
        >>> tasks = il.tasks.glyphs(ways=5, shots=1, queries=5)
        >>> learner = il.MetaLearner(il.models.Conv4(in_channels=1), adapts=il.Head(), inner=il.SGD(lr=0.1, steps=5))
        >>> il.fit(learner, tasks, steps=1000, tasks_per_batch=4, folder="run")
    """
    _check_positive(
        steps=steps, tasks_per_batch=tasks_per_batch, clip=clip, multi_step_loss=multi_step_loss, patience=patience,
        first_order=first_order, validate_every=validate_every, minutes=minutes, keep=keep,
    )  # fmt: skip
    every_steps, every_seconds = interval(str(checkpoint_every))
    skips = most_skips(on_nonfinite)
    processes.check_batch(tasks_per_batch)
    optimizer = optimizer or torch.optim.Adam(learner.parameters(), lr=1e-3)
    mine = {id(parameter) for parameter in learner.parameters()}
    if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} given holds none of the learner's parameters, which are a copy of the "
            "model's: make it over learner.parameters()"
        )
    if learner.carry == "task" and not hasattr(tasks, "ids"):
        raise ValueError(
            "carry='task' needs tasks that come again: take il.tasks.Recurring(tasks, 100), or carry='slot'"
        )
    if learner.carry == "task" and processes.world() > 1 and (count := getattr(tasks, "count", 0)) % tasks_per_batch:
        raise ValueError(
            f"{count} tasks recur in batches of {tasks_per_batch}: with processes let a multiple of the batch recur"
        )
    if first_order:
        learner.accepts(FirstOrder())
        if not learner.meta_gradient.learn_start:
            raise ValueError("first_order learns the start, and learn_start=False does not: leave one out")
    tasks = learner.meta_gradient.trains_on(tasks)
    run = Session(
        learner=learner, tasks=tasks, optimizer=optimizer, scheduler=scheduler, steps=steps,
        folder=None if folder is None else Path(folder), tasks_per_batch=tasks_per_batch, clip=clip,
        multi_step_loss=multi_step_loss, first_order=first_order, seed=seed, keep=keep, skips=skips,
        task_weights=task_weights,
    )  # fmt: skip
    limit = math.inf if minutes is None else 60 * minutes
    warned = False
    taken: list[float] = []
    with ExitStack() as stack, heeded(at_once=False) as signals:
        stack.callback(setattr, learner, "meta_gradient", run.own)
        writes = processes.rank() == 0
        if run.folder and writes:
            run.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run.folder))
        changes = run.restore(resume) if run.folder else []
        if len(found := set(processes.gather([run.progress.step]))) > 1:
            raise ValueError(
                f"the processes found checkpoints of steps {sorted(found)}: give a folder that all of them read"
            )
        if start_from is not None and not run.saved:
            fresh = take_weights(learner, Path(start_from) / BEST)
            _log.info("starts from %s; left as they are: %s", start_from, fresh or "none")
        processes.broadcast(learner)
        at = run.progress
        began = time.monotonic() - at.seconds
        late, saved_at = at.seconds >= limit, time.monotonic()
        logs: list[Log] = [log] if log else []
        if run.folder and writes:
            run.keep_best()
            run.records = stack.enter_context(closing(JsonLines(run.folder / METRICS, at.step - 1)))
            board = stack.enter_context(closing(TensorBoard(run.folder / TENSORBOARD, at.step - 1)))
            _tell([run.records, board], list(at.records))
            logs += [run.records, board]
            if isinstance(learner, MetaLearner) and not (run.folder / SETTINGS).exists():
                made = settings_of(learner, tasks, shape_of(tasks), steps=steps, tasks_per_batch=tasks_per_batch)
                made.save(run.folder / SETTINGS)  # for the commands to make it again
        if writes and progress:
            logs.append(stack.enter_context(closing(ProgressDisplay(steps, at.step, limit - at.seconds))))
        untold: list[Record] = []

        def note(kind: str, record: Record) -> None:
            at.seconds = time.monotonic() - began
            untold.append({"kind": kind, "step": at.step, "seconds": round(at.seconds, 3), **record})
            at.records.append(untold[-1])

        for what in changes:
            note("changed", {"what": what})
        stop, save = 0, not run.saved  # a run begins with a checkpoint: one that has none has lost it
        while True:
            ends = at.step > 0 and (at.step % validate_every == 0 or at.step >= steps or late)
            judged = ends and bool(validation_tasks) and at.validated < at.step and not stop
            if judged:
                if buffers := [buffer for buffer in learner.buffers() if buffer.is_floating_point()]:
                    # running statistics are each process's own
                    processes.average(buffers, len(run.mine) / tasks_per_batch)
                try:
                    with signals.stopping_at_once() if processes.world() == 1 else nullcontext():
                        scores = evaluate(learner, tasks, "validation", validation_tasks)
                    note("validation", run.judge(scores))
                except Stopped as stopped:  # it is taken again when the run is resumed
                    stop = stopped.number
            if save or judged or stop:
                run.save()
                saved_at = time.monotonic()
            _tell(logs, untold)
            if stop:
                raise Stopped(stop)
            if judged and at.hopeless >= health.PATIENCE:
                raise Diverged(
                    f"stopped at step {at.step}, after {at.hopeless} hopeless validations: {run.warned}{run.saved}"
                )
            if at.step >= steps or late or (patience is not None and at.stale >= patience):
                break
            # The processes must stop at the same step: what one of them sees is averaged along with the gradients.
            now = time.monotonic()
            asked = [signals.stop, (now - began) / limit, signals.save, now - saved_at >= every_seconds]
            signals.save = False
            at.records.clear()
            kind, record, (stop_seen, used, *save_seen) = run.step([float(each) for each in asked])
            run.anneal(max(int(min(used, 1.0) * steps) - at.step, 0))
            taken.append(time.monotonic() - now)
            if len(taken) == TRIED and writes:
                _propose(learner, min(taken), steps - at.step)
            for name, (most, words) in ALARMS.items():
                if not warned and record.get(name, 0.0) > most:
                    warned = True
                    told = f"outer step {at.step}: {words.format(record[name])}; the log has it as {name}"
                    warnings.warn(told, stacklevel=2)
            note(kind, record)
            stop, late = (signals.stop or 2) if stop_seen > 0 else 0, used >= 1
            ends = at.step % validate_every == 0 or at.step >= steps or late
            save = ends or any(seen > 0 for seen in save_seen) or at.step % every_steps == 0
        if signals.stop:
            raise Stopped(signals.stop)

    if run.best_weights is not None:
        learner.load_state_dict(run.best_weights)
    ended = "steps" if at.step >= steps else "minutes" if late else "patience"
    return Fitted(at.step, ended, at.best_step, at.best, at.seconds, at.skipped)


def replay(
    learner: Bilevel,
    tasks: Source,
    step: int,
    *,
    folder: str | Path,
    tasks_per_batch: int = 16,
    seed: int = 0,
    **outer: Any,
) -> str:
    """Compute one outer step of a run again, from the checkpoint before it, and say what is in it; nothing is written.

    The steps between the checkpoint and this one are taken again, so that the weights are those that it met.

    Args:
        learner: as it was at the start of the run.
        tasks: of the run.
        step: counted from 1, as in the log.
        folder: of the run.
        tasks_per_batch: of the run.
        seed: of the run.
        **outer: its optimizer, scheduler and so on, as in `fit`; ``optimizer`` is needed.

    Raises:
        ValueError: the folder's checkpoints are all of later steps, or of another run.
    """
    run = Session(
        learner=learner, tasks=learner.meta_gradient.trains_on(tasks), folder=Path(folder), steps=step, skips=step,
        tasks_per_batch=tasks_per_batch, seed=seed, **outer,
    )  # fmt: skip
    run.restore(True, before=step)
    began = run.progress.step
    if step <= began:
        raise ValueError(f"{folder} keeps no checkpoint from before step {step}: the oldest is of step {began}")
    while run.progress.step < step:
        _, record, _ = run.step([])
        run.anneal(run.progress.ahead)
    first = (step - 1) * tasks_per_batch
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float))
    return (
        f"outer step {step}: tasks {first} to {first + tasks_per_batch - 1} of the training stream, seed ({seed}, "
        f"{step - 1}), weights from the checkpoint of step {began} and {step - 1 - began} steps taken again\n"
        f"diagnosis: {record.get('why') or f'every number is finite: {numbers}'}"
    )


def _tell(logs: list[Log], records: list[Record]) -> None:
    """Give logs their records, which are then told; a log that fails is dropped with a warning."""
    for record in records:
        for log in list(logs):
            try:
                log(record)
            except Exception as error:
                logs.remove(log)
                name = getattr(log, "__name__", type(log).__name__)
                warnings.warn(f"the log {name} failed and gets no more records: {error}", stacklevel=3)
    records.clear()


def _propose(learner: Bilevel, seconds: float, remaining: int) -> None:
    """Log that compiling would pay, where kernels are small and many steps are left."""
    if learner.compiler is not None or learner.engine is not None or learner.way is None or not learner.way.small:
        return
    moving = len(learner.adapted) or len(list(learner.parameters()))
    if text := proposal(seconds, learner.inner.steps * moving, remaining):
        _log.info("%s", text)


def _check_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
