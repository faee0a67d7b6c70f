"""Small frozen records that cross rooms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.plan import BatchLayout


@dataclass(frozen=True, slots=True)
class KeyPool:
    """The exact keys and values of one layer, in pages: what attention reads.

    Attributes:
        k_cache, v_cache: `[num_pages, page_size, num_kv_heads, head_dim]`; any strides with a
            contiguous last axis.
    """

    k_cache: Tensor
    v_cache: Tensor

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
class KeyIndex:
    """What a search reads of one layer's keys, in the same pages as the keys.

    An index describes keys and does not own them: a search never touches a `KeyPool`.

    Attributes:
        codes: `[num_pages, page_size, num_kv_heads, head_dim]`: a code of every key, which orders
            the candidates of a search. With 16 bits the key itself: the pool's `k_cache`; with 4 or
            8 bits int8, and head_dim * code_bits / 8 bytes instead of head_dim numbers
            (`hipserve.ops.codes`).
        summaries: `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`: mean and standard
            deviation of each run of keys (`bound_offsets` gives the places of the levels), or None
            for a search that reads none. In the dtype of the keys; int8 codes beside short codes.
        run_size: keys of the finest run.
        code_bits: bits of a channel of a key: 4, 8 or 16.
        code_scales: `[num_pages, page_size, num_kv_heads]` bfloat16, beside short codes.
        summary_scales: `[num_pages, runs_per_page, num_kv_heads, 2]` bfloat16, likewise.
    """

    codes: Tensor
    summaries: Tensor | None = None
    run_size: int = 16
    code_bits: int = 16
    code_scales: Tensor | None = None
    summary_scales: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.codes.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        width = self.codes.shape[3]
        return width if self.code_scales is None else width * 8 // self.code_bits

    @property
    def num_runs(self) -> int:
        """Runs of a page that have a summary."""
        return 0 if self.summaries is None else self.summaries.shape[1]

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Short codes and their scales, summaries and theirs, `[num_pages, ...]` each or None."""
        codes = None if self.code_scales is None else self.codes
        return codes, self.code_scales, self.summaries, self.summary_scales

    def tensors(self) -> list[Tensor]:
        """What an index holds beside the keys themselves: the `parts` `[num_pages, ...]` it has."""
        return [x for x in self.parts if x is not None]


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """What each query block reads between the sinks and its window.

    Attributes:
        indices: `[num_query_blocks, heads, max_selected]` int32, key-block indices ascending, then
            -1 to the end; `heads` is `num_kv_heads`, or `num_q_heads` without `share_group`.
        window_start: `[num_query_blocks]` int32, first key of the contiguous window. It belongs to
            the selection: reused in later decode steps, the window grows from here, and no key
            falls between selection and window.
    """

    indices: Tensor
    window_start: Tensor

    def rows(self, order: Tensor) -> BlockSelection:
        """Entry i is the former entry `order[i]`; order: `[n]` int64."""
        return BlockSelection(self.indices[order], self.window_start[order])

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


def __getattr__(name: str) -> object:
    if name == "PagedKV":
        raise AttributeError(
            "hipserve.types.PagedKV became KeyPool(k_cache, v_cache), which attention reads, and "
            "KeyIndex(codes, summaries, run_size), which a search reads; hipserve.ops.build_index "
            "makes the second"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
