"""One attention layer over pages: select, reuse, attend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hipserve.attention.crossover import rule_of
from hipserve.attention.dense import attend_chosen
from hipserve.config import HiPConfig
from hipserve.ops import select_blocks
from hipserve.plan import BatchLayout, PruningRule
from hipserve.types import BlockSelection, PagedKV

COUNTED_TOGETHER = 64
"""Query blocks whose keys are counted at once: counting a decode step alone costs more than it."""


@dataclass(slots=True)
class SelectionReuse:
    """The last selection of a layer and how many decode steps have used it.

    Belongs to one batch of sequences that decode together; `clear` it when a sequence is replaced,
    truncated or resumed. Also counts the keys that rows read and those that they could have read.
    """

    selection: BlockSelection | None = None
    uses: int = 0
    _read: Tensor | float = 0.0
    _visible: Tensor | float = 0.0
    _uncounted: list[tuple[BlockSelection, Tensor, HiPConfig]] = field(
        default_factory=list[tuple[BlockSelection, Tensor, HiPConfig]]
    )
    _num_uncounted: int = 0

    @property
    def keys_read(self) -> float:
        self._count()
        return float(self._read)

    @property
    def keys_visible(self) -> float:
        self._count()
        return float(self._visible)

    def clear(self) -> None:
        self.selection, self.uses = None, 0

    def reorder(self, order: Tensor) -> None:
        """Follows a batch whose row i continues the former row `order[i]` (beam search).

        order: `[batch]` int64.
        """
        if self.selection is not None:
            taken = (self.selection.indices[order], self.selection.window_start[order])
            self.selection = BlockSelection(*taken)

    def note(
        self, selection: BlockSelection | None, layout: BatchLayout, config: HiPConfig
    ) -> None:
        """Remembers one call; selections are counted when asked for, or many steps at a time."""
        if selection is None:
            return self._add(layout.keys_visible or 0, layout.keys_visible or 0)
        if self._uncounted and not self._alike(selection, config):
            self._count()
        blocks = layout.query_blocks(config.query_block_size)
        self._uncounted.append((selection, blocks, config))
        self._num_uncounted += blocks.shape[0]
        if self._num_uncounted >= COUNTED_TOGETHER:
            self._count()

    def _alike(self, selection: BlockSelection, config: HiPConfig) -> bool:
        """It can be counted together with those that wait."""
        other, _, settings = self._uncounted[0]
        return settings == config and other.indices.shape[1:] == selection.indices.shape[1:]

    def _count(self) -> None:
        if not self._uncounted:
            return
        selections, blocks, configs = zip(*self._uncounted, strict=True)
        indices = torch.cat([selection.indices for selection in selections])
        starts = torch.cat([selection.window_start for selection in selections])
        read, visible = BlockSelection(indices, starts).keys_of(torch.cat(blocks), configs[0])
        self._add(read, visible)
        self._uncounted.clear()
        self._num_uncounted = 0

    def _add(self, read: Tensor | float, visible: Tensor | float) -> None:
        self._read, self._visible = self._read + read, self._visible + visible

    def count_dense(self, batch: int, rows: int) -> None:
        """Adds the keys of the first rows of whole sequences, which read all they may."""
        keys = batch * rows * (rows + 1) // 2
        self._add(keys, keys)

    def valid(self, layout: BatchLayout, num_tokens: int, refresh_interval: int) -> bool:
        """A decode step of the same sequences may use the selection once more."""
        decode = layout.decodes(num_tokens)
        same = self.selection is not None and self.selection.indices.shape[0] == num_tokens
        return decode and same and self.uses < refresh_interval


def attend(
    q: Tensor,
    kv: PagedKV,
    layout: BatchLayout,
    *,
    config: HiPConfig,
    rule: PruningRule | None = None,
    reuse: SelectionReuse | None = None,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """HiP attention of one layer over its pages; keys of this call are already written.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`, packed over the sequences, float.
        kv, layout, sm_scale, softcap, backend, check: as in `hipserve.ops`.
        config: what to keep.
        rule: which query blocks are pruned; that of `rule_of` if None.
        reuse: carries the selection from one decode step to the next (`config.refresh_interval`);
            a step with more than one row a sequence selects again and leaves nothing behind.

    Returns:
        out like q, and lse `[num_tokens, num_q_heads]`, as from `block_sparse_attention`.

    Raises:
        ArgumentError: a tensor or number does not fit the others.
        BackendError: the backend asked for cannot run.
    """
    rule = rule or rule_of(config, q, kv.num_kv_heads)
    selection = _select(q, kv, layout, config, rule, reuse, backend, check)
    if reuse:
        reuse.note(selection, layout, config)
    return attend_chosen(
        q,
        kv,
        layout,
        selection,
        config=config,
        sm_scale=sm_scale,
        softcap=softcap,
        backend=backend,
    )


def _select(
    q: Tensor,
    kv: PagedKV,
    layout: BatchLayout,
    config: HiPConfig,
    rule: PruningRule,
    reuse: SelectionReuse | None,
    backend: str,
    check: bool,
) -> BlockSelection | None:
    """The selection of every query block; None where all of them read everything."""
    if not layout.may_prune(rule):
        if reuse:
            reuse.clear()
        return None
    if reuse and reuse.selection and reuse.valid(layout, q.shape[0], config.refresh_interval):
        reuse.uses += 1
        return reuse.selection
    options: dict[str, Any] = {"config": config, "rule": rule, "backend": backend}
    selection = select_blocks(q, kv, layout, check=check, **options)
    if reuse:
        reuse.clear()
        if layout.decodes(q.shape[0]):
            reuse.selection, reuse.uses = selection, 1
    return selection
