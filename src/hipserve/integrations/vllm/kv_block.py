"""One layer's part of a KV block: its keys and values, and the index of the keys behind them.

Summaries of runs lie in the padding at the end of a block, so vLLM's block manager counts, shares
and frees them with their keys. They are a cache of the keys: whatever else vLLM does to blocks
(copies, connectors, tiers) moves keys only, and `rebuild_index` makes the summaries of keys that a
request did not write itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hipserve.ops import build_index
from hipserve.plan import runs_of_pages
from hipserve.types import KeyIndex, KeyPool

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from hipserve.config import HiPConfig

CACHE_LINE = 64

COPY_BYTES = 64 << 20
"""Keys that are copied at a time while the index of found blocks is built."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Sizes of one layer's part of a KV block: rows of keys and values, then summaries of its runs.

    A row holds the keys and then the values of one token and head, as vLLM's GPU backends have it.
    """

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    run_size: int | None

    @classmethod
    def of(cls, spec: AttentionSpec, config: HiPConfig) -> BlockLayout:
        """The layout of a layer that may be pruned."""
        shape = (spec.block_size, spec.num_kv_heads, spec.head_size)
        return cls(*shape, spec.dtype, config.run_size)

    @property
    def num_runs(self) -> int:
        if self.run_size is None:
            return 0
        return runs_of_pages(self.block_size, self.run_size)

    @property
    def row(self) -> int:
        """Elements of one token's keys and values, and likewise of one run's summary."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def index_bytes(self) -> int:
        size = self.num_runs * self.row * self.dtype.itemsize
        return -(-size // CACHE_LINE) * CACHE_LINE

    @property
    def padded_bytes(self) -> int:
        return self.block_size * self.row * self.dtype.itemsize + self.index_bytes


@dataclass(frozen=True, slots=True)
class BlockPages:
    """A layer's KV blocks as operations take them."""

    pool: KeyPool
    index: KeyIndex


def pages_of(kv_cache: Tensor, run_size: int | None) -> BlockPages:
    """`page_views` that are made once for a tensor.

    They are kept on the tensor itself: they hold its storage, which has to go with the tensor when
    vLLM measures CUDA graphs, or an engine stops.

    kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_dim]`.
    """
    known: tuple[int | None, BlockPages] | None = getattr(kv_cache, "hipserve_pages", None)
    if known is None or known[0] != run_size:
        known = (run_size, page_views(kv_cache, run_size))
        kv_cache.hipserve_pages = known  # type: ignore[attr-defined]
    return known[1]


def page_views(kv_cache: Tensor, run_size: int | None) -> BlockPages:
    """Keys, values and summaries inside a layer's KV blocks, without copying.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_dim]`, vLLM's.
        run_size: keys of the finest run, or None where no summaries are kept.
    """
    blocks, heads, size, content = kv_cache.shape
    dim, (stride, head, token, _) = content // 2, kv_cache.stride()

    def view(start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """Holds the storage only: a view by `as_strided` would hold the tensor that keeps it."""
        offset = kv_cache.storage_offset() + start
        return kv_cache.new_empty(0).set_(kv_cache.untyped_storage(), offset, shape, strides)

    rows = (blocks, size, heads, dim), (stride, token, head, 1)
    pool = KeyPool(view(0, *rows), view(dim, *rows))
    if run_size is None:
        return BlockPages(pool, KeyIndex(pool.k_cache))
    runs = runs_of_pages(size, run_size)
    shape = (blocks, runs, heads, 2, dim), (stride, content, runs * content, dim, 1)
    summaries = view(size * heads * content, *shape)
    return BlockPages(pool, KeyIndex(pool.k_cache, summaries, run_size))


def rebuild_index(index: KeyIndex, pages: Tensor) -> None:
    """Builds the index of whole pages from the keys that they hold, reading each key once.

    Runs behind the last key of a page summarise undefined keys; they are not read before `write_kv`
    computes them again.

    Args:
        pages: `[n]` int64, page ids.
    """
    assert index.summaries is not None
    page_bytes = index.codes[0].numel() * index.codes.element_size()
    for part in pages.split(max(COPY_BYTES // page_bytes, 1)):
        made = build_index(index.codes[part], run_size=index.run_size).summaries
        assert made is not None
        index.summaries[part] = made[:, : index.summaries.shape[1]]  # fine runs come first
