"""Lambda patterns: the fastest adaptation of a trained learner within a quality budget (Khabarlak, arXiv 2206.05930).

Every pattern of blocks is judged on the same validation tasks and timed. The fastest is chosen of those whose accuracy
is at most a tolerance below that of full adaptation, with the whole 95 % interval of the difference. Test tasks confirm
it. With F_l multiply-adds in the forward pass of block l, and as many again for each of its two backward products, a
step with lowest moving block m costs

    cost = sum_l F_l  +  sum_{l: moves} F_l  +  sum_{l > m} F_l

and K steps cost K * cost, or P + K * (cost - P) where what lies below block m, P = sum_{l < m} F_l, is computed once.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from innerloop.adapts import Blocks
from innerloop.adapts._blocks import blocks_for
from innerloop.blocks import leading, parameter_names
from innerloop.learner import MetaLearner
from innerloop.meta_gradient import FirstOrder
from innerloop.reporting import (
    Cell,
    Gallery,
    Heading,
    Picture,
    Table,
    Timing,
    digits,
    how_made,
    in_turns,
    markdown,
    percent,
    plain,
    points,
    provenance,
    write,
)
from innerloop.reporting.figures import BLUE, DOTS, DOTTED, GREY, ORANGE, Line, Panel, frontier, panels, save
from innerloop.tasks import TaskSource
from innerloop.training.evaluation import Estimate, evaluate, key_of
from innerloop.training.runs import save_results
from innerloop.training.store import resumable

EXHAUSTIVE = 8  # blocks up to which all patterns are tried
SUPPORTS = 32  # support sets that timed adaptations go through
WARM_UP = 10  # adaptations before the clock starts
CHOICE, RESULTS, PAGE, PICTURE = "pattern.json", "patterns.json", "patterns.md", "patterns.png"


class Row(NamedTuple):
    """A pattern at a number of steps.

    Attributes:
        pattern: 0 or 1 a block; all 0 is no adaptation.
        weights: how many numbers move.
        accuracy: on the validation tasks, between 0 and 1.
        difference: accuracy minus that of full adaptation, task by task.
        cost: predicted multiply-adds of an adaptation for one support example, everything computed in every step.
        cost_reusing: the same with what lies below the lowest moving block computed once.
        time: measured, everything computed in every step.
        time_reusing: measured, with what lies below computed once.
    """

    pattern: str
    weights: int
    accuracy: Estimate
    difference: Estimate
    cost: int
    cost_reusing: int
    time: Timing
    time_reusing: Timing


class Confirmation(NamedTuple):
    """Accuracy on the test tasks: of full adaptation, of the chosen pattern, and their difference task by task."""

    full: Estimate
    chosen: Estimate
    difference: Estimate


class Section(NamedTuple):
    """All patterns at one number of steps.

    Attributes:
        steps: adaptation steps.
        rows: the first is full adaptation, the last none at all.
        chosen: the row that was chosen.
        test: what became of the choice on test tasks.
    """

    steps: int
    rows: list[Row]
    chosen: Row
    test: Confirmation


def patterns_for(movable: Sequence[bool]) -> list[str]:
    """The patterns to try, from full adaptation to none.

    Args:
        movable: for each block whether it can move. Up to 8 blocks all patterns are tried; of deeper models the
            suffixes and the single blocks, since cost is set by the lowest moving block.
    """
    blocks = len(movable)
    if blocks <= EXHAUSTIVE:
        rows = ["".join(bits) for bits in itertools.product("10", repeat=blocks)]
    else:
        rows = ["0" * place + "1" * (blocks - place) for place in range(blocks + 1)]
        rows += ["0" * place + "1" + "0" * (blocks - place - 1) for place in range(blocks)]
    masked = {"".join(bit if free else "0" for bit, free in zip(row, movable, strict=True)) for row in rows}
    return sorted(masked, key=lambda row: (-row.count("1"), row))


def movable_blocks(learner: MetaLearner, parts: Sequence[str] = ()) -> list[bool]:
    """For each block of the learner's model whether it can move.

    A block cannot where all of it is frozen, nor where a learned rate is missing: rates exist only for what moved in
    training.

    Args:
        learner: any.
        parts: names of the model's blocks, where it does not declare them; see `innerloop.Blocks`.

    Raises:
        ValueError: the model names no blocks, its head is read off the support set, or fewer than two blocks can move,
            so that there is nothing to choose.
    """
    if learner.few_shot.start is not None:
        raise ValueError(
            f"with start={learner.few_shot.start!r} the head is made anew for every task, and a pattern that leaves it "
            "alone has none: train with start none"
        )
    blocks = blocks_for(learner.model, parts)
    trainable = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    names = [trainable.intersection(parameter_names(learner.model, block)) for block in blocks]
    movable = [bool(each) and (not learner.rates or each <= set(learner.adapted)) for each in names]
    if sum(movable) < 2:
        why = (
            f"rates were learned for {learner.adapts!r} alone: train with adapts everything, or with rates that are "
            "not learned (inner sgd)"
            if learner.rates
            else "all else is frozen, or the model has no other: build it of more blocks"
        )
        raise ValueError(f"there is no pattern to choose, for {sum(movable)} of {len(blocks)} blocks can move; {why}")
    return movable


def with_pattern(learner: MetaLearner, blocks: Blocks, reuse_prefix: bool = True) -> MetaLearner:
    """A trained learner, in evaluation mode, in which only the blocks of a pattern move; it shares all weights.

    Args:
        learner: trained, its model a chain of blocks.
        blocks: which of them move.
        reuse_prefix: compute what lies below the lowest moving block once, not in every step.

    Raises:
        ValueError: the pattern does not fit the model, or lets something move for which no rate was learned.
    """
    found = MetaLearner(
        learner.model,
        adapts=blocks,
        inner=replace(learner.inner, moves=()),
        # never trained, so the cheapest that takes the solver
        meta_gradient=FirstOrder() if learner.inner.differentiable else learner.meta_gradient,
        loss=learner.loss,
        batch_norm=learner.batch_norm,
        start=learner.few_shot.start,
        chunk_size=learner.chunk_size,
        reuse_prefix=reuse_prefix,
    )
    if lacking := [name for name in found.rates if name not in learner.rates]:
        raise ValueError(
            f"{blocks!r} moves {lacking[0].replace('/', '.')}, for which training has learned no rate: choose a "
            "pattern within what moved in training, or train with rates that are not learned"
        )
    trained = dict(learner.named_parameters())
    for name, parameter in found.named_parameters():
        parameter.data = trained[name].data
    return found.eval()


def multiply_adds(model: nn.Module, inputs: Tensor, parts: Sequence[str] = ()) -> list[int]:
    """Multiply-adds of each block in one forward pass, for one example.

    Args:
        model: a chain of blocks.
        inputs: some examples, on the model's device.
        parts: names of its blocks, where it does not declare them.
    """
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    blocks = blocks_for(model, parts)
    return [sum(counts.get(names[part], 0) for part in block) // (2 * len(inputs)) for block in blocks]


def predicted_cost(forward: Sequence[int], pattern: str, steps: int, reuse_prefix: bool) -> int:
    """Multiply-adds of an adaptation for one support example, by the formula above; 0 where nothing moves.

    Args:
        forward: multiply-adds of each block's forward pass.
        pattern: 0 or 1 a block.
        steps: adaptation steps.
        reuse_prefix: what lies below the lowest moving block is computed once.
    """
    if "1" not in pattern:
        return 0
    lowest = pattern.index("1")
    step = sum(forward) + sum(cost for cost, bit in zip(forward, pattern, strict=True) if bit == "1")
    step += sum(forward[lowest + 1 :])
    prefix = sum(forward[:lowest])
    return prefix + steps * (step - prefix) if reuse_prefix else steps * step


def times_of(
    runs: Sequence[Callable[[Tensor, Tensor], object]], supports: Sequence[tuple[Tensor, Tensor]], count: int
) -> list[Timing]:
    """Time ``count`` calls of each function, which take turns, after some to warm up.

    Args:
        runs: each takes the support inputs and targets of one task.
        supports: the tasks' support sets, on the learner's device; one a round.
        count: rounds, 2 or more.
    """

    def turns(run: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        tasks = itertools.cycle(supports)
        return lambda: run(*next(tasks))

    found = in_turns(dict(enumerate(map(turns, runs))), count, supports[0][0].device, WARM_UP)
    return list(found.values())


def choose(rows: Sequence[Row], tolerance: float) -> Row:
    """The fastest row (with reuse) whose loss of accuracy is within the tolerance, with its whole interval.

    Ties go to the higher accuracy, then to fewer moving weights, then to the pattern that comes first in order. Full
    adaptation is always within the tolerance; no adaptation is never chosen.

    Args:
        rows: of one number of steps.
        tolerance: accuracy that may be lost against full adaptation, in percentage points, 0 or more.

    Raises:
        ValueError: a tolerance that is no number of 0 or more.
    """
    _check_tolerance(tolerance)
    moving = [row for row in rows if "1" in row.pattern]
    within = [row for row in moving if 100 * (row.difference.mean - row.difference.interval) >= -tolerance]
    return min(within, key=lambda row: (row.time_reusing.median, -row.accuracy.mean, row.weights, row.pattern))


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be 0 or more percentage points of accuracy")


def best_trades(rows: Sequence[Row]) -> list[Row]:
    """The rows than which no other is both as fast (with reuse) and as accurate, from the fastest to the best."""
    ranked = sorted(rows, key=lambda row: (row.weights, row.pattern), reverse=True)
    of_place = {(row.time_reusing.median, row.accuracy.mean): row for row in ranked}
    return [of_place[place] for place in frontier(list(of_place))]


def study(
    learner: MetaLearner,
    tasks: TaskSource,
    steps: Sequence[int] = (1, 5, 10),
    *,
    tolerance: float = 1.0,
    count: int = 600,
    repetitions: int = 100,
    inductive: bool = False,
    parts: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
    kept: Path | None = None,
) -> list[Section]:
    """Judge and time every pattern on a trained learner, which stays as it is.

    Patterns are chosen by validation classes alone, each against full adaptation in as many steps on the same tasks.

    Args:
        learner: trained on classes.
        tasks: where validation and test tasks come from.
        steps: numbers of adaptation steps.
        tolerance: accuracy that may be lost against full adaptation, in percentage points.
        count: validation tasks, and test tasks.
        repetitions: adaptations timed for each pattern.
        inductive: predict each query without seeing the others, as ``innerloop adapt`` does unless told otherwise.
        parts: names of the model's blocks, where it does not declare them; see `innerloop.Blocks`.
        progress: called with a line for each pattern done.
        kept: file to which each result is appended, and from which those of the same study, interrupted before, are
            taken.

    Returns:
        A section for each number of steps, in order.

    Raises:
        ValueError: a number out of range, regression tasks, or a model without blocks that can move.
    """
    _check_tolerance(tolerance)
    if not steps or min(steps) < 1:
        raise ValueError(f"steps are {list(steps)}; give one or more numbers of 1 or more")
    if count < 2 or repetitions < 2:
        raise ValueError(f"{count} tasks and {repetitions} repetitions: both must be 2 or more, for an interval")
    if tasks.ways is None:
        raise ValueError(f"{tasks.name} is regression; patterns are chosen by accuracy, so they need classes")
    steps = sorted(set(steps))
    place = leading(learner)
    batch = tasks.batch("validation", 0, min(count, SUPPORTS)).to(place.device, place.dtype)
    supports = list(zip(*batch.support, strict=True))
    forward = multiply_adds(learner.model, supports[0][0], parts)

    def accuracies(learner: MetaLearner, split: str, steps: int) -> Tensor:
        found = evaluate(learner, tasks, split, count, steps=steps, inductive=inductive, kept=kept).accuracies
        assert found is not None
        return found.double()

    patterns = patterns_for(movable_blocks(learner, parts))
    # the last pattern moves nothing: it is no step, of whatever could move
    moving = [Blocks(pattern, parts=parts) for pattern in (*patterns[:-1], patterns[0])]
    patterned, plain = ([with_pattern(learner, blocks, reuse) for blocks in moving] for reuse in (True, False))

    sections = []
    for number in steps:
        taken = [number] * (len(patterns) - 1) + [0]
        values = []
        for index, (each, some) in enumerate(zip(patterned, taken, strict=True)):
            values.append(accuracies(each, "validation", some))
            progress(f"{number} steps  pattern {index + 1}/{len(patterns)}  {patterns[index]}")
        runs = [
            partial(each.adapted_parameters, steps=some)
            for learners in (plain, patterned)
            for each, some in zip(learners, taken, strict=True)
        ]
        timed = ("validation", number, repetitions, moving, place.device, torch.get_num_threads())
        with resumable(kept, key_of(learner, tasks, timed)) as (before, keep):
            if not before:
                measured = times_of(runs, supports, repetitions)
                before[0] = {"seconds": torch.tensor(measured, dtype=torch.float64)}
                keep(0, before[0])
        times = [Timing(*seconds) for seconds in before[0]["seconds"].tolist()]
        rows = [
            Row(
                pattern=pattern,
                weights=sum(each.model.get_parameter(name).numel() for name in each.adapted) if some else 0,
                accuracy=Estimate.of(found),
                difference=Estimate.of(found - values[0]),
                cost=predicted_cost(forward, pattern, number, reuse_prefix=False),
                cost_reusing=predicted_cost(forward, pattern, number, reuse_prefix=True),
                time=computing,
                time_reusing=reusing,
            )
            for pattern, each, some, found, computing, reusing in zip(
                patterns, patterned, taken, values, times[: len(patterns)], times[len(patterns) :], strict=True
            )
        ]
        chosen = choose(rows, tolerance)
        both = patterned[0], patterned[rows.index(chosen)]
        reference, found = (accuracies(each, "test", number) for each in both)
        test = Confirmation(Estimate.of(reference), Estimate.of(found), Estimate.of(found - reference))
        sections.append(Section(number, rows, chosen, test))
    return sections


def deployed(sections: Sequence[Section], steps: int) -> Section:
    """The section of so many steps, the learner's own; where that was not measured, the one of the most steps."""
    return next((section for section in sections if section.steps == steps), sections[-1])


def save_study(folder: Path, sections: Sequence[Section], steps: int, notes: dict[str, Any]) -> Section:
    """Write what was found to a run folder, ``patterns.json``, ``.md`` and ``.png``, and the choice, ``pattern.json``.

    Args:
        folder: of the run.
        sections: as `study` returns them.
        steps: the learner's own adaptation steps, with which the choice is to be used.
        notes: how they were measured; ``tolerance`` and ``parts`` of `study` among them.

    Returns:
        The section whose choice was written.
    """
    section = deployed(sections, steps)
    found = {"sections": [_json(each) for each in sections], "deployed_steps": section.steps}
    save_results(folder / RESULTS, notes | found)
    choice = {"pattern": section.chosen.pattern, "steps": section.steps, "test": _json(section)["test"]}
    save_results(folder / CHOICE, notes | choice)
    shown = panels([_panel(each, notes["tolerance"]) for each in sections], columns=3, height=4.0)
    save(folder / PICTURE, shown)
    tables = [part for each in sections for part in (Heading(title(each)), table(each), confirmation(each))]
    picture = Picture(PICTURE, "Validation accuracy over adaptation time, the frontier marked")
    parts = [Gallery([picture]), *tables, *how_made(notes | provenance())]
    write(folder / PAGE, markdown("Patterns", parts))
    return section


def read_choice(path: Path) -> tuple[Blocks, int]:
    """The pattern and the number of adaptation steps of a ``pattern.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not what `save_study` writes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; innerloop patterns RUN writes it into the run folder")
    try:
        choice = json.loads(path.read_text(encoding="utf-8"))
        return Blocks(str(choice["pattern"]), parts=tuple(choice["parts"])), int(choice["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no pattern ({error}); write it anew with innerloop patterns RUN") from error


def _json(section: Section) -> dict[str, Any]:
    return {**plain(section), "chosen": section.chosen.pattern}


def title(section: Section) -> str:
    """Its number of steps, in words."""
    return f"{section.steps} {'step' if section.steps == 1 else 'steps'}"


def table(section: Section) -> Table:
    """A section's rows. Predicted and measured ratios are how many times faster than full adaptation."""
    full = section.rows[0]
    within = {row.pattern for row in best_trades(section.rows[:-1])}

    def speed(row: Row, time: str, cost: str) -> list[str]:
        mine, cheap = getattr(row, time).median, getattr(row, cost)
        ratios = (getattr(full, time).median / mine, getattr(full, cost) / cheap) if cheap else ()
        return [f"{1000 * mine:.3g}", *(f"{ratio:.3g}" for ratio in ratios), *([] if ratios else ["", ""])]

    rows = [
        [
            Cell(row.pattern, row is section.chosen),
            "yes" if row.pattern in within else "",
            percent(row.accuracy, unit=""),
            percent(row.difference, "+", ""),
            f"{row.weights:,}",
            *speed(row, "time", "cost"),
            *speed(row, "time_reusing", "cost_reusing"),
        ]
        for row in section.rows
    ]
    head = ["pattern", "frontier", "accuracy, %", "against full, points", "weights", "ms", "faster", "predicted"]
    return Table([*head, "ms, reusing", "faster", "predicted"], rows, "Bold: chosen.")


def confirmation(section: Section) -> str:
    """What became of a section's choice, in a sentence."""
    full, chosen, test, none = section.rows[0], section.chosen, section.test, section.rows[-1]
    plainly, reusing = (getattr(full, time).median / getattr(chosen, time).median for time in ("time", "time_reusing"))
    text = (
        f"{chosen.pattern} is {plainly:.3g} times as fast as full adaptation, {reusing:.3g} times with reuse; on test "
        f"tasks {percent(test.chosen)} against {percent(test.full)}, {points(test.difference, '+')}."
    )
    if none.difference.mean >= chosen.difference.mean:
        text += f" No adaptation at all is as good on validation tasks ({percent(none.accuracy)})."
    return text


def _panel(section: Section, tolerance: float) -> Panel:
    full, none = section.rows[0], section.rows[-1]
    moving = [row for row in section.rows if "1" in row.pattern]
    best = best_trades(moving)

    def shown(rows: Sequence[Row], interval: bool = False, time: str = "time_reusing", **look: Any) -> Line:
        means, halves = (100 * np.array([row.accuracy for row in rows])).T
        ends = (means - halves, means + halves) if interval else ()
        return Line([1000 * getattr(row, time).median for row in rows], means, DOTS | look, *ends)

    lines = {
        "everything each step": shown(moving, time="time", color=GREY, fillstyle="none"),
        "prefix reused": shown(moving, color=BLUE),
        "frontier": shown(best, interval=True, color=BLUE, linestyle="-"),
        "chosen": shown([section.chosen], color=ORANGE, markersize=9),
        "full adaptation": shown([full], color="black", marker="s", markersize=6),
    }
    levels = {
        f"full less {tolerance:g} points": (100 * full.accuracy.mean - tolerance, {"color": ORANGE}),
        "no adaptation": (100 * none.accuracy.mean, DOTTED),
    }
    notes = [
        (1000 * row.time_reusing.median, 100 * row.accuracy.mean, row.pattern)
        for row in {row.pattern: row for row in (*best, section.chosen, full)}.values()
    ]
    axes = {"xscale": "log", "xlabel": "time of one adaptation, ms", "ylabel": "validation accuracy, %"}
    return Panel(lines, axes | {"title": title(section)}, levels, notes, {"x": digits})
