"""Block-sparse attention by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.errors import BackendError


def block_sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    indices: Tensor | None,
    window_start: Tensor | None,
    *,
    num_sink_tokens: int,
    key_block_size: int,
    sliding_window: int,
    sm_scale: float,
    v_scale: float,  # noqa: ARG001 - of pages in fp8, which it does not read
    softcap: float,
    query_block_size: int,  # noqa: ARG001 - sizes tiles on a GPU
    lists: Tensor | None = None,
    page_size: int = 0,  # noqa: ARG001 - likewise
    rope: Tensor | None = None,
    trained_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `hipserve.ops.block_sparse_attention`.

    Returns:
        out: `[num_tokens, num_q_heads, head_dim]`, as `q`.
        lse: `[num_tokens, num_q_heads]` float32.
    """
    if lists is not None:
        raise BackendError('backend="cpu" cannot run: it reads pages, and no tiles')
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)
    torch.ops.hipserve_cpu.block_sparse_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        query_blocks,
        indices,
        window_start,
        num_sink_tokens,
        key_block_size,
        sliding_window,
        sm_scale,
        softcap,
        rope,
        trained_length,
        out,
        lse,
    )
    return out, lse
