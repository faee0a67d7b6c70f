"""The descent through summaries by the native kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.spec import SearchInputs, SearchSpec
from hipserve.selectors import Bound


def search_bound(inputs: SearchInputs, spec: SearchSpec, indices: Tensor) -> None:
    """Writes `indices` `[num_query_blocks, heads, max_selected]`."""
    options = spec.selector
    assert isinstance(options, Bound)
    q, codes, code_scales, summaries, summary_scales, *blocks, head_blocks = inputs
    torch.ops.hipserve_cpu.select_by_bound(
        q,
        codes,
        code_scales,
        summaries,
        summary_scales,
        spec.run_size,
        spec.code_bits,
        *blocks,
        spec.trained_length or 0,
        spec.budget,
        spec.key_block_size,
        spec.query_stride,
        spec.relative_scores,
        spec.num_sink_tokens,
        options.bound_reach,
        options.rerank,
        head_blocks,
        indices,
    )
