"""One layer's part of a KV block: its keys and values, and the index of the keys behind them.

Codes and summaries lie in the padding at the end of a block, so vLLM's block manager counts, shares
and frees them with their keys. They are a cache of the keys: whatever else vLLM does to blocks
(copies, connectors, tiers) moves keys only, and `rebuild_index` makes the index of keys that a
request did not write itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hipserve.capacity.scratch import COPY_BYTES
from hipserve.config import IndexForm
from hipserve.ops import build_index
from hipserve.ops.write_kv.join_runs import join
from hipserve.ops.write_kv.layout import IndexLayout, Rows
from hipserve.plan.parts import aligned, index_bytes
from hipserve.plan.runs import WRITTEN_LEVELS, bound_levels
from hipserve.types import KeyIndex, KeyPool

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from hipserve.config import HiPConfig


PAGE_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""What vLLM's bytes are, by its name for them; other blocks say it themselves."""


class Fp8(NamedTuple):
    """Keys and values of a layer's blocks, where these are in fp8; scales as in `KeyPool`."""

    dtype: torch.dtype
    k_scale: float
    v_scale: float


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Sizes of one layer's part of a KV block: rows of keys and values, then the index of the keys.

    A row holds the keys and then the values of one token and head, as vLLM's GPU backends have it.
    `keys` is the longest sequence, for which there are runs longer than a block.
    """

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    form: IndexForm
    keys: int = 0

    @classmethod
    def of(cls, spec: AttentionSpec, config: HiPConfig, keys: int = 0) -> BlockLayout:
        """The layout of a layer that may be pruned, for sequences of up to `keys` keys."""
        shape = (spec.block_size, spec.num_kv_heads, spec.head_size)
        dtype = PAGE_DTYPES["fp8"] if spec.dtype == torch.uint8 else spec.dtype  # all as large
        return cls(*shape, dtype, config.index_form, keys)

    @property
    def index(self) -> IndexLayout:
        sizes = (self.block_size, self.head_dim)
        return IndexLayout.of_pages(*sizes, self.dtype, self.form, self.keys)

    @property
    def joined_length(self) -> int | None:
        """Keys of the shortest run that is longer than a block; None where there are none."""
        if self.form.run_size is None:
            return None
        levels = bound_levels(self.block_size, self.form.run_size, self.index.num_runs)
        return next(iter(levels[WRITTEN_LEVELS:]), None)

    @property
    def content_bytes(self) -> int:
        """Bytes of the keys and values of a block."""
        row = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return self.block_size * row

    @property
    def index_bytes(self) -> int:
        return index_bytes(
            self.block_size,
            self.num_kv_heads,
            self.head_dim,
            key_bytes=self.dtype.itemsize,
            form=self.form,
            keys=self.keys,
        )

    def part_bytes(self, rows: Rows) -> int:
        """Bytes of one tensor of the index, for all heads of a block."""
        return aligned(self.num_kv_heads * rows.nbytes)

    @property
    def padded_bytes(self) -> int:
        return self.content_bytes + self.index_bytes


@dataclass(frozen=True, slots=True)
class BlockPages:
    """A layer's KV blocks as operations take them."""

    pool: KeyPool
    index: KeyIndex


def pages_of(
    kv_cache: Tensor, form: IndexForm, keys: int = 0, fp8: Fp8 | None = None
) -> BlockPages:
    """`page_views` that are made once for kv_cache `[num_blocks, num_kv_heads, block_size,
    2 * head_dim]`.

    They are kept on the tensor itself: they hold its storage, which has to go with the tensor when
    vLLM measures CUDA graphs, or an engine stops.
    """
    known: tuple[Any, BlockPages] | None = getattr(kv_cache, "hipserve_pages", None)
    asked = (form, keys, fp8)
    if known is None or known[0] != asked:
        known = (asked, page_views(kv_cache, *asked))
        kv_cache.hipserve_pages = known  # type: ignore[attr-defined]
    return known[1]


def page_views(
    kv_cache: Tensor, form: IndexForm, keys: int = 0, fp8: Fp8 | None = None
) -> BlockPages:
    """Keys, values and their index inside a layer's KV blocks, without copying.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_dim]`, vLLM's.
        form: what the index holds.
        keys: of the longest sequence.
        fp8: of kv_cache in bytes: what they are.
    """
    blocks, heads, size, content = kv_cache.shape
    dim, (stride, head, token, _) = content // 2, kv_cache.stride()
    rows = (blocks, size, heads, dim), (stride, token, head, 1)
    values = dim * kv_cache.element_size()
    dtype, k_scale, v_scale = (kv_cache.dtype, 1.0, 1.0) if fp8 is None else fp8
    k_cache, v_cache = (_view(kv_cache, dtype, start, *rows) for start in (0, values))
    pool = KeyPool(k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)
    layout = BlockLayout(size, heads, dim, dtype, form, keys)
    return BlockPages(pool, index_of(kv_cache, layout, layout.content_bytes, pool.k_cache))


def _view(
    kv_cache: Tensor,
    dtype: torch.dtype,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Tensor:
    """Holds the storage only: a view by `as_strided` would hold the tensor that keeps it.

    start: bytes from the first block; strides in elements of `dtype`.
    """
    begin = kv_cache.storage_offset() * kv_cache.element_size() + start
    storage, empty = kv_cache.untyped_storage(), kv_cache.new_empty(0, dtype=dtype)
    return empty.set_(storage, begin // dtype.itemsize, shape, strides)


def index_of(kv_cache: Tensor, layout: BlockLayout, start: int, keys: Tensor) -> KeyIndex:
    """The index inside a layer's KV blocks, without copying.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, content]`, vLLM's.
        layout: of a block.
        start: bytes of a block before its index.
        keys: `[num_blocks, block_size, num_kv_heads, head_dim]`, wherever they are.
    """
    blocks, heads, stride, end = kv_cache.shape[0], layout.num_kv_heads, kv_cache.stride(0), start

    def allocate(rows: Rows) -> Tensor:
        """The next part of the padding; of a head all rows lie together."""
        nonlocal end
        start, end = end, end + layout.part_bytes(rows)
        row = torch.Size(rows.shape).numel()
        inner = torch.empty(rows.shape, device="meta").stride()
        block = stride * kv_cache.element_size() // rows.dtype.itemsize
        shape = (blocks, rows.count, heads, *rows.shape)
        strides = (block, row, rows.count * row, *inner)
        return _view(kv_cache, rows.dtype, start, shape, strides)

    return layout.index.index(keys, allocate)


@dataclass(frozen=True, slots=True)
class DueRuns:
    """Runs longer than a block that may be complete and not joined yet: those that end behind
    `known` keys of a sequence and not behind `seq_lens`.

    Attributes:
        block_table: `[num_seqs, max_pages]` int32.
    """

    block_table: Tensor
    seq_lens: list[int]
    known: list[int]

    def join(self, index: KeyIndex) -> None:
        """Joins them, in an index whose shorter runs are up to date."""
        join(index, self.block_table, self.seq_lens, self.known)


def rebuild_index(pages: BlockPages, found: Tensor) -> None:
    """Builds the index of whole pages from the keys that they hold, reading each key once.

    Runs behind the last key of a page summarise undefined keys; they are not read before `write_kv`
    computes them again.

    Args:
        found: `[n]` int64, page ids.
    """
    k_cache, index = pages.pool.k_cache, pages.index
    run_size = None if index.summaries is None else index.run_size
    page_bytes = k_cache[0].numel() * k_cache.element_size()
    for part in found.split(max(COPY_BYTES // page_bytes, 1)):
        made = build_index(k_cache[part], run_size=run_size, code_bits=index.code_bits)
        for held, rows in zip(index.tensors(), made.tensors(), strict=True):
            count = min(held.shape[1], rows.shape[1])  # fine runs come first, long ones last
            held[part, :count] = rows[:, :count]
