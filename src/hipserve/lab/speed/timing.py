"""Times taken alternately: every round runs each contender once, and drift affects all alike.

Before the first round each runs once uncounted: first calls generate kernels and fill caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True, slots=True)
class Contender:
    """What is timed: `call(turn)` in round `turn`; its time times `scale` is that of a layer.

    `warm_up` runs before the first round, a shorter call of the same kernels; None: `call` itself.
    """

    call: Callable[[int], object]
    scale: float = 1.0
    warm_up: Callable[[int], object] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a contender may go on: rounds, or seconds if they are spent first.

    The `cpu` clock counts what this process used, which a busy machine hardly changes; it is
    for one thread.
    """

    rounds: int = 7
    seconds: float = 4.0
    clock: Clock = "wall"

    def reached(self, times: list[float]) -> bool:
        return len(times) >= self.rounds or sum(times) >= self.seconds


def in_turn(
    contenders: dict[str, Contender], limits: Limits, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Seconds of each round of each contender, scaled to a layer; `before` runs ahead of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        (contender.warm_up or contender.call)(0)
    for turn in range(limits.rounds):
        for name, contender in contenders.items():
            if limits.reached(spent[name]):
                continue
            if before:
                before()
            spent[name].append(seconds(contender.call, turn, limits.clock))
            times[name].append(spent[name][-1] * contender.scale)
    return times


def seconds(call: Callable[[int], object], turn: int, clock: Clock = "wall") -> float:
    """Time of one call."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    call(turn)
    return now() - start


def fastest(ways: dict[str, Callable[[], object]], rounds: int = 3) -> str:
    """The fastest of several ways to compute the same; the first call warms up."""
    for way in ways.values():
        way()
    times = {
        name: min(seconds(lambda _, way=way: way(), 0) for _ in range(rounds))
        for name, way in ways.items()
    }
    return min(times, key=lambda name: times[name])


def median_of_cycles(times: list[float], cycle: int) -> float:
    """Median over whole cycles of the mean time within a cycle."""
    whole = [times[i : i + cycle] for i in range(0, len(times) - cycle + 1, cycle)]
    return statistics.median(map(statistics.fmean, whole or [times]))


def sweep(memory: Tensor) -> None:
    """Reads `memory` `[words]`, larger than the caches, so what was in them is gone."""
    memory.sum()
