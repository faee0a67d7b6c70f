"""Windows over columns of a batch, those of padding too: what a window of tokens cannot tell."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.block_sparse_attention import reference
from hipserve.types import KeyPool

ROWS = 512
"""Rows that are computed at once: the keys that they read lie close to each other."""


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
    them, as in the second turn of a padded batch; only then this serves, in eager torch.

    Args:
        q: `[batch, query_len, num_q_heads, head_dim]`; the rows are the last columns.
        k, v: `[batch, kv_len, num_kv_heads, head_dim]`.
        valid: `[batch, kv_len]` bool, False for padding.
        sliding_window: columns that a row reads, its own included.
        sm_scale, softcap: as in `hip_attention`.

    Returns:
        out like q, zeros in rows of padding; lse `[batch, query_len, num_q_heads]`.
    """
    (batch, query_len), kv_len = q.shape[:2], k.shape[1]
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=reference.accumulator(q.dtype), device=q.device)
    columns = torch.arange(kv_len, device=q.device)
    keys = columns.expand(batch, -1).masked_fill(~valid, -1)
    for seq in range(batch):
        page = torch.tensor([seq], device=q.device)
        for begin in range(0, query_len, ROWS):
            rows = slice(begin, min(begin + ROWS, query_len))
            first, last = (kv_len - query_len + row for row in (rows.start, rows.stop))
            near = keys[seq : seq + 1, max(first - sliding_window + 1, 0) : last]
            counted = valid[seq, first:last]
            part = reference.attend(
                q[seq, rows][counted],
                columns[first:last][counted],
                near,
                KeyPool(k, v),
                page,
                sliding_window,
                scale,
                softcap,
            )
            out[seq, rows][counted], lse[seq, rows][counted] = part
    return out, lse
