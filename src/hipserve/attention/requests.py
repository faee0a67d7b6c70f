"""Selections that belong to requests: an engine's batch changes its rows from step to step.

Every request has a slot, and every layer keeps one selection a slot. A `RefreshSchedule` decides on
the host, once a step for all layers, which rows select afresh; a `StepPlan` carries the decision.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops import select_blocks
from hipserve.types import BatchLayout, BlockSelection, PagedKV


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
    """

    request: Hashable | None
    seq_len: int
    decoding: bool


class RefreshSchedule:
    """Which decode rows select afresh: a selection serves `refresh_interval` rows of its request.

    Rows have to follow each other: a request that was set back, preempted or resumed starts afresh,
    and so does a request after rows that were not decode rows.

    Args:
        num_slots: most requests that are alive at a time.
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

    def step(self, sequences: Sequence[SequenceStep]) -> list[tuple[int, bool]]:
        """For every sequence its slot (-1: none) and whether it selects afresh."""
        if len(sequences) > len(self._free):  # requests that wait give way to those that run
            self.forget(set(self._uses) - {sequence.request for sequence in sequences})
        return [self._advance(sequence) for sequence in sequences]

    def _advance(self, sequence: SequenceStep) -> tuple[int, bool]:
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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What all layers of one step share.

    Attributes:
        layout: lengths and pages of the batch.
        fresh: `[n]` int64, query blocks that select afresh; None where all of them do.
        kept, kept_slots: `[m]` int64, query blocks that use the selection of a slot again.
        stored, stored_slots: `[s]` int64, fresh query blocks whose selection a slot keeps.
    """

    layout: BatchLayout
    fresh: Tensor | None
    kept: Tensor
    kept_slots: Tensor
    stored: Tensor
    stored_slots: Tensor

    @classmethod
    def make(
        cls,
        layout: BatchLayout,
        query_block_size: int,
        decisions: Sequence[tuple[int, bool]],
    ) -> StepPlan:
        """The plan for `RefreshSchedule.step`'s decisions, one for every sequence of `layout`."""
        device = layout.seq_lens.device
        sequences: list[int] = layout.query_blocks(query_block_size)[:, 0].tolist()
        of_block = [decisions[sequence] for sequence in sequences]
        fresh = [i for i, (_, is_fresh) in enumerate(of_block) if is_fresh]
        kept = [(i, slot) for i, (slot, is_fresh) in enumerate(of_block) if not is_fresh]
        stored = [(i, of_block[i][0]) for i in fresh if of_block[i][0] >= 0]

        def column(pairs: list[tuple[int, int]], index: int) -> Tensor:
            return torch.tensor([pair[index] for pair in pairs], dtype=torch.int64, device=device)

        return cls(
            layout,
            torch.tensor(fresh, dtype=torch.int64, device=device) if kept else None,
            column(kept, 0),
            column(kept, 1),
            column(stored, 0),
            column(stored, 1),
        )


@dataclass(slots=True)
class RequestSelections:
    """The selections of one layer, one a slot.

    Attributes:
        num_slots: most requests that are alive at a time.
        indices: `[num_slots, heads, max_selected]` int32, allocated with the first selection.
        window_start: `[num_slots]` int32.
    """

    num_slots: int
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    window_start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def select(
        self, q: Tensor, kv: PagedKV, plan: StepPlan, config: HiPConfig, backend: str = "auto"
    ) -> BlockSelection:
        """The selection of every query block: made now, or kept from an earlier decode step."""
        size = config.query_block_size
        if plan.fresh is None:
            selection = select_blocks(
                q, kv, plan.layout, config=config, backend=backend, check=False
            )
        elif len(plan.fresh) == 0:
            return self._kept(plan.kept_slots)
        else:
            layout = plan.layout.only(size, plan.fresh)
            made = select_blocks(q, kv, layout, config=config, backend=backend, check=False)
            selection = self._joined(made, plan)
        if len(plan.stored):
            self._store(selection, plan)
        return selection

    def _kept(self, slots: Tensor) -> BlockSelection:
        return BlockSelection(self.indices[slots], self.window_start[slots])

    def _joined(self, made: BlockSelection, plan: StepPlan) -> BlockSelection:
        assert plan.fresh is not None
        kept, count = self._kept(plan.kept_slots), len(plan.fresh) + len(plan.kept)
        indices = made.indices.new_empty((count, *made.indices.shape[1:]))
        window_start = made.window_start.new_empty(count)
        for rows, part in ((plan.fresh, made), (plan.kept, kept)):
            indices[rows], window_start[rows] = part.indices, part.window_start
        return BlockSelection(indices, window_start)

    def _store(self, selection: BlockSelection, plan: StepPlan) -> None:
        if not self.indices.numel():
            shape = (self.num_slots, *selection.indices.shape[1:])
            self.indices = selection.indices.new_empty(shape)
            self.window_start = selection.window_start.new_empty(self.num_slots)
        self.indices[plan.stored_slots] = selection.indices[plan.stored]
        self.window_start[plan.stored_slots] = selection.window_start[plan.stored]
