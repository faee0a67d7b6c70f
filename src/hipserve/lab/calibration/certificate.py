"""Does a stated loss hold with a stated confidence? Learn-then-Test over a fixed sequence.

Learn-then-Test (arXiv 2110.01052) turns "is the loss above the limit?" into a hypothesis for each
configuration, and rejects it where held-out documents speak against it. Hypotheses that are tested
in an order which was fixed before, up to the first one that is not rejected, need no correction for
their number.

The test is Student's, one-sided, over documents, with the worst document counted twice: losses are
skewed, and the plain test errs too often with few documents (`tests/test_calibrate.py` simulates
both). It cannot see a kind of document that is not among those measured.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hipserve.lab.intervals import mean, student
from hipserve.lab.verdicts import MAX_UNITS, POWER

MIN_DOCUMENTS = 6
"""Fewest held-out documents of a certificate: with fewer, skewed losses deceive the test."""
HIGHEST = 1.0
"""Greatest limit that is tried: twice the nats of dense attention."""
STEPS = 30

Half = Literal["choose", "report"]


class Pairs(NamedTuple):
    """Nats per token of the same documents under dense and under pruned attention."""

    dense: Sequence[float]
    pruned: Sequence[float]

    @property
    def loss(self) -> float:
        """How much more nats pruned attention needs: mean over documents, relative to dense."""
        return mean(self.pruned) / mean(self.dense) - 1


def accepts(pairs: Pairs, limit: float, confidence: float) -> bool:
    """Is "the loss exceeds `limit`" rejected at this confidence, however few the documents?"""
    over = _over(pairs, limit)
    over.append(max(over))
    middle, spread = _moments(over)
    return middle + student(confidence, len(over) - 1) * spread / math.sqrt(len(over)) <= 0


def _over(pairs: Pairs, limit: float) -> list[float]:
    """Nats of each document beyond what `limit` allows; their mean is 0 at the limit."""
    return [p - (1 + limit) * d for d, p in zip(pairs.dense, pairs.pruned, strict=True)]


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of two values or more."""
    middle = math.fsum(values) / len(values)
    squares = math.fsum((x - middle) ** 2 for x in values)
    return middle, math.sqrt(squares / (len(values) - 1))


def bound(pairs: Pairs, confidence: float) -> float | None:
    """The lowest limit that would be accepted; None from too few documents, or above `HIGHEST`."""
    if len(pairs.dense) < MIN_DOCUMENTS or not accepts(pairs, HIGHEST, confidence):
        return None
    low, high = -1.0, HIGHEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if accepts(pairs, middle, confidence) else (middle, high)
    return high


def missing_documents(pairs: Pairs, limit: float, confidence: float) -> int | None:
    """More held-out documents with which the limit would be accepted four times in five, if they
    are as those measured; None where no number would help."""
    have, room = len(pairs.dense), limit - pairs.loss
    if have < 2:
        return MIN_DOCUMENTS - have
    over, base = _over(pairs, limit), mean(pairs.dense)
    spread, worst = _moments(over)[1] / base, max(over) / base + room
    beyond = statistics.NormalDist().inv_cdf(POWER)

    def enough(count: int) -> bool:
        reach = (student(confidence, count) + beyond) * spread / math.sqrt(count)
        return reach + worst / (count + 1) <= room

    counts = range(max(MIN_DOCUMENTS, have + 1), MAX_UNITS + 1)
    found = bisect.bisect_left(counts, True, key=enough)
    return counts[found] - have if found < len(counts) else None


@dataclass(frozen=True, slots=True)
class Tested:
    """One configuration on the report half.

    Attributes:
        loss: best estimate.
        bound: what the loss is below, with the stated confidence; None from too few documents.
        certified: the bound keeps to the limit.
    """

    name: str
    loss: float
    bound: float | None
    certified: bool


@dataclass(frozen=True, slots=True)
class Walk:
    """What was measured on the way.

    Attributes:
        chosen: loss on the half to choose by, of those that were looked at.
        tested: the sequence on the other half, up to the first that is not certified.
        missing: more held-out documents that the first one takes; None where it is certified, or
            no number would help.
    """

    chosen: dict[str, float]
    tested: list[Tested]
    missing: int | None

    @property
    def certified(self) -> Tested | None:
        """The cheapest that holds."""
        return next((test for test in reversed(self.tested) if test.certified), None)


def walk(
    names: Sequence[str],
    measure: Callable[[str, Half], Pairs],
    limit: float,
    confidence: float,
) -> Walk:
    """Tests `names`, from the dearest to the cheapest, until one is not certified.

    The half to choose by says where to start: at the cheapest one that it would certify itself. So
    the order of tests does not depend on the documents that they are made with.

    Args:
        measure: nats of the documents of a half, asked for only where needed.
    """
    chosen: dict[str, float] = {}

    def promising(name: str) -> bool:
        pairs = measure(name, "choose")
        chosen[name] = pairs.loss
        few = len(pairs.dense) < MIN_DOCUMENTS
        return 2 * pairs.loss <= limit if few else accepts(pairs, limit, confidence)

    order = range(len(names))
    begin = bisect.bisect_left(order, True, key=lambda i: not promising(names[i]))
    tested: list[Tested] = []
    missing = None
    for name in names[max(begin - 1, 0) :]:
        pairs = measure(name, "report")
        upper = bound(pairs, confidence)
        holds = upper is not None and upper <= limit
        tested.append(Tested(name, pairs.loss, upper, holds))
        if not holds:
            missing = missing_documents(pairs, limit, confidence) if len(tested) == 1 else None
            break
    return Walk(chosen, tested, missing)
