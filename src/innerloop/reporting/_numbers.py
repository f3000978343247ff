"""Numbers as text, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(estimate: Sequence[float], sign: str = "", unit: str = " %") -> str:
    """A share with its 95 % interval, where that is known: ``"52.31 ± 0.60 %"``.

    Args:
        estimate: mean and half-width of the interval, between 0 and 1; NaN for an unknown interval.
        sign: ``"+"`` shows that of a positive number too, for differences.
        unit: behind it; nothing in a table whose head names the unit.
    """
    mean, interval = estimate
    return f"{100 * mean:{sign}.2f}" + ("" if math.isnan(interval) else f" ± {100 * interval:.2f}") + unit


def points(estimate: Sequence[float], sign: str = "") -> str:
    """A difference of shares with its 95 % interval: ``"2.31 ± 0.40 points"``."""
    return percent(estimate, sign, " points")


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
