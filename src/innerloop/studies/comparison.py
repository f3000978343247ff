"""What a comparison of methods has found, and which of them it recommends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from innerloop.reporting import Timing, duration, percent, size
from innerloop.training.evaluation import Baseline, Estimate


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
        rates: validation accuracy by outer rate, of those tried before training; None where that diverged.
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
    rates: dict[str, float | None] = {}  # noqa: RUF012

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
        target: the accuracy that ``reached`` asks for, `SHARE` of the best in validation.
        nearest_neighbour: accuracy on raw pixels.
        entries: one a method, in the order given.
        made: command, commit, versions and machine.
        failed: methods that could not be measured or trained, and why.
        notes: what else a reader must know, in sentences without a full stop.
        tuned: what was tuned, in a sentence; empty where nothing was.
    """

    tasks: str
    budget: str
    test_tasks: int
    target: float
    nearest_neighbour: Estimate
    entries: list[Entry]
    made: dict[str, Any]
    failed: dict[str, str] = {}  # noqa: RUF012
    notes: list[str] = []  # noqa: RUF012
    tuned: str = ""

    @property
    def first_line(self) -> str:
        """What a reader must know before any number: what was tuned."""
        return self.tuned or "Nothing was tuned: every method has its own outer rate."


SHARE, SAVING, MARGIN = 0.9, 0.05, 0.01
RULE = (
    "Candidates are the methods above the nearest neighbour on raw pixels whose test accuracy is at most 1 point below "
    "the best one's, and not below it by more than the 95 % interval of the difference, taken task by task (an unknown "
    "interval counts as 0). Recommended is the candidate whose validation accuracy reaches the target soonest; where "
    "none of them reaches it, or two do so at once, the one with the fastest meta-step. Named beside it are methods "
    "that save at least 5 % of its memory or of its adaptation time: candidates if there are such, otherwise others "
    "above the nearest neighbour, with the accuracy that they have."
)
FEW_SEEDS = (
    "With fewer than three seeds the intervals leave out how much training itself varies (give --seeds 3 or more)."
)


class Recommendation(NamedTuple):
    """What `RULE` makes of a comparison.

    Attributes:
        chosen: the method recommended; None where no method is above the nearest neighbour.
        candidates: in the order of the comparison.
        lightest: the method to take if memory binds; ``chosen`` where `RULE` names none.
        quickest: the method to take if adaptation must be fast; ``chosen`` likewise.
    """

    chosen: Entry | None
    candidates: list[Entry]
    lightest: Entry | None
    quickest: Entry | None

    @property
    def first(self) -> str:
        """The choice in a sentence."""
        return f"Recommended: {self.chosen.title}." if self.chosen else "Recommended: none."

    @property
    def rest(self) -> str:
        """The numbers behind it, and what to take instead if something binds."""
        if self.chosen is None:
            return "No method is above the nearest neighbour on raw pixels: train longer, or look at the data."
        one = self.chosen
        time = "never" if one.reached is None else f"after {duration(one.reached)}"
        sentences = [
            f"Test accuracy {percent(one.accuracy)}, the target {time}, {size(one.memory)}, adaptation "
            f"{duration(one.adaptation.median)}."
        ]
        if others := [each.title for each in self.candidates if each is not one]:
            sentences.append(f"Other candidates: {', '.join(others)}.")
        if self.lightest and self.lightest is not one:
            sentences.append(f"If memory binds: {_instead(self.lightest, size(self.lightest.memory))}.")
        if self.quickest and self.quickest is not one:
            sentences.append(
                f"If adaptation must be fast: {_instead(self.quickest, duration(self.quickest.adaptation[0]))}."
            )
        if len(one.seeds) < 3:
            sentences.append(FEW_SEEDS)
        return " ".join(sentences)


def useful(comparison: Comparison) -> list[Entry]:
    """The methods above the nearest neighbour on raw pixels: the others have not learned."""
    return [each for each in comparison.entries if each.accuracy.mean > comparison.nearest_neighbour.mean]


def recommend(comparison: Comparison) -> Recommendation:
    """The method to use, by `RULE`.

    Raises:
        ValueError: a comparison of no methods.
    """
    if not comparison.entries:
        raise ValueError("the comparison holds no methods; compare one or more")
    able = useful(comparison)
    candidates = [each for each in able if each.behind.mean <= _slack(each.behind)]
    chosen = min(candidates, key=_soonest, default=None)

    def thriftiest(cost: Callable[[Entry], float]) -> Entry | None:
        for group in (candidates, able):
            saving = [each for each in group if chosen and cost(each) <= (1 - SAVING) * cost(chosen)]
            if saving:
                return min(saving, key=cost)
        return chosen

    return Recommendation(
        chosen,
        candidates,
        thriftiest(lambda each: each.memory),
        thriftiest(lambda each: each.adaptation.median),
    )


def _slack(behind: Estimate) -> float:
    """How far a candidate may be below the best: a wide interval is no reason to become one."""
    return 0.0 if math.isnan(behind.interval) else min(MARGIN, behind.interval)


def _soonest(entry: Entry) -> tuple[float, float]:
    return math.inf if entry.reached is None else entry.reached, entry.meta_step.median


def _instead(entry: Entry, cost: str) -> str:
    return f"{entry.title}, {cost}, test accuracy {percent(entry.accuracy)}"
