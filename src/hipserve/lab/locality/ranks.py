"""Rank correlation with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hipserve.lab.intervals import Interval, Z, mean

MIN_PAIRS = 5


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's correlation of pairs.

    Attributes:
        value: between -1 and 1; 0 where one side does not vary.
        interval: 95 %; None from fewer than `MIN_PAIRS` pairs.
        pairs: how many.
    """

    value: float
    interval: Interval | None
    pairs: int


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> RankCorrelation:
    """Spearman's correlation, its interval by Fisher's transformation.

    The variance is that of D. G. Bonett and T. A. Wright, "Sample size requirements for estimating
    Pearson, Kendall and Spearman correlations", Psychometrika 65 (2000).
    """
    value, pairs = _pearson(_ranks(x), _ranks(y)), len(x)
    if pairs < MIN_PAIRS:
        return RankCorrelation(value, None, pairs)
    middle = math.atanh(min(max(value, -1 + 1e-9), 1 - 1e-9))
    half = Z * math.sqrt((1 + value**2 / 2) / (pairs - 3))
    return RankCorrelation(value, (math.tanh(middle - half), math.tanh(middle + half)), pairs)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 on; equal values share the mean of their ranks."""
    below = [sum(other < value for other in values) for value in values]
    return [b + (values.count(v) + 1) / 2 for b, v in zip(below, values, strict=True)]


def _pearson(x: Sequence[float], y: Sequence[float]) -> float:
    pairs = [(a - mean(x), b - mean(y)) for a, b in zip(x, y, strict=True)]
    spread = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
    return sum(a * b for a, b in pairs) / spread if spread else 0.0
