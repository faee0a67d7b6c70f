"""How many keys were read, and how many dense attention would have read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection

COUNTED_TOGETHER = 64
"""Count in batches of this many query blocks: counting one decode step costs more than the step."""


class _Uncounted(NamedTuple):
    """A selection that waits to be counted, and the query blocks `[n, 4]` that read it."""

    selection: BlockSelection
    query_blocks: Tensor
    config: HiPConfig


class KeyCounter(Protocol):
    """What an `AttentionLayer` reports of each call."""

    def add(self, selection: BlockSelection | None, layout: BatchLayout, config: HiPConfig) -> None:
        """Adds the rows of one call; without a selection they read everything."""
        ...

    def add_dense(self, batch: int, rows: int) -> None:
        """Adds the first `rows` rows of `batch` whole sequences, which read every visible key."""
        ...

    def add_seconds(self, search: float, attention: float) -> None:
        """Adds host time: of a CPU what the call took, of a GPU what its launches took."""
        ...


@dataclass(slots=True)
class Account:
    """Counts the keys that the rows of one layer read, without waiting for the device."""

    _read: Tensor | float = 0.0
    _visible: Tensor | float = 0.0
    _uncounted: list[_Uncounted] = field(default_factory=list[_Uncounted])
    _num_uncounted: int = 0

    @property
    def keys_read(self) -> float:
        """Keys that rows read, mean over heads."""
        self._count()
        return float(self._read)

    @property
    def keys_visible(self) -> float:
        """Keys that dense attention would have read for the same rows."""
        self._count()
        return float(self._visible)

    def add(self, selection: BlockSelection | None, layout: BatchLayout, config: HiPConfig) -> None:
        """As `KeyCounter.add`."""
        if selection is None:
            return self._add(layout.keys_visible or 0, layout.keys_visible or 0)
        entry = _Uncounted(selection, layout.query_blocks(config.query_block_size), config)
        if self._uncounted and not self._counts_with(entry):
            self._count()
        self._uncounted.append(entry)
        self._num_uncounted += entry.query_blocks.shape[0]
        if self._num_uncounted >= COUNTED_TOGETHER:
            self._count()

    def add_dense(self, batch: int, rows: int) -> None:
        """As `KeyCounter.add_dense`."""
        keys = batch * rows * (rows + 1) // 2
        self._add(keys, keys)

    def add_seconds(self, search: float, attention: float) -> None:
        """Does nothing: time is not kept."""

    def _counts_with(self, entry: _Uncounted) -> bool:
        """It can be counted together with those that wait."""
        other, shape = self._uncounted[0], entry.selection.indices.shape[1:]
        return other.config == entry.config and other.selection.indices.shape[1:] == shape

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
