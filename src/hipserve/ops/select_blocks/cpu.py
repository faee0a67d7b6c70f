"""Block selection by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.config import HiPConfig

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
    tensors = (q, k_cache, k_bounds, block_table)
    for chosen, below in _by_crossover(q.shape[0], query_blocks, config):
        if chosen is None:
            _run(*tensors, query_blocks, config, below, indices, window_start)
        else:
            part = (indices[chosen], window_start[chosen])
            _run(*tensors, query_blocks[chosen], config, below, *part)
            indices[chosen], window_start[chosen] = part
    return indices, window_start


def _by_crossover(
    num_rows: int, query_blocks: Tensor, config: HiPConfig
) -> list[tuple[Tensor | None, int]]:
    """The query blocks of each crossover (None: all of them), and the position where it lies."""
    of_blocks, of_rows = config.dense_below, config.decode_dense_below
    assert of_blocks is not None
    assert of_rows is not None
    if num_rows == query_blocks.shape[0]:  # a decode step: every block has one row
        return [(None, of_rows)]
    single = query_blocks[:, 2] == 1
    if of_blocks == of_rows or not single.any():
        return [(None, of_blocks)]
    return [(torch.where(~single)[0], of_blocks), (torch.where(single)[0], of_rows)]


def _run(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    config: HiPConfig,
    dense_below: int,
    indices: Tensor,
    window_start: Tensor,
) -> None:
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
        dense_below,
        1,  # `dense_below` is that of these blocks, whether they have one row or many
        indices,
        window_start,
    )
