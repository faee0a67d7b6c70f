"""Is the difference smaller than a margin that was chosen before? Same, different, or too few data.

Two one-sided tests at 5 % each (TOST): `same` where the 90 % interval lies inside of the margin,
`different` where it lies outside, `undecided` otherwise.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hipserve.errors import ArgumentError, did_you_mean
from hipserve.lab.intervals import MIN_VALUES, Estimate, student

Decision = Literal["same", "different", "undecided"]
LEVEL = 0.9
POWER = 0.8
MAX_UNITS = 10_000
"""More documents than anybody adds: the value is too near to the margin to be told from it."""

MARGINS = {"likelihood": 0.005, "kl": 0.05, "answers": 0.02}
"""Differences that count as none, unless others are given: of likelihood, half a percent; of KL, in
nats, somewhat more than weights in 4 bits cost (0.043, ggml-org/llama.cpp#12557); of right answers,
two in a hundred."""
MEASURES = ("likelihood", "kl", "top1", "answers")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about one measure.

    Attributes:
        decision: `same`, `different` or `undecided`.
        margin: greatest difference to zero that counts as none.
        more: units (documents, pieces, questions) with which it would be decided four times in
            five if the truth is what was measured; None where it is decided, or would take more
            than `MAX_UNITS`.
    """

    decision: Decision
    margin: float
    more: int | None


def check_margins(margins: Mapping[str, float]) -> None:
    """Raises ArgumentError for a measure that does not exist, or a margin that is no distance."""
    for name, margin in margins.items():
        if name not in MEASURES:
            expected = f"one of {', '.join(MEASURES)}"
            raise ArgumentError("margin", expected, repr(name), did_you_mean(name, MEASURES))
        if not 0 < margin < math.inf:
            raise ArgumentError("margin", f"{name} above 0", str(margin))


def judge(measured: Estimate, margin: float) -> Verdict:
    """The verdict on a difference that should be zero."""
    interval = measured.interval(LEVEL)
    if interval is not None and -margin < interval[0] and interval[1] < margin:
        return Verdict("same", margin, None)
    if interval is not None and (interval[0] > margin or interval[1] < -margin):
        return Verdict("different", margin, None)
    return Verdict("undecided", margin, _more(measured, margin))


def _more(measured: Estimate, margin: float) -> int | None:
    """Units that are missing, as many of equal weight as there are now to one of the estimate's."""
    if measured.error is None:
        return MIN_VALUES - measured.units
    deviation = measured.error * math.sqrt(measured.effective)
    needed = _units(abs(measured.value), deviation, margin)
    if needed is None:
        return None
    return max(math.ceil(needed * measured.units / measured.effective) - measured.units, 1)


def _units(value: float, deviation: float, margin: float) -> int | None:
    """Fewest units by which the verdict falls with `POWER`: that grows with them."""
    if _power(value, deviation, margin, MAX_UNITS) < POWER:
        return None
    counts = range(MIN_VALUES, MAX_UNITS + 1)
    enough = bisect.bisect_left(counts, POWER, key=lambda n: _power(value, deviation, margin, n))
    return counts[enough]


def _power(value: float, deviation: float, margin: float, count: int) -> float:
    """Chance of the right verdict: an estimate of `value` clears the margin by its error."""
    error, below = deviation / math.sqrt(count), statistics.NormalDist().cdf
    reach = student((1 + LEVEL) / 2, count - 1)
    if value > margin:
        return below((value - margin) / error - reach)
    return below((margin - value) / error - reach) + below((margin + value) / error - reach) - 1
