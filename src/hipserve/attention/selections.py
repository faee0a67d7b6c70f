"""The selections of one layer, which later decode steps may use again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops import refresh_blocks, select_blocks
from hipserve.plan import (
    BatchLayout,
    CapturedPlan,
    PruningRule,
    RefreshSchedule,
    SequenceStep,
    StepPlan,
)
from hipserve.types import BlockSelection, KeyIndex


class Selections(Protocol):
    """What an `AttentionLayer` asks for the selection of a step."""

    def select(
        self, q: Tensor, index: KeyIndex, layout: BatchLayout, rule: PruningRule, search: Search
    ) -> BlockSelection:
        """One entry for every query block of `layout`: made now, or kept from an earlier step.

        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences.
        """
        ...

    def clear(self) -> None:
        """Nothing is kept: a step read every key."""
        ...


@dataclass(frozen=True, slots=True)
class Search:
    """How a layer searches.

    Attributes:
        config, backend: with which configuration, on which backend.
        rope: `[2, head_dim]` int32 of a config that streams, as in `select_blocks`.
    """

    config: HiPConfig
    backend: str = "auto"
    rope: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For `select_blocks`."""
        return {"config": self.config, "backend": self.backend, "rope": self.rope}


@dataclass(slots=True)
class RequestSelections:
    """The selections of one layer, one a slot.

    Attributes:
        num_slots: maximum number of requests that are alive at a time.
        indices: `[num_slots + 1, heads, max_selected]` int32, made by `allocate` or with the first
            selection; the last slot belongs to no request.
        window_start: `[num_slots + 1]` int32.
    """

    num_slots: int
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    window_start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def select(
        self,
        q: Tensor,
        index: KeyIndex,
        plan: StepPlan | CapturedPlan,
        search: Search,
    ) -> BlockSelection:
        """The selection of every query block: made now, or kept from an earlier decode step.

        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences.
        """
        if isinstance(plan, CapturedPlan):
            return self._select_captured(q, index, plan, search)
        options: dict[str, Any] = {**search.options, "rule": plan.rule}
        if plan.fresh is None:
            selection = select_blocks(q, index, plan.layout, check=False, **options)
        elif len(plan.fresh) == 0:
            return self._kept(plan.kept_slots)
        else:
            layout = plan.layout.only(plan.rule.query_block_size, plan.fresh)
            made = select_blocks(q, index, layout, check=False, **options)
            selection = self._joined(made, plan)
        if len(plan.stored):
            self._store(selection, plan)
        return selection

    def _select_captured(
        self, q: Tensor, index: KeyIndex, plan: CapturedPlan, search: Search
    ) -> BlockSelection:
        """The same launches in every step: flags on the device say which rows select again."""
        options: dict[str, Any] = {**search.options, "rule": plan.rule}
        config = search.config
        if config.refresh_interval == 1:
            return select_blocks(q, index, plan.layout, check=False, **options)
        heads = index.num_kv_heads if config.share_group else q.shape[1]
        self.allocate(q.device, heads, config.max_selected)
        selection = self._kept(plan.slots)
        refresh_blocks(q, index, plan.layout, selection, plan.refresh, **options)
        self.indices[plan.slots] = selection.indices
        self.window_start[plan.slots] = selection.window_start
        return selection

    def allocate(self, device: torch.device, heads: int, max_selected: int) -> None:
        """Allocates all slots, unless that was done before."""
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

    def reordered(self, order: Tensor) -> RequestSelections:
        """Slot i continues what was slot `order[i]`; order: `[batch]` int64."""
        if not self.indices.numel():
            return RequestSelections(len(order))
        slots = torch.cat([order.to(self.indices.device), order.new_tensor([-1])])
        return RequestSelections(len(order), self.indices[slots], self.window_start[slots])

    def _store(self, selection: BlockSelection, plan: StepPlan) -> None:
        self.allocate(selection.indices.device, *selection.indices.shape[1:])
        self.indices[plan.stored_slots] = selection.indices[plan.stored]
        self.window_start[plan.stored_slots] = selection.window_start[plan.stored]


@dataclass(frozen=True, slots=True)
class StepSelections:
    """The selections of requests in one step whose plan an engine made: `Selections`."""

    requests: RequestSelections
    plan: StepPlan | CapturedPlan

    def select(
        self,
        q: Tensor,
        index: KeyIndex,
        layout: BatchLayout,  # noqa: ARG002
        rule: PruningRule,  # noqa: ARG002
        search: Search,
    ) -> BlockSelection:
        """As `Selections.select`, with the plan's layout and rule.

        q: `[num_tokens, num_q_heads, head_dim]`.
        """
        return self.requests.select(q, index, self.plan, search)

    def clear(self) -> None:
        """Nothing to do: the engine's schedule forgets requests."""


class SelectionReuse:
    """The selections of a batch of sequences that decode together: `Selections`.

    Sequence i is row i of every decode step and holds slot i. `clear` it when a sequence is
    replaced, truncated or resumed.

    Attributes:
        selection: what the last decode step read; None after any other step.
    """

    def __init__(self) -> None:
        self.selection: BlockSelection | None = None
        self._config: HiPConfig | None = None
        self._schedule = RefreshSchedule(0, 1)
        self._slots = RequestSelections(0)

    def clear(self) -> None:
        """Every sequence selects again in its next step, which makes new slots."""
        self.selection = self._config = None

    def reorder(self, order: Tensor) -> None:
        """Follows a batch whose row i continues the former row `order[i]` (beam search).

        order: `[batch]` int64.
        """
        if self.selection is not None:
            self.selection = self.selection.rows(order)
            self._schedule = self._schedule.reordered(order.tolist())
            self._slots = self._slots.reordered(order)

    def select(
        self, q: Tensor, index: KeyIndex, layout: BatchLayout, rule: PruningRule, search: Search
    ) -> BlockSelection:
        """As `Selections.select`; only steps of one row a sequence keep their selection.

        q: `[num_tokens, num_q_heads, head_dim]`.
        """
        decodes = layout.decodes(q.shape[0])
        if not decodes:
            self.clear()
        decisions = self._decide(layout, search.config) if decodes else None
        plan = StepPlan.make(layout, rule, decisions)
        if self.selection is not None and plan.fresh is not None and len(plan.fresh) == 0:
            return self.selection  # every sequence keeps what it read last
        selection = self._slots.select(q, index, plan, search)
        self.selection = selection if decodes else None
        return selection

    def _decide(self, layout: BatchLayout, config: HiPConfig) -> list[tuple[int, bool]] | None:
        """For every sequence its slot and whether it selects again; None where nothing is kept.

        A selection serves the configuration that it was made with, and no other.
        """
        if config.refresh_interval == 1:
            return None
        batch = layout.num_seqs
        if self._slots.num_slots != batch or self._config != config:
            self._config = config
            self._schedule = RefreshSchedule(batch, config.refresh_interval)
            self._slots = RequestSelections(batch)
        seq_lens = layout.lengths[0] if layout.lengths else layout.seq_lens.tolist()
        return self._schedule.step([SequenceStep(i, n, True) for i, n in enumerate(seq_lens)])
