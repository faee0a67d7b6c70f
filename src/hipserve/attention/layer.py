"""One attention layer over pages: select, reuse, attend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops import block_sparse_attention, select_blocks
from hipserve.types import BatchLayout, BlockSelection, PagedKV


@dataclass(slots=True)
class SelectionReuse:
    """The last selection of a layer and how many decode steps have used it.

    Belongs to one batch of sequences that decode together; `clear` it when a sequence is replaced,
    truncated or resumed. Also counts the keys that rows read and those that they could have read.
    """

    selection: BlockSelection | None = None
    uses: int = 0
    keys_read: Tensor | float = 0.0
    keys_visible: Tensor | float = 0.0
    _counted: tuple[Tensor, Tensor] | None = None

    def clear(self) -> None:
        self.selection, self.uses = None, 0

    def reorder(self, order: Tensor) -> None:
        """Follows a batch whose row i continues the former row `order[i]` (beam search)."""
        if self.selection is not None:
            taken = (self.selection.indices[order], self.selection.window_start[order])
            self.selection = BlockSelection(*taken)

    def count(
        self, selection: BlockSelection | None, layout: BatchLayout, config: HiPConfig
    ) -> None:
        """Adds the keys of one call; a step that reuses a selection reads one key more a row."""
        if selection is None:
            read = visible = float(layout.keys_visible or 0)
        elif self._counted is not None and selection is self.selection and self.uses > 1:
            read, visible = (keys + layout.num_seqs for keys in self._counted)
            self._counted = (read, visible)
        else:
            read, visible = self._counted = selection.keys_read(layout, config)
        self.keys_read, self.keys_visible = self.keys_read + read, self.keys_visible + visible

    def count_dense(self, batch: int, rows: int) -> None:
        """Adds the keys of the first rows of whole sequences, which read all they may."""
        keys = batch * rows * (rows + 1) // 2
        self.keys_read, self.keys_visible = self.keys_read + keys, self.keys_visible + keys

    def valid(self, layout: BatchLayout, num_tokens: int, refresh_interval: int) -> bool:
        """A decode step of the same sequences may use the selection once more."""
        decode = num_tokens == layout.num_seqs
        same = self.selection is not None and self.selection.indices.shape[0] == num_tokens
        return decode and same and self.uses < refresh_interval


def attend(
    q: Tensor,
    kv: PagedKV,
    layout: BatchLayout,
    *,
    config: HiPConfig,
    reuse: SelectionReuse | None = None,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """HiP attention of one layer over its pages; keys of this call are already written.

    Shapes and errors as in `hipserve.ops`. `reuse` carries the selection from one decode step to
    the next (`config.refresh_interval`); a step with more than one row a sequence selects afresh
    and leaves nothing behind.
    """
    config = config.on(q.device.type)
    selection = _select(q, kv, layout, config, reuse, backend, check)
    if reuse:
        reuse.count(selection, layout, config)
    return block_sparse_attention(
        q,
        kv,
        layout,
        selection,
        config=config,
        sm_scale=sm_scale,
        softcap=softcap,
        backend=backend,
        check=False,
    )


def _select(
    q: Tensor,
    kv: PagedKV,
    layout: BatchLayout,
    config: HiPConfig,
    reuse: SelectionReuse | None,
    backend: str,
    check: bool,
) -> BlockSelection | None:
    """The selection of every query block; None where all of them read everything."""
    if not layout.may_prune(config):
        if reuse:
            reuse.clear()
        return None
    if reuse and reuse.selection and reuse.valid(layout, q.shape[0], config.refresh_interval):
        reuse.uses += 1
        return reuse.selection
    selection = select_blocks(q, kv, layout, config=config, backend=backend, check=check)
    if reuse:
        reuse.clear()
        if q.shape[0] == layout.num_seqs:
            reuse.selection, reuse.uses = selection, 1
    return selection
