"""What all layers of one step share: the batch, its rule, and which query blocks select again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hipserve.plan.layout import BatchLayout, split_rows
from hipserve.plan.rule import PruningRule


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What all layers of one step share.

    Attributes:
        layout: lengths and pages of the batch.
        rule: which of its query blocks are pruned.
        fresh: `[n]` int64, query blocks that select again; None where all of them do.
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
            return cls(
                layout, rule, fresh=None, kept=none, kept_slots=none, stored=none, stored_slots=none
            )
        blocks = layout.host_blocks(rule.query_block_size)
        of_block = [decisions[sequence] for sequence, *_ in blocks]
        fresh = [i for i, (_, is_fresh) in enumerate(of_block) if is_fresh]
        kept = [(i, slot) for i, (slot, is_fresh) in enumerate(of_block) if not is_fresh]
        stored = [(i, of_block[i][0]) for i in fresh if of_block[i][0] >= 0]

        def sent(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        def column(pairs: list[tuple[int, int]], index: int) -> Tensor:
            return sent([pair[index] for pair in pairs])

        return cls(
            layout,
            rule,
            fresh=sent(fresh) if kept else None,
            kept=column(kept, 0),
            kept_slots=column(kept, 1),
            stored=column(stored, 0),
            stored_slots=column(stored, 1),
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
    ends = [n if own else end for n, end, own in zip(rows, seq_lens, whole, strict=True)]
    host = split_rows(ends, starts, query_block_size)
    blocks = host.to(layout.seq_lens.device, non_blocking=True)
    if any(whole):
        sequence = host[:, 0].long()
        host[:, 3] += (torch.tensor(seq_lens) - torch.tensor(ends)).int()[sequence]
        sequence = sequence.to(blocks.device, non_blocking=True)
        blocks = blocks.clone()
        blocks[:, 3] = layout.seq_lens[sequence] - layout.cu_seqlens_q[sequence + 1] + blocks[:, 1]
    made = {query_block_size: blocks, ("host blocks", query_block_size): host.tolist()}
    return replace(layout, _made=made), host


class DecodeBuffers:
    """Plans of decode steps at fixed addresses, for CUDA graphs.

    At replay no Python runs between the layers: kernels read what was written here beforehand, and
    whether a row selects again is a number on the device. Rows beyond the batch are padding; they
    have no query row and share the last slot, which belongs to no request.

    Args:
        num_slots: maximum number of requests that are alive at a time, and of rows of a step.
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
            self.decide(decisions, rows)
        made = {rule.query_block_size: blocks, rule: window_starts}
        layout = replace(layout, lengths=None, _made=made)
        return CapturedPlan(layout, rule, slots, refresh)

    def decide(self, decisions: Sequence[tuple[int, bool]], rows: int) -> None:
        """Writes which of the next step's `rows` select again; those without a decision do not."""
        real, slots, refresh = len(decisions), self.slots[:rows], self.refresh[:rows]
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
        refresh: `[num_seqs]` int32, 1 where a row selects again.
    """

    layout: BatchLayout
    rule: PruningRule
    slots: Tensor
    refresh: Tensor
