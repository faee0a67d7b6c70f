"""Block selection by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.spec import SearchSpec

_REPRESENTATIVES = {"middle": 0, "first": 1, "last": 2, "random": 3}


def select_blocks(
    q: Tensor,
    k_cache: Tensor,
    k_bounds: Tensor | None,
    block_table: Tensor,
    query_blocks: Tensor,
    window_starts: Tensor,
    spec: SearchSpec,
) -> Tensor:
    """See `hipserve.ops.select_blocks`; returns `indices`."""
    indices = torch.empty(spec.selection_shape(q, k_cache, query_blocks), dtype=torch.int32)
    torch.ops.hipserve_cpu.select_blocks(
        q,
        k_cache,
        k_bounds,
        block_table,
        query_blocks,
        window_starts,
        spec.budget,
        spec.key_block_size,
        spec.bound_block_size,
        spec.bound_reach,
        spec.query_stride,
        spec.rerank,
        spec.relative_scores,
        _REPRESENTATIVES[spec.representative],
        spec.seed,
        spec.num_sink_tokens,
        indices,
    )
    return indices
