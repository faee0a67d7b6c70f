"""Intervals of what was measured on few samples."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
MIN_VALUES = 4
"""Fewest units that say how much units differ: an interval of two or three is wider than useful."""
CORRELATION = 0.2
"""Minimum correlation of the answers to questions about one document: samples of usual sizes
underestimate it, and verdicts would come too early (`tests/test_lab_intervals.py`)."""

Interval = tuple[float, float]


def wilson(successes: float, trials: float) -> Interval:
    """Wilson's 95 % score interval of a proportion."""
    if not trials:
        return 0.0, 1.0
    p, z2 = successes / trials, Z * Z / trials
    middle = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials)) / (1 + z2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over independent units (documents), and how sure it is.

    Attributes:
        value: the mean.
        error: its standard error; None for under `MIN_VALUES` units.
        units: how many.
        effective: how many of equal weight would be as sure.
    """

    value: float
    error: float | None
    units: int
    effective: float

    @property
    def freedom(self) -> int:
        return max(round(self.effective) - 1, 1)

    def interval(self, level: float = 0.95) -> Interval | None:
        """Student's interval; None without an error."""
        if self.error is None:
            return None
        half = student((1 + level) / 2, self.freedom) * self.error
        return self.value - half, self.value + half

    def beyond(self, limit: float) -> float:
        """How likely so great a value is if the truth is `limit`: the p-value of "above it"."""
        if not self.error:
            return 0.0 if self.error == 0 and self.value > limit else 1.0
        return student_above((self.value - limit) / self.error, self.freedom)


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Weighted mean of the values of independent units.

    Its variance is that of a mean of clusters: the spread between units, whatever the spread and
    the dependence of tokens or questions inside of each.
    """
    total = sum(weights) if weights else float(len(values))
    shares = [w / total for w in weights or [1.0] * len(values)]
    middle = math.fsum(w * x for w, x in zip(shares, values, strict=True))
    effective = 1 / math.fsum(w * w for w in shares)
    if len(values) < MIN_VALUES:
        return Estimate(middle, None, len(values), effective)
    spread = math.fsum((w * (x - middle)) ** 2 for w, x in zip(shares, values, strict=True))
    error = math.sqrt(spread * effective / (effective - 1)) if effective > 1 else None
    return Estimate(middle, error, len(values), effective)


def estimate_clusters(documents: Sequence[Sequence[float]]) -> Estimate:
    """Mean over all questions of independent documents."""
    return estimate([mean(scores) for scores in documents], [len(scores) for scores in documents])


def estimate_change(
    base: Sequence[float], other: Sequence[float], weights: Sequence[float] | None = None
) -> Estimate:
    """How much greater the weighted mean of `other` is, relative to that of `base`, pair by pair.

    The error is that of the linearised ratio: other - ratio x base, over the mean of base.
    """
    of_base, of_other = estimate(base, weights).value, estimate(other, weights).value
    ratio = of_other / of_base
    rest = [(b - ratio * a) / of_base for a, b in zip(base, other, strict=True)]
    around = estimate(rest, weights)
    return Estimate(ratio - 1, around.error, around.units, around.effective)


def estimate_flips(documents: Sequence[Sequence[int]]) -> Estimate:
    """Mean of answers gained (1), lost (-1) or as before (0), by question of each document.

    Bonett and Price's interval for paired proportions: half a gain and half a loss more than were
    counted keep it honest where there are none; under `MIN_VALUES` questions there is no interval.
    Questions about one document count less by their design effect, which is taken to be at least
    that of a correlation of `CORRELATION`.
    """
    answers = [float(flip) for flips in documents for flip in flips]
    lost, gained = answers.count(-1.0), answers.count(1.0)
    least = 1 + (len(answers) / len(documents) - 1) * CORRELATION
    effect = max(design_effect(documents), least)
    count = len(answers) / effect
    up, down = ((flips / effect + 1) / (count + 2) for flips in (gained, lost))
    if len(answers) < MIN_VALUES:
        return Estimate(up - down, None, len(answers), count)
    error = math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Estimate(up - down, error, len(answers), count)


def design_effect(documents: Sequence[Sequence[float]]) -> float:
    """By how much the variance of a mean over the questions of documents exceeds that of as many
    independent ones."""
    if max(map(len, documents)) == 1 or len(documents) < MIN_VALUES:
        return 1.0
    answers = [float(score) for scores in documents for score in scores]
    alone = estimate(answers).error or 0.0
    together = estimate_clusters(documents).error or 0.0
    return max((together / alone) ** 2, 1.0) if alone else 1.0


@functools.lru_cache(maxsize=1024)
def student(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution, for probabilities of at least one half."""
    if freedom > 1000:
        return statistics.NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        below = (1 + _student_center(angle, freedom)) / 2 < probability
        low, high = (angle, high) if below else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def student_above(value: float, freedom: int) -> float:
    """P(T > value)."""
    if freedom > 1000:
        return 1 - statistics.NormalDist().cdf(value)
    tail = (1 - _student_center(math.atan(abs(value) / math.sqrt(freedom)), freedom)) / 2
    return tail if value >= 0 else 1 - tail


def _student_center(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    square = math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(1, freedom // 2 + 1):
        total += term
        term *= square * (2 * i if odd else 2 * i - 1) / (2 * i + 1 if odd else 2 * i)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
