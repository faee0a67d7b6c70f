"""Dense attention on a CPU by torch's own kernel, over pages, with its log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.types import KeyPool

SCRATCH = 16 * 2**20
"""Bytes of keys, and as many of values, that are gathered from pages at a time."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What `scaled_dot_product_attention` runs on a CPU; it also returns the log-sum-exp. Its causal
mask begins at the first key, so rows behind earlier keys take two calls."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one sequence in a packed batch.

    Attributes:
        seq: which sequence.
        begin, end: the rows, among those of the batch.
        position: of the first of them.
    """

    seq: int
    begin: int
    end: int
    position: int

    @property
    def last(self) -> int:
        """Keys that the last of these rows reads."""
        return self.position + self.end - self.begin


def attend_rows(
    q: Tensor, pool: KeyPool, pages: Tensor, position: int, sm_scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Dense causal attention of rows that follow each other, some KV heads at a time.

    Args:
        q: `[rows, num_q_heads, head_dim]`; the first row is at `position`.
        pool: the keys of all these rows are written.
        pages: `[max_pages]`, of the sequence.

    Yields:
        which query heads, their `out` `[rows, heads, head_dim]` and `lse` `[rows, heads]`, float32.
    """
    last, group = position + q.shape[0], q.shape[1] // pool.num_kv_heads
    row = pool.head_dim * pool.k_cache.element_size()
    whole = pool.page_size >= last  # then nothing is gathered
    stretch = last if whole else max(SCRATCH // row // pool.page_size, 1) * pool.page_size
    together = pool.num_kv_heads if whole else max(SCRATCH // (row * min(stretch, last)), 1)
    for first in range(0, pool.num_kv_heads, together):
        heads = slice(first, min(first + together, pool.num_kv_heads))
        of_queries = slice(heads.start * group, heads.stop * group)
        mine = q[:, of_queries]
        out, lse = _own(mine, *_keys(pool, pages, position, last, heads), sm_scale)
        for begin in range(0, position, stretch):
            k, v = _keys(pool, pages, begin, min(begin + stretch, position), heads)
            out, lse = _merge(out, lse, *_earlier(mine, k, v, sm_scale))
        yield of_queries, out, lse


def _keys(
    pool: KeyPool, pages: Tensor, begin: int, end: int, heads: slice
) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, heads, end - begin, head_dim]` of these positions."""
    first = begin // pool.page_size
    taken = pages[first : -(-end // pool.page_size)].long()
    begin, end = begin - first * pool.page_size, end - first * pool.page_size

    def read(cache: Tensor) -> Tensor:
        if len(taken) == 1:
            return cache[int(taken), begin:end, heads].transpose(0, 1)[None]
        return cache[taken, :, heads].flatten(0, 1)[begin:end].transpose(0, 1)[None]

    return read(pool.k_cache), read(pool.v_cache)


def _own(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Every row and the keys from the first row's own up to its own."""
    out, lse = _flash(q.transpose(0, 1)[None], k, v, 0.0, True, scale=sm_scale)
    return out[0].transpose(0, 1), lse[0].T


def _earlier(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """All rows and all of these keys: the heads of a group are further rows of their KV head."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    folded = q.view(rows, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
    out, lse = _flash(folded, k, v, 0.0, False, scale=sm_scale)
    out = out[0].view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, heads, dim)
    return out, lse[0].view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over both sets of keys, in float32."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.float(), other.float(), share), torch.logaddexp(lse, other_lse)
