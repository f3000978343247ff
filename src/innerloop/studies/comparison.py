"""What a comparison of methods has found, and which of them it recommends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from innerloop.training.evaluation import Baseline, Estimate


class Timing(NamedTuple):
    """Seconds: the median of the repetitions, and the quartiles around it."""

    median: float
    lower: float
    upper: float


class Point(NamedTuple):
    """A validation: outer steps done, seconds of their meta-steps, accuracy's mean over the seeds.

    ``lowest`` and ``highest`` are those of the seeds.
    """

    step: int
    seconds: float
    accuracy: float
    lowest: float
    highest: float


class Entry(NamedTuple):
    """A method of a comparison. Accuracies lie between 0 and 1.

    Attributes:
        method: its name, such as ``"window:5"``.
        title: its name as people write it.
        paper: where it comes from.
        differs: settings that other methods of the comparison have otherwise, as ``name: text``.
        steps: outer steps of training.
        transductive: test accuracy over all seeds with queries predicted together; None where the learner predicts
            each alone anyway.
        inductive: with each query predicted alone.
        seeds: mean test accuracy of each seed, transductive where there is that.
        behind: what the best method's test accuracy is above this one's, compared task by task and seed by seed.
        curve: the validations.
        reached: seconds of meta-steps until validation accuracy stays above the comparison's target; None if never.
        meta_step: seconds of one, the meta-gradient of a batch.
        memory: peak memory of a meta-step above model and tasks, in bytes.
        memory_at: the same at other numbers of inner steps.
        products: curvature products of a task's meta-gradient.
        adaptation: seconds of adapting to one task.
        baselines: on the features of the method's own runs, and on pixels, over all seeds, by name.
    """

    method: str
    title: str
    paper: str
    differs: dict[str, str]
    steps: int
    transductive: Estimate | None
    inductive: Estimate
    seeds: list[float]
    behind: Estimate
    curve: list[Point]
    reached: float | None
    meta_step: Timing
    memory: int
    memory_at: dict[int, int]
    products: float
    adaptation: Timing
    baselines: dict[str, Baseline] = {}  # noqa: RUF012  # never changed

    @property
    def accuracy(self) -> Estimate:
        """Test accuracy, transductive where there is that."""
        return self.transductive or self.inductive


class Comparison(NamedTuple):
    """Methods on the same tasks, model and budget.

    Attributes:
        tasks: what was learned, such as "glyphs, 5-way 1-shot".
        budget: what each method had, such as "5 minutes of meta-steps" or "2,000 outer steps".
        test_tasks: tasks of each seed's test.
        share: of the best validation accuracy of all methods, that ``reached`` asks for.
        target: that share of it, an accuracy.
        nearest_neighbour: accuracy on raw pixels.
        entries: one a method, in the order given.
        made: command, commit, versions and machine.
        failed: methods that could not be measured or trained, and why.
        notes: what else a reader must know, in sentences without a full stop.
    """

    tasks: str
    budget: str
    test_tasks: int
    share: float
    target: float
    nearest_neighbour: Estimate
    entries: list[Entry]
    made: dict[str, Any]
    failed: dict[str, str] = {}  # noqa: RUF012
    notes: list[str] = []  # noqa: RUF012


SAVING = 0.05
RULE = (
    "Candidates are the methods whose test accuracy is not below the best one's by more than the 95 % interval of the "
    "difference, taken task by task (an unknown interval counts as 0). Recommended is "
    "the candidate whose validation accuracy reaches the target soonest; where none of them reaches it, or two do so "
    "at once, the one with the fastest meta-step. Named beside it are methods that save at least 5 % of its memory or "
    "of its adaptation time, and whose test accuracy is above that of the nearest neighbour on raw pixels: candidates "
    "if there are such, otherwise others, with the accuracy that they cost."
)
FEW_SEEDS = (
    "With fewer than three seeds the intervals leave out how much training itself varies (give --seeds 3 or more)."
)


class Recommendation(NamedTuple):
    """What `RULE` makes of a comparison.

    Attributes:
        chosen: the method recommended.
        best: the most accurate method.
        candidates: methods as accurate as the best, by their intervals; in the order of the comparison.
        lightest: the candidate with the least memory, or ``chosen`` where `RULE` names none.
        quickest: the candidate that adapts fastest, or ``chosen`` likewise.
        text: the choice, its numbers and what would change it, as a paragraph.
    """

    chosen: Entry
    best: Entry
    candidates: list[Entry]
    lightest: Entry
    quickest: Entry
    text: str


def recommend(comparison: Comparison) -> Recommendation:
    """The method to use, by `RULE`.

    Raises:
        ValueError: a comparison of no methods.
    """
    if not comparison.entries:
        raise ValueError("the comparison holds no methods; compare one or more")
    best = max(comparison.entries, key=lambda entry: entry.accuracy.mean)
    candidates = [
        entry
        for entry in comparison.entries
        if entry.behind.mean <= (0.0 if math.isnan(entry.behind.interval) else entry.behind.interval)
    ]
    ranked = sorted(candidates, key=_soonest)
    useful = [entry for entry in comparison.entries if entry.accuracy.mean > comparison.nearest_neighbour.mean]
    accurate = [entry for entry in useful if entry in candidates]
    lightest, quickest = (_thriftiest(ranked[0], accurate, cost) for cost in (_memory, _adaptation))
    sentences = [
        f"Recommended: {ranked[0].title}.",
        _why_accurate(ranked[0], best, candidates, comparison),
        _why_fast(ranked, comparison),
        _otherwise("memory binds", ranked[0], lightest, useful, _memory, size),
        _otherwise("adaptation must be fast", ranked[0], quickest, useful, _adaptation, duration),
        FEW_SEEDS if min(len(entry.seeds) for entry in comparison.entries) < 3 else "",
    ]
    return Recommendation(ranked[0], best, candidates, lightest, quickest, " ".join(filter(None, sentences)))


def _soonest(entry: Entry) -> tuple[float, float]:
    return math.inf if entry.reached is None else entry.reached, entry.meta_step.median


def _memory(entry: Entry) -> float:
    return entry.memory


def _adaptation(entry: Entry) -> float:
    return entry.adaptation.median


def _thriftiest(chosen: Entry, entries: Iterable[Entry], cost: Callable[[Entry], float]) -> Entry:
    """The entry of least cost, unless it saves too little against the chosen one."""
    least = min([chosen, *entries], key=cost)
    return least if cost(least) <= (1 - SAVING) * cost(chosen) else chosen


def _why_accurate(chosen: Entry, best: Entry, candidates: list[Entry], comparison: Comparison) -> str:
    accuracy = percent(best.accuracy)
    if len(comparison.entries) == 1:
        only = "that could be trained" if comparison.failed else "compared"
        return f"It is the only method {only}; its test accuracy is {accuracy}."
    if len(candidates) == 1:
        others = (entry for entry in comparison.entries if entry is not best)
        second = max(others, key=lambda entry: entry.accuracy.mean)
        return (
            f"Its test accuracy, {accuracy}, is the best, by more than the 95 % interval of the difference "
            f"(next: {second.title}, {percent(second.accuracy)}, {points(second.behind)} below)."
        )
    names = [entry.title for entry in candidates if entry is not best]
    own = "" if chosen is best else f" Its own is {percent(chosen.accuracy)}."
    return (
        f"The best test accuracy is {accuracy} ({best.title}); not below it by more than the 95 % interval of the "
        f"difference {'is' if len(names) == 1 else 'are'} {words(names)}.{own}"
    )


def _why_fast(ranked: list[Entry], comparison: Comparison) -> str:
    chosen, *others = ranked
    target = f"{100 * comparison.target:.2f} % validation accuracy"
    if chosen.reached is None:
        if not others:
            return f"It does not stay above {target}; a meta-step takes {duration(chosen.meta_step.median)}."
        own, next_one = (duration(entry.meta_step.median) for entry in ranked[:2])
        return (
            f"None of these stays above {target}; {chosen.title} has the fastest meta-step, {own} "
            f"(next: {others[0].title}, {next_one})."
        )
    time = f"{duration(chosen.reached)} of meta-steps"
    if not others:
        return f"It stays above {target} after {time}."
    second = others[0].reached
    rest = "the others never do" if second is None else f"next: {others[0].title}, {duration(second)}"
    return f"Of these {len(ranked)}, {chosen.title} is the first to stay above {target}, after {time} ({rest})."


def _otherwise(
    need: str,
    chosen: Entry,
    candidate: Entry,
    others: list[Entry],
    cost: Callable[[Entry], float],
    text: Callable[[float], str],
) -> str:
    """What to take instead under a need: a candidate, or else one of the others, with the accuracy that it costs."""
    other = _thriftiest(chosen, others, cost) if candidate is chosen else candidate
    if other is chosen:
        return ""
    loss = "" if other is candidate else f", at {percent(other.accuracy)} test accuracy"
    return f"If {need}: {other.title}, {text(cost(other))} instead of {text(cost(chosen))}{loss}."


def percent(estimate: Estimate) -> str:
    """An accuracy with its 95 % interval, where that is known: ``"52.31 ± 0.60 %"``."""
    interval = "" if math.isnan(estimate.interval) else f" ± {100 * estimate.interval:.2f}"
    return f"{100 * estimate.mean:.2f}{interval} %"


def points(estimate: Estimate) -> str:
    """A difference of accuracies with its 95 % interval, where that is known: ``"2.31 ± 0.40 points"``."""
    return f"{percent(estimate).removesuffix(' %')} points"


def size(count: float) -> str:
    """Bytes in KiB, MiB or GiB: ``"120 MiB"``."""
    unit, factor = next((unit for unit in (("GiB", 2**30), ("MiB", 2**20)) if count >= unit[1]), ("KiB", 2**10))
    return f"{digits(count / factor)} {unit}"


def duration(seconds: float) -> str:
    """Seconds, below one in milliseconds: ``"35.2 s"``."""
    return f"{digits(seconds)} s" if seconds >= 1 else f"{digits(1000 * seconds)} ms"


def digits(value: float) -> str:
    """A number to three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def words(names: list[str]) -> str:
    """Names as an enumeration: ``"A, B and C"``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
