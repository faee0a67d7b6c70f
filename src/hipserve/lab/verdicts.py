"""Is the difference smaller than a margin that was chosen before? Same, different, or too few data.

Two one-sided tests at 5 % each (TOST): `same` where the 90 % interval lies inside of the margin,
`different` where it lies outside, `undecided` otherwise. Where several are judged at once, Holm's
correction keeps the chance of any wrong verdict of a kind to those 5 %.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
MEASURES = ("likelihood", "kl", "top1", "far", "answers")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about one measure.

    Attributes:
        decision: `same`, `different` or `undecided`.
        margin: maximum difference to zero that counts as none.
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
    return judge_all([measured], margin)[0]


def judge_all(measured: Sequence[Estimate], margin: float) -> list[Verdict]:
    """Verdicts on differences that are judged at once, with Holm's correction for their number."""
    same = _holm([_p_same(one, margin) for one in measured])
    different = _holm([_p_different(one, margin) for one in measured])
    return [
        Verdict("same", margin, None)
        if is_same
        else Verdict("different", margin, None)
        if is_different
        else Verdict("undecided", margin, _more(one, margin))
        for one, is_same, is_different in zip(measured, same, different, strict=True)
    ]


def _p_same(measured: Estimate, margin: float) -> float:
    """p of the worse of two one-sided tests: below the margin, and above minus it."""
    below = _mirror(measured).beyond(-margin)
    return max(below, measured.beyond(-margin))


def _p_different(measured: Estimate, margin: float) -> float:
    """p of the better of two: above the margin, or below minus it."""
    return min(measured.beyond(margin), _mirror(measured).beyond(margin))


def _mirror(measured: Estimate) -> Estimate:
    return replace(measured, value=-measured.value)


def _holm(p_values: Sequence[float]) -> list[bool]:
    """Which are rejected: the smallest at 5 % over their number, the next at 5 % over one less …,
    up to the first that is not."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] >= (1 - LEVEL) / 2 / (len(order) - rank):
            break
        rejected[i] = True
    return rejected


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
