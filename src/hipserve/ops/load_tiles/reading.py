"""What a step reads, as the backends of `load_tiles` take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the query blocks of a step read.

    Attributes:
        block_table: `[num_seqs, max_pages]` int32.
        query_blocks: `[num_query_blocks, 4]` int32, as from `BatchLayout.query_blocks`.
        indices: `[num_query_blocks, heads, max_selected]` int32; None where everything is read.
        window_start: `[num_query_blocks]` int32, likewise.
        num_sink_tokens, key_block_size: as in `HiPConfig`.
        max_tiles: maximum number of tiles of a query block and head.
        page_size: keys of a page.
        num_kv_heads: of the pages.
    """

    block_table: Tensor
    query_blocks: Tensor
    indices: Tensor | None
    window_start: Tensor | None
    num_sink_tokens: int
    key_block_size: int
    max_tiles: int
    page_size: int
    num_kv_heads: int

    @property
    def heads(self) -> int:
        """Lists of a query block; a KV head serves one or more of them."""
        return self.num_kv_heads if self.indices is None else self.indices.shape[1]

    @property
    def num_lists(self) -> int:
        """Lists of all query blocks."""
        return self.query_blocks.shape[0] * self.heads
