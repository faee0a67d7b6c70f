"""Which decode rows select again, decided on the host once a step for all layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Use:
    """How far a request's selection has come: the keys at its last use, and the uses so far."""

    slot: int
    seq_len: int = -1
    uses: int = 0


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence of a step.

    Attributes:
        request: what identifies its request for as long as that lives; None keeps nothing.
        seq_len: keys including those of this step.
        decoding: this step is one decode row, and not the end of a prompt.
        prefilling: its rows are of a prompt.
    """

    request: Hashable | None
    seq_len: int
    decoding: bool
    prefilling: bool = False


class RefreshSchedule:
    """Which decode rows select again: a selection serves `refresh_interval` rows of its request.

    Rows have to follow each other: a request that was set back, preempted or resumed selects again,
    and so does a request after rows that were not decode rows. With an interval of 1 nothing is
    kept.

    Args:
        num_slots: maximum number of requests that are alive at a time.
        refresh_interval: decode steps that share one selection.
    """

    def __init__(self, num_slots: int, refresh_interval: int) -> None:
        self.refresh_interval = refresh_interval
        self._free = list(range(num_slots - 1, -1, -1))
        self._uses: dict[Hashable, _Use] = {}

    @property
    def num_alive(self) -> int:
        """Requests that hold a selection."""
        return len(self._uses)

    def forget(self, requests: Iterable[Hashable]) -> None:
        """Ends the state of requests that finished, were aborted, preempted or resumed."""
        for request in requests:
            use = self._uses.pop(request, None)
            if use is not None:
                self._free.append(use.slot)

    def reordered(self, order: Sequence[int]) -> RefreshSchedule:
        """The schedule of a batch whose sequence i, in slot i, was sequence `order[i]`."""
        new = RefreshSchedule(len(order), self.refresh_interval)
        for i, source in enumerate(order):
            if (use := self._uses.get(source)) is not None:
                new._uses[i] = _Use(i, use.seq_len, use.uses)
                new._free.remove(i)
        return new

    def step(self, sequences: Sequence[SequenceStep]) -> list[tuple[int, bool]]:
        """For every sequence its slot (-1: none) and whether it selects again."""
        new = sum(s.decoding and s.request not in self._uses for s in sequences)
        if new > len(self._free):  # requests that wait give way to those that run
            self.forget(set(self._uses) - {sequence.request for sequence in sequences})
        return [self._advance(sequence) for sequence in sequences]

    def _advance(self, sequence: SequenceStep) -> tuple[int, bool]:
        if self.refresh_interval == 1:
            return -1, True
        if not sequence.decoding or sequence.request is None:
            self.forget([sequence.request])
            return -1, True
        use = self._uses.get(sequence.request)
        if use is None:
            if not self._free:
                return -1, True
            use = self._uses[sequence.request] = _Use(self._free.pop())
        fresh = use.seq_len + 1 != sequence.seq_len or use.uses >= self.refresh_interval
        use.seq_len = sequence.seq_len
        use.uses = 1 if fresh else use.uses + 1
        return use.slot, fresh
