"""95 % intervals of what was measured on few samples."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

Z = 1.959964
ROUNDS = 2000
MIN_VALUES = 4
"""Minimum number of values for a bootstrap interval: of 3 values, one resample in 27 holds only the
minimum, and an end of the interval would be a single value."""

T = TypeVar("T")
Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion."""
    if not trials:
        return 0.0, 1.0
    p, z2 = successes / trials, Z * Z / trials
    middle = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials)) / (1 + z2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(
    values: Sequence[T], statistic: Callable[[Sequence[T]], float], seed: int = 0
) -> Interval | None:
    """Percentile interval of a statistic under resampling; None for under `MIN_VALUES` values."""
    if len(values) < MIN_VALUES:
        return None
    rng = random.Random(seed)
    draws = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(ROUNDS))
    return draws[int(0.025 * ROUNDS)], draws[int(0.975 * ROUNDS) - 1]


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
