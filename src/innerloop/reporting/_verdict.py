"""What paired differences say of a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles of t, from 1 degree on


def student(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean of a few values, by Student's t; NaN of a single one."""
    quantile = STUDENT[max(0, min(len(values) - 2, len(STUDENT) - 1))]
    return quantile * _deviation(values) / math.sqrt(len(values))


def _deviation(values: Sequence[float]) -> float:
    """NaN of a single value, and where one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def paired(differences: Sequence[float], per_seed: Sequence[float] | None = None) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of differences, for `verdict` and to be shown beside it.

    Args:
        differences: ours minus theirs, one a task, the tasks of all seeds together.
        per_seed: the mean difference of each seed; then the interval is that of the seeds where it is wider.

    Raises:
        ValueError: no differences, or no seeds.
    """
    values = [float(each) for each in differences]
    if not values or (per_seed is not None and not len(per_seed)):
        raise ValueError("there are no differences; give one a task, and where seeds are given one a seed")
    half = 1.96 * _deviation(values) / math.sqrt(len(values))
    if per_seed is not None:
        over_seeds = student([float(each) for each in per_seed])
        half = over_seeds if math.isnan(over_seeds) else max(half, over_seeds)
    return statistics.fmean(values), half


def verdict(
    differences: Sequence[float], per_seed: Sequence[float] | None = None, margin: float = 1.0
) -> Literal["shown", "open", "contradicted"]:
    """Whether ours is at least as good as theirs, within a margin, by paired differences.

    The claim is that the true mean difference is above ``-margin``. Two forms are in use:

    * at least as good within the margin: a margin above 0, stated beforehand;
    * better: ``margin=0``.

    Args:
        differences: ours minus theirs on the same task, one a task, more being better, such as accuracy in points.
        per_seed: the mean difference of each seed, where the claim is about training and not about these weights. One
            seed leaves its interval unknown.
        margin: in the unit of the differences, 0 or more.

    Returns:
        ``"shown"`` where the whole 95 % interval of `paired` is above ``-margin``, ``"contradicted"`` where all of it
        is below, ``"open"`` otherwise: also where the interval is unknown.

    Raises:
        ValueError: no differences, or a margin below 0.

    Example:
        >>> verdict([0.4, -0.2, 0.1, 0.3], margin=1.0)
        'shown'
        >>> verdict([0.4, -0.2, 0.1, 0.3], margin=0.0)
        'open'
    """
    return verdict_of(*paired(differences, per_seed), margin)


def verdict_of(mean: float, half: float, margin: float = 1.0) -> Literal["shown", "open", "contradicted"]:
    """As `verdict`, of a mean of paired differences and the half-width of its interval, as `paired` gives them.

    Raises:
        ValueError: a margin below 0.
    """
    if not margin >= 0:
        raise ValueError(f"margin={margin}; give 0, or how much worse still counts as good")
    if mean - half > -margin:
        return "shown"
    return "contradicted" if mean + half < -margin else "open"
