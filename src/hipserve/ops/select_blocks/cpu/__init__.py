"""Block selection by the native CPU kernels: a call for each selector."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.ops.select_blocks.cpu.bound import search_bound
from hipserve.ops.select_blocks.cpu.tree import search_tree
from hipserve.ops.select_blocks.spec import SearchInputs, SearchSpec

SEARCHES = {"tree": search_tree, "bound": search_bound}
"""By the name of the selector."""


def select_blocks(inputs: SearchInputs, spec: SearchSpec) -> Tensor:
    """`indices` `[num_query_blocks, heads, max_selected]` int32; see `hipserve.ops`."""
    indices = torch.empty(spec.selection_shape(inputs), dtype=torch.int32)
    SEARCHES[spec.selector.name](inputs, spec, indices)
    return indices
