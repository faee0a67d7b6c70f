"""The paper's tree by the native kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.spec import SearchInputs, SearchSpec
from hipserve.selectors import Tree

_REPRESENTATIVES = {"middle": 0, "first": 1, "last": 2, "random": 3}


def search_tree(inputs: SearchInputs, spec: SearchSpec, indices: Tensor) -> None:
    """Writes `indices` `[num_query_blocks, heads, max_selected]`."""
    options = spec.selector
    assert isinstance(options, Tree)
    q, codes, code_scales, _, _, *blocks, _ = inputs
    torch.ops.hipserve_cpu.select_by_tree(
        q,
        codes,
        code_scales,
        spec.code_bits,
        *blocks,
        spec.trained_length or 0,
        spec.budget,
        spec.key_block_size,
        spec.query_stride,
        spec.relative_scores,
        spec.num_sink_tokens,
        _REPRESENTATIVES[options.representative],
        options.seed,
        indices,
    )
