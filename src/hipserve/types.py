"""Small frozen records that cross rooms."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hipserve.config import HiPConfig

COARSE_RATIO = 16
"""A coarse run holds this many fine ones: 256 keys with the default `bound_block_size`; fewer in
smaller pages, but no less than a quarter of it."""

COARSE_KEEP = 6
"""Of the fine level a search scores this many times what it keeps."""


WHOLE_SEQUENCE = 8192
"""Pages from this many keys on, and those with a partial fine run, are whole sequences."""


def bound_levels(page_size: int, bound_block_size: int) -> tuple[int, ...]:
    """Run lengths, in keys, of the bound levels that a page of `page_size` keys carries.

    Coarse runs do not straddle the pages of a sequence: they divide the page, or there are none.
    Where one page is the whole sequence, the last run may be partial.
    """
    whole = page_size >= WHOLE_SEQUENCE or page_size % bound_block_size > 0
    ratio = COARSE_RATIO
    while ratio > 1 and not _holds(page_size, ratio * bound_block_size, whole):
        ratio //= 2
    coarse = (ratio * bound_block_size,) if ratio * 4 >= COARSE_RATIO else ()
    return (bound_block_size, *coarse)


def _holds(page_size: int, run: int, whole: bool) -> bool:
    return run <= page_size and (whole or page_size % run == 0)


def kept_runs(keys: int, levels: Sequence[int]) -> tuple[int, ...]:
    """How many runs of each level a search keeps that is to keep `keys` by their fine runs.

    At both ends of what is searched lie fine runs that no coarse run covers, less than one's worth
    each; they are scored as well, hence the two coarse runs less.
    """
    fine, *coarse = levels
    return (-(-keys // fine), *(max(-(-COARSE_KEEP * keys // run) - 2, 1) for run in coarse))


def bound_offsets(page_size: int, bound_block_size: int) -> tuple[int, ...]:
    """Where each level starts in the run axis of `k_bounds`; the last entry is the axis length."""
    offsets = [0]
    for length in bound_levels(page_size, bound_block_size):
        offsets.append(offsets[-1] + -(-page_size // length))
    return tuple(offsets)


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of one layer, in pages.

    Attributes:
        k_cache, v_cache: `[num_pages, page_size, num_kv_heads, head_dim]`; any strides with a
            contiguous last axis.
        k_bounds: `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`, dtype of `k_cache`:
            elementwise minimum and maximum of the keys of each run (`bound_offsets` gives the
            places of the levels), or None where no bound selector is used.
    """

    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Which rows of a packed batch belong to which sequence, and where its pages are.

    Attributes:
        block_table: `[num_seqs, max_pages]` int32, page ids of each sequence in order.
        seq_lens: `[num_seqs]` int32, keys of each sequence including those of this call.
        cu_seqlens_q: `[num_seqs + 1]` int32, where each sequence's query rows start. The rows are
            the last positions of their sequence.
        lengths: `seq_lens` and `cu_seqlens_q` as numbers, where the host knows them.
    """

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    _query_blocks: dict[Any, Tensor] = field(default_factory=dict[Any, Tensor], repr=False)
    lengths: tuple[Sequence[int], Sequence[int]] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, block_table: Tensor, seq_lens: Sequence[int], query_lens: Sequence[int]
    ) -> BatchLayout:
        """The layout of lengths that the host knows: nothing is read back from the device."""
        make = _of_lengths.__wrapped__ if torch.compiler.is_compiling() else _of_lengths
        return cls(block_table, *make(tuple(seq_lens), tuple(query_lens), block_table.device))

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def keys_visible(self) -> int | None:
        """Keys that dense attention reads for all rows, where the host knows the lengths."""
        if self.lengths is None:
            return None
        seq_lens, starts = self.lengths
        rows = [end - begin for begin, end in itertools.pairwise(starts)]
        return sum(n * (2 * end - n + 1) // 2 for n, end in zip(rows, seq_lens, strict=True))

    def decodes(self, num_tokens: int) -> bool:
        """Every sequence has one row; where the host knows no lengths, as many rows tell."""
        if self.lengths is None:
            return num_tokens == self.num_seqs
        return all(i == start for i, start in enumerate(self.lengths[1]))

    def may_prune(self, config: HiPConfig) -> bool:
        """False only where the host knows that every query block reads all of its keys."""
        if self.lengths is None:
            return True
        seq_lens, starts = self.lengths
        rows = (end - begin for begin, end in itertools.pairwise(starts))
        return any(config.may_prune(n, r) for n, r in zip(seq_lens, rows, strict=True) if r)

    def query_blocks(self, query_block_size: int) -> Tensor:
        """`[num_query_blocks, 4]` int32: sequence, first row, number of rows, first position.

        Blocks are aligned on absolute positions, so that a prompt cut into chunks at multiples of
        `query_block_size` has the same blocks as the whole.
        """
        if query_block_size not in self._query_blocks:
            lengths = self.lengths or (self.seq_lens.tolist(), self.cu_seqlens_q.tolist())
            blocks = split_rows(*lengths, query_block_size)
            self._query_blocks[query_block_size] = blocks.to(self.seq_lens.device)
        return self._query_blocks[query_block_size]

    def behind(self, position: int, query_block_size: int) -> BatchLayout:
        """The same batch without the query blocks that start before `position`."""
        key = (query_block_size, position)
        if key not in self._query_blocks:
            blocks = self.query_blocks(query_block_size)
            self._query_blocks[key] = blocks[blocks[:, 3] >= position]
        blocks = {query_block_size: self._query_blocks[key]}
        parts = (self.block_table, self.seq_lens, self.cu_seqlens_q)
        return BatchLayout(*parts, blocks, self.lengths)

    def only(self, query_block_size: int, chosen: Tensor) -> BatchLayout:
        """The same batch, of which `select_blocks` sees only some query blocks.

        chosen: `[num_chosen]` int64, indices of query blocks.
        """
        blocks = self.query_blocks(query_block_size)[chosen]
        parts = (self.block_table, self.seq_lens, self.cu_seqlens_q)
        return BatchLayout(*parts, {query_block_size: blocks})


@functools.lru_cache(16)
def _of_lengths(
    seq_lens: tuple[int, ...], query_lens: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, dict[int, Tensor], tuple[Sequence[int], Sequence[int]]]:
    """What a layout has besides its pages: all layers of a step share it."""
    starts = (0, *itertools.accumulate(query_lens))
    ends, begins = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in (seq_lens, starts)
    )
    return ends, begins, {}, (seq_lens, starts)


def split_rows(seq_lens: Sequence[int], starts: Sequence[int], size: int) -> Tensor:
    """`BatchLayout.query_blocks`, `[num_query_blocks, 4]` int32 on the CPU, of known lengths."""
    blocks: list[list[int]] = []
    for seq, (seq_len, begin, end) in enumerate(
        zip(seq_lens, starts[:-1], starts[1:], strict=True)
    ):
        first = seq_len - (end - begin)
        position = first
        while position < seq_len:
            stop = min((position // size + 1) * size, seq_len)
            blocks.append([seq, begin + position - first, stop - position, position])
            position = stop
    return torch.tensor(blocks, dtype=torch.int32).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """What each query block reads between the sinks and its window.

    Attributes:
        indices: `[num_query_blocks, heads, max_selected]` int32, key-block indices ascending, then
            -1 to the end; `heads` is `num_kv_heads`, or `num_q_heads` without `share_group`.
        window_start: `[num_query_blocks]` int32, first key of the contiguous window. It belongs to
            the selection: reused in later decode steps, the window grows from here, so that no key
            falls between selection and window.
    """

    indices: Tensor
    window_start: Tensor

    def keys_read(self, layout: BatchLayout, config: HiPConfig) -> tuple[Tensor, Tensor]:
        """Keys that all rows read, mean over heads, and keys that dense attention would read.

        Both are `[]` float64 on the device of `indices`. `layout` is the batch of this call,
        which may be later than the one that the selection was made for.
        """
        return self.keys_of(layout.query_blocks(config.query_block_size), config)

    def keys_of(self, query_blocks: Tensor, config: HiPConfig) -> tuple[Tensor, Tensor]:
        """`keys_read` of the rows of some blocks, one for each of the selection's.

        query_blocks: `[num_query_blocks, 4]`, as from `BatchLayout.query_blocks`.
        """
        blocks = query_blocks.double()
        rows, position = blocks[:, 2], blocks[:, 3]
        chosen = (self.indices >= 0).sum((1, 2), dtype=torch.float64)
        chosen *= config.key_block_size / self.indices.shape[1]
        left = (self.window_start - config.num_sink_tokens).clamp(min=0) - chosen
        dense = (rows * (position + (rows + 1) / 2)).sum()
        return dense - rows @ left, dense
