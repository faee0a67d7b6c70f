"""One layer's part of a KV block: its keys and values, and the bounds of the keys behind them.

Bounds lie in the padding at the end of a block, so that vLLM's block manager counts, shares and
frees them with their keys. They are a cache of the keys: whatever else vLLM does to blocks (copies,
connectors, tiers) moves keys only, and `remake_bounds` makes the bounds of keys that a request did
not write itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hipserve.ops import compute_bounds
from hipserve.plan import runs_of_pages
from hipserve.types import PagedKV

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from hipserve.config import HiPConfig

CACHE_LINE = 64

COPY_BYTES = 64 << 20
"""Keys that are copied at a time while the bounds of found blocks are made."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Sizes of one layer's part of a KV block: rows of keys and values, then bounds of its runs.

    A row holds the keys and then the values of one token and head, as vLLM's GPU backends have it.
    """

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    bound_block_size: int | None

    @classmethod
    def of(cls, spec: AttentionSpec, config: HiPConfig) -> BlockLayout:
        """The layout of a layer that may be pruned."""
        bounds = config.bound_block_size if config.uses_bounds else None
        return cls(spec.block_size, spec.num_kv_heads, spec.head_size, spec.dtype, bounds)

    @property
    def num_runs(self) -> int:
        if self.bound_block_size is None:
            return 0
        return runs_of_pages(self.block_size, self.bound_block_size)

    @property
    def row(self) -> int:
        """Elements of one token's keys and values, and likewise of one run's bounds."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def bound_bytes(self) -> int:
        size = self.num_runs * self.row * self.dtype.itemsize
        return -(-size // CACHE_LINE) * CACHE_LINE

    @property
    def padded_bytes(self) -> int:
        return self.block_size * self.row * self.dtype.itemsize + self.bound_bytes


def pages_of(kv_cache: Tensor, bound_block_size: int | None) -> PagedKV:
    """`page_views` that are made once for a tensor.

    They are kept on the tensor itself: they hold its storage, which has to go with the tensor when
    vLLM measures CUDA graphs, or an engine stops.
    """
    known: tuple[int | None, PagedKV] | None = getattr(kv_cache, "hipserve_pages", None)
    if known is None or known[0] != bound_block_size:
        known = (bound_block_size, page_views(kv_cache, bound_block_size))
        kv_cache.hipserve_pages = known  # type: ignore[attr-defined]
    return known[1]


def page_views(kv_cache: Tensor, bound_block_size: int | None) -> PagedKV:
    """Keys, values and bounds inside a layer's KV blocks, without copying.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_dim]`, vLLM's.
        bound_block_size: keys of the finest run, or None where no bounds are kept.
    """
    blocks, heads, size, content = kv_cache.shape
    dim, (stride, head, token, _) = content // 2, kv_cache.stride()

    def view(start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """Holds the storage only: a view by `as_strided` would hold the tensor that keeps it."""
        offset = kv_cache.storage_offset() + start
        return kv_cache.new_empty(0).set_(kv_cache.untyped_storage(), offset, shape, strides)

    rows = (blocks, size, heads, dim), (stride, token, head, 1)
    k_cache, v_cache = view(0, *rows), view(dim, *rows)
    if bound_block_size is None:
        return PagedKV(k_cache, v_cache)
    runs = runs_of_pages(size, bound_block_size)
    boxes = (blocks, runs, heads, 2, dim), (stride, content, runs * content, dim, 1)
    return PagedKV(k_cache, v_cache, view(size * heads * content, *boxes))


def remake_bounds(kv: PagedKV, pages: Tensor, bound_block_size: int) -> None:
    """Makes the bounds of whole pages from the keys that they hold, reading each key once.

    Runs behind the last key of a page get bounds of what lies there: nobody reads them before
    `write_kv` makes them again.

    Args:
        pages: `[n]` int64, page ids.
    """
    assert kv.k_bounds is not None
    page_bytes = kv.k_cache[0].numel() * kv.k_cache.element_size()
    for part in pages.split(max(COPY_BYTES // page_bytes, 1)):
        keys = kv.k_cache[part]
        made = compute_bounds(keys, bound_block_size=bound_block_size)
        kv.k_bounds[part] = made[:, : kv.k_bounds.shape[1]]  # fine runs come first
