"""Times taken in turn: every round runs each contender once, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Times = dict[str, list[float]]


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: Mapping[str, int]) -> Times:
    """Seconds of each call in each round; a call with fewer `rounds` sits the last ones out."""
    times: Times = {name: [] for name in calls}
    for turn in range(max(rounds.values())):
        for name, call in calls.items():
            if turn < rounds[name]:
                times[name].append(seconds(call))
    return times


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)
