"""Block selection by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.config import LONE_ROW, HiPConfig

_REPRESENTATIVES = {"middle": 0, "first": 1, "last": 2, "random": 3}


def select_blocks(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    config: HiPConfig,
) -> tuple[Tensor, Tensor]:
    """See `hipserve.ops.select_blocks`; returns `indices` and `window_start`."""
    heads = k_cache.shape[2] if config.share_group else q.shape[1]
    blocks = query_blocks.shape[0]
    indices = torch.empty((blocks, heads, config.max_selected), dtype=torch.int32)
    window_start = torch.empty(blocks, dtype=torch.int32)
    torch.ops.hipserve_cpu.select_blocks(
        q,
        k_cache,
        k_bounds,
        block_table,
        query_blocks,
        config.budget,
        config.bound_budget,
        config.key_block_size,
        config.bound_block_size,
        config.bound_reach,
        config.granularity,
        config.query_stride,
        config.rerank,
        config.relative_scores,
        _REPRESENTATIVES[config.representative],
        config.seed,
        config.num_sink_tokens,
        config.sliding_window,
        config.dense_below,
        LONE_ROW,
        indices,
        window_start,
    )
    return indices, window_start
