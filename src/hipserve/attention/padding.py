"""Padded batches: the keys that count as pages, and windows that count columns of padding too."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hipserve.config import HiPConfig
from hipserve.ops import block_sparse_attention
from hipserve.plan import BatchLayout
from hipserve.types import BlockSelection, KeyPool

ROW_BY_ROW = HiPConfig(query_block_size=1, query_stride=1, num_sink_tokens=0)
"""Every row is a query block, whose window starts where the selection says."""


class Unpadded(NamedTuple):
    """A batch without its padding.

    Attributes:
        pool: each sequence is one page of the keys that count, in order.
        layout: of these pages.
        rows: `[batch, query_len]` bool, which query rows count.
    """

    pool: KeyPool
    layout: BatchLayout
    rows: Tensor


def without_padding(k: Tensor, v: Tensor, valid: Tensor, query_len: int) -> Unpadded:
    """The keys and rows of a batch that count; the rows are the last columns.

    Args:
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`.
        valid: `[batch, kv_len]` bool, False for padding.
        query_len: query rows of each sequence, padding included.
    """
    batch, kv_len = k.shape[:2]
    order = valid.logical_not().sort(dim=1, stable=True).indices[..., None, None].expand_as(k)
    rows = valid[:, kv_len - query_len :]
    layout = BatchLayout(
        torch.arange(batch, dtype=torch.int32, device=k.device)[:, None],
        valid.sum(1).int(),
        torch.cat([rows.new_zeros(1, dtype=torch.int32), rows.sum(1).cumsum(0).int()]),
    )
    return Unpadded(KeyPool(k.gather(1, order), v.gather(1, order)), layout, rows)


def attend_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    sliding_window: int,
    *,
    sm_scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention where a window of w reaches back w columns, whether they count or not.

    Windows elsewhere count the tokens that are kept. That is the same until padding lies between
    them, as in the second turn of a padded batch: then the windows of rows hold different numbers
    of keys.

    Args:
        q: `[batch, query_len, num_q_heads, head_dim]`; the rows are the last columns.
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`.
        valid: `[batch, kv_len]` bool, False for padding.
        sliding_window: columns that a row reads, its own included.
        sm_scale, softcap: as in `hip_attention`.

    Returns:
        out like q, zeros in rows of padding; lse `[batch, query_len, num_q_heads]`, -inf there.
    """
    pool, layout, rows = without_padding(k, v, valid, q.shape[1])
    starts = window_starts(valid, sliding_window)[:, -q.shape[1] :][rows].int()
    nothing = starts.new_full((len(starts), pool.num_kv_heads, 1), -1)
    attended = block_sparse_attention(
        q[rows],
        pool,
        layout,
        BlockSelection(nothing, starts),
        config=ROW_BY_ROW,
        sm_scale=sm_scale,
        softcap=softcap,
        check=False,
    )
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=attended[1].dtype, device=q.device)
    out[rows], lse[rows] = attended
    return out, lse


def window_starts(valid: Tensor, sliding_window: int) -> Tensor:
    """`[batch, kv_len]` int64: how many keys count in front of each column's window.

    valid: `[batch, kv_len]` bool.
    """
    width = min(sliding_window, valid.shape[1])
    return F.pad(valid.cumsum(1), (width, 0))[:, : valid.shape[1]]
