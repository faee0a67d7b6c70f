"""A cache of blocks with room for so many, step by step, and what it gives up.

All blocks of a step are in the cache while the step runs. A policy only decides which of the others
go when there is no room.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence, Set
from typing import Protocol

from hipserve.errors import ArgumentError, did_you_mean

Requests = Sequence[Sequence[int]]


class Policy(Protocol):
    """What decides which blocks go."""

    def use(self, step: int, request: Set[int], missing: Set[int]) -> None:
        """A step reads the blocks of `request`, of which `missing` were not in the cache."""
        ...

    def choose(self, candidates: Set[int], count: int) -> Set[int]:
        """`count` of the candidates, which the step does not read, to go."""
        ...


class Lru:
    """The block goes that was used longest ago."""

    def __init__(self, requests: Requests) -> None:  # noqa: ARG002
        self.last: dict[int, int] = {}

    def use(self, step: int, request: Set[int], missing: Set[int]) -> None:  # noqa: ARG002
        self.last.update(dict.fromkeys(request, step))

    def choose(self, candidates: Set[int], count: int) -> Set[int]:
        return set(heapq.nsmallest(count, candidates, key=lambda block: (self.last[block], block)))


class Frequency:
    """The block goes that was used least often, in or out of the cache; of equals the older."""

    def __init__(self, requests: Requests) -> None:  # noqa: ARG002
        self.uses, self.last = Counter[int](), dict[int, int]()

    def use(self, step: int, request: Set[int], missing: Set[int]) -> None:  # noqa: ARG002
        self.uses.update(request)
        self.last.update(dict.fromkeys(request, step))

    def choose(self, candidates: Set[int], count: int) -> Set[int]:
        order = heapq.nsmallest(
            count, candidates, key=lambda block: (self.uses[block], self.last[block], block)
        )
        return set(order)


class Clock:
    """The first block goes that was not used since the hand last passed it."""

    def __init__(self, requests: Requests) -> None:  # noqa: ARG002
        self.ring, self.used = deque[int](), set[int]()

    def use(self, step: int, request: Set[int], missing: Set[int]) -> None:  # noqa: ARG002
        self.ring.extend(sorted(missing))
        self.used |= request

    def choose(self, candidates: Set[int], count: int) -> Set[int]:
        gone = set[int]()
        while len(gone) < count:
            block = self.ring.popleft()
            if block in candidates and block not in self.used:
                gone.add(block)
                continue
            if block in candidates:
                self.used.discard(block)
            self.ring.append(block)
        return gone


class Belady:
    """The block goes whose next use is farthest: nobody can do better, and nobody can know it.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5 (1966).
    """

    def __init__(self, requests: Requests) -> None:
        self.uses: dict[int, deque[int]] = {}
        for step, request in enumerate(requests):
            for block in request:
                self.uses.setdefault(block, deque()).append(step)

    def use(self, step: int, request: Set[int], missing: Set[int]) -> None:  # noqa: ARG002
        for block in request:
            self.uses[block].popleft()

    def choose(self, candidates: Set[int], count: int) -> Set[int]:
        return set(heapq.nlargest(count, candidates, key=lambda block: (self._next(block), block)))

    def _next(self, block: int) -> float:
        return self.uses[block][0] if self.uses[block] else math.inf


POLICIES: dict[str, type[Lru | Clock | Frequency | Belady]] = {
    "lru": Lru,
    "clock": Clock,
    "frequency": Frequency,
    "belady": Belady,
}


def simulate(requests: Requests, capacity: int, policy: str) -> list[frozenset[int]]:
    """The blocks that are missing in each step, from an empty cache on.

    >>> [sorted(missing) for missing in simulate([[1, 2], [2, 3], [1, 3]], 2, "lru")]
    [[1, 2], [3], [1]]

    Raises:
        ArgumentError: no such policy, or a step reads more than `capacity` blocks.
    """
    if policy not in POLICIES:
        expected = f"one of {', '.join(POLICIES)}"
        raise ArgumentError("policy", expected, repr(policy), did_you_mean(policy, POLICIES))
    largest = max(map(len, requests), default=0)
    if largest > capacity:
        expected = f"the {largest} blocks of a step or more"
        raise ArgumentError("capacity", expected, str(capacity))
    chosen: Policy = POLICIES[policy](requests)
    resident, missed = set[int](), list[frozenset[int]]()
    for step, blocks in enumerate(requests):
        request = frozenset(blocks)
        missing = request - resident
        excess = len(resident) + len(missing) - capacity
        chosen.use(step, request, missing)
        if excess > 0:
            resident -= chosen.choose(resident - request, excess)
        resident |= missing
        missed.append(missing)
    return missed
