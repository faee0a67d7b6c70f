"""The definition of block selection: eager torch, one query block at a time, any device.

Every key of the searched middle is visible to every row of the block, so no score is ever masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.rope import nearest_segment, segment_length
from hipserve.ops.select_blocks.reference.bound import BoundSearch
from hipserve.ops.select_blocks.reference.scores import IndexedKeys, SeenKeys
from hipserve.ops.select_blocks.reference.search import Search, sample_rows
from hipserve.ops.select_blocks.reference.tree import TreeSearch
from hipserve.ops.select_blocks.spec import SearchInputs, SearchSpec
from hipserve.plan.rule import FURTHEST
from hipserve.types import KeyIndex

SEARCHES: dict[str, type[Search]] = {"tree": TreeSearch, "bound": BoundSearch}
"""By the name of the selector."""


def select_blocks(inputs: SearchInputs, spec: SearchSpec) -> Tensor:
    """`indices` `[num_query_blocks, heads, max_selected]` int32; see `hipserve.ops`."""
    shape = spec.selection_shape(inputs)
    indices = torch.full(shape, -1, dtype=torch.int32, device=inputs.q.device)
    scales = (inputs.code_scales, inputs.summary_scales)
    sizes = (spec.run_size or 1, spec.code_bits)
    index = KeyIndex(inputs.codes, inputs.summaries, *sizes, *scales)
    trained = FURTHEST if inputs.rope is None else spec.trained_length or FURTHEST
    starts: list[int] = inputs.window_starts.tolist()
    for i, (seq, row, num_rows, position) in enumerate(inputs.query_blocks.tolist()):
        if starts[i] > spec.num_sink_tokens:
            rows = sample_rows(inputs.q[row : row + num_rows], shape[1], spec.query_stride)
            pages = inputs.block_table[seq].long()
            keys = IndexedKeys(index, pages)
            nearest = nearest_segment(position, starts[i], trained)
            seen = SeenKeys(rows, keys, inputs.rope, nearest, segment_length(trained))
            search = SEARCHES[spec.selector.name](
                seen, starts[i], position, spec, inputs.head_blocks
            )
            chosen = search.select()
            indices[i, :, : chosen.shape[1]] = chosen.int()
    return indices
