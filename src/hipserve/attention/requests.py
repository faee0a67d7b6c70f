"""Selections that belong to requests: an engine's batch changes its rows from step to step.

Every request has a slot, and every layer keeps one selection a slot. A `RefreshSchedule` decides on
the host, once a step for all layers, which rows select afresh; a `StepPlan` carries the decision.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops import refresh_blocks, select_blocks
from hipserve.plan import BatchLayout, PruningRule
from hipserve.plan.layout import split_rows
from hipserve.types import BlockSelection, PagedKV


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
    """Which decode rows select afresh: a selection serves `refresh_interval` rows of its request.

    Rows have to follow each other: a request that was set back, preempted or resumed starts afresh,
    and so does a request after rows that were not decode rows. With an interval of 1 nobody keeps
    anything.

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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What all layers of one step share.

    Attributes:
        layout: lengths and pages of the batch.
        rule: which of its query blocks are pruned.
        fresh: `[n]` int64, query blocks that select afresh; None where all of them do.
        kept, kept_slots: `[m]` int64, query blocks that use the selection of a slot again.
        stored, stored_slots: `[s]` int64, fresh query blocks whose selection a slot keeps.
    """

    layout: BatchLayout
    rule: PruningRule
    fresh: Tensor | None
    kept: Tensor
    kept_slots: Tensor
    stored: Tensor
    stored_slots: Tensor

    @classmethod
    def make(
        cls,
        layout: BatchLayout,
        rule: PruningRule,
        decisions: Sequence[tuple[int, bool]] | None = None,
    ) -> StepPlan:
        """The plan for `RefreshSchedule.step`'s decisions, one for every sequence of `layout`.

        Without decisions every query block selects, and nothing is kept.
        """
        device = layout.seq_lens.device
        if decisions is None or all(decision == (-1, True) for decision in decisions):
            none = torch.empty(0, dtype=torch.int64, device=device)
            return cls(layout, rule, None, none, none, none, none)
        sequences: list[int] = layout.query_blocks(rule.query_block_size)[:, 0].tolist()
        of_block = [decisions[sequence] for sequence in sequences]
        fresh = [i for i, (_, is_fresh) in enumerate(of_block) if is_fresh]
        kept = [(i, slot) for i, (slot, is_fresh) in enumerate(of_block) if not is_fresh]
        stored = [(i, of_block[i][0]) for i in fresh if of_block[i][0] >= 0]

        def column(pairs: list[tuple[int, int]], index: int) -> Tensor:
            return torch.tensor([pair[index] for pair in pairs], dtype=torch.int64, device=device)

        return cls(
            layout,
            rule,
            torch.tensor(fresh, dtype=torch.int64, device=device) if kept else None,
            column(kept, 0),
            column(kept, 1),
            column(stored, 0),
            column(stored, 1),
        )


def split_batch(
    layout: BatchLayout, query_block_size: int, whole: Sequence[bool] | None = None
) -> tuple[BatchLayout, Tensor]:
    """Query blocks of a batch whose lengths the host knows, without waiting for the device.

    With speculative decoding the host knows how many rows verify drafts, but where they lie only
    the device knows.

    Args:
        layout: with `lengths`; those of sequences in `whole` may be too long.
        whole: sequences that are split from their first row on, wherever that lies, and whose
            positions are read on the device.

    Returns:
        the layout with its blocks `[num_query_blocks, 4]`, and these on the host, at the positions
        that the host knows.
    """
    assert layout.lengths is not None
    seq_lens, starts = layout.lengths
    rows = [end - begin for begin, end in itertools.pairwise(starts)]
    whole = whole or [False] * len(rows)
    ends = [n if alone else end for n, end, alone in zip(rows, seq_lens, whole, strict=True)]
    host = split_rows(ends, starts, query_block_size)
    blocks = host.to(layout.seq_lens.device, non_blocking=True)
    if any(whole):
        sequence = host[:, 0].long()
        host[:, 3] += (torch.tensor(seq_lens) - torch.tensor(ends)).int()[sequence]
        sequence = sequence.to(blocks.device, non_blocking=True)
        blocks = blocks.clone()
        blocks[:, 3] = layout.seq_lens[sequence] - layout.cu_seqlens_q[sequence + 1] + blocks[:, 1]
    return replace(layout, _made={query_block_size: blocks}), host


class DecodeBuffers:
    """Plans of decode steps at fixed addresses, for CUDA graphs.

    At replay no Python runs between the layers: kernels read what was written here beforehand, and
    whether a row selects afresh is a number on the device. Rows beyond the batch are padding; they
    have no query row and share the last slot, which belongs to nobody.

    Args:
        num_slots: most requests that are alive at a time, and most rows of a step.
        device: where the kernels run.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.query_blocks = torch.zeros(num_slots, 4, dtype=torch.int32, device=device)
        self.query_blocks[:, 0] = torch.arange(num_slots)
        self.window_starts = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.slots = torch.full((num_slots,), num_slots, dtype=torch.int64, device=device)
        self.refresh = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def plan(
        self,
        layout: BatchLayout,
        rule: PruningRule,
        decisions: Sequence[tuple[int, bool]] | None = None,
    ) -> CapturedPlan:
        """Writes a step of as many rows for every sequence, which are one query block of it.

        Nothing is allocated on the device, nothing waits. Lengths are read on the device, where
        they are exact. `decisions` covers the real sequences; without them all select.
        """
        rows = layout.num_seqs
        blocks, slots, refresh = (x[:rows] for x in (self.query_blocks, self.slots, self.refresh))
        starts = layout.cu_seqlens_q
        blocks[:, 1] = starts[:-1]
        blocks[:, 2] = starts[1:] - starts[:-1]
        blocks[:, 3] = layout.seq_lens - blocks[:, 2]
        window_starts = self.window_starts[:rows]
        window_starts.copy_(rule.window_start(blocks[:, 3], blocks[:, 2]))
        if decisions is not None:
            self._decide(slots, refresh, decisions)
        made = {rule.query_block_size: blocks, rule: window_starts}
        layout = replace(layout, lengths=None, _made=made)
        return CapturedPlan(layout, rule, slots, refresh)

    def _decide(
        self, slots: Tensor, refresh: Tensor, decisions: Sequence[tuple[int, bool]]
    ) -> None:
        real = len(decisions)
        own = [slot if slot >= 0 else self.num_slots for slot, _ in decisions]
        slots[:real].copy_(torch.tensor(own), non_blocking=True)
        slots[real:] = self.num_slots
        fresh = torch.tensor([is_fresh for _, is_fresh in decisions], dtype=torch.int32)
        refresh[:real].copy_(fresh, non_blocking=True)
        refresh[real:] = 0


@dataclass(frozen=True, slots=True)
class CapturedPlan:
    """What all layers of a decode step share, at addresses that stay from step to step.

    Attributes:
        layout: lengths and pages of the batch; query block i is row i.
        rule: which of its query blocks are pruned.
        slots: `[num_seqs]` int64, slot of every row's request.
        refresh: `[num_seqs]` int32, 1 where a row selects afresh.
    """

    layout: BatchLayout
    rule: PruningRule
    slots: Tensor
    refresh: Tensor


@dataclass(slots=True)
class RequestSelections:
    """The selections of one layer, one a slot.

    Attributes:
        num_slots: most requests that are alive at a time.
        indices: `[num_slots + 1, heads, max_selected]` int32, made by `allocate` or with the first
            selection; the last slot is nobody's.
        window_start: `[num_slots + 1]` int32.
    """

    num_slots: int
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    window_start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def select(
        self,
        q: Tensor,
        kv: PagedKV,
        plan: StepPlan | CapturedPlan,
        config: HiPConfig,
        backend: str = "auto",
    ) -> BlockSelection:
        """The selection of every query block: made now, or kept from an earlier decode step.

        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences.
        """
        if isinstance(plan, CapturedPlan):
            return self._select_captured(q, kv, plan, config, backend)
        options: dict[str, Any] = {"config": config, "rule": plan.rule, "backend": backend}
        if plan.fresh is None:
            selection = select_blocks(q, kv, plan.layout, check=False, **options)
        elif len(plan.fresh) == 0:
            return self._kept(plan.kept_slots)
        else:
            layout = plan.layout.only(plan.rule.query_block_size, plan.fresh)
            made = select_blocks(q, kv, layout, check=False, **options)
            selection = self._joined(made, plan)
        if len(plan.stored):
            self._store(selection, plan)
        return selection

    def _select_captured(
        self, q: Tensor, kv: PagedKV, plan: CapturedPlan, config: HiPConfig, backend: str
    ) -> BlockSelection:
        """The same launches whatever the step: flags on the device tell who selects afresh."""
        options: dict[str, Any] = {"config": config, "rule": plan.rule, "backend": backend}
        if config.refresh_interval == 1:
            return select_blocks(q, kv, plan.layout, check=False, **options)
        heads = kv.num_kv_heads if config.share_group else q.shape[1]
        self.allocate(q.device, heads, config.max_selected)
        selection = self._kept(plan.slots)
        refresh_blocks(q, kv, plan.layout, selection, plan.refresh, **options)
        self.indices[plan.slots] = selection.indices
        self.window_start[plan.slots] = selection.window_start
        return selection

    def allocate(self, device: torch.device, heads: int, max_selected: int) -> None:
        """Makes room for all slots, if there is none yet."""
        if not self.indices.numel():
            ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
            shape = (self.num_slots + 1, heads, max_selected)
            self.indices = torch.full(shape, -1, **ints)
            self.window_start = torch.zeros(self.num_slots + 1, **ints)

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
        self.allocate(selection.indices.device, *selection.indices.shape[1:])
        self.indices[plan.stored_slots] = selection.indices[plan.stored]
        self.window_start[plan.stored_slots] = selection.window_start[plan.stored]
