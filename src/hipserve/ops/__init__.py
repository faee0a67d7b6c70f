"""The operations: tensors in, tensors out, the same contract on every backend."""

from hipserve.ops.block_sparse_attention.api import block_sparse_attention
from hipserve.ops.select_blocks.api import refresh_blocks, select_blocks
from hipserve.ops.write_kv.api import compute_bounds, write_kv

__all__ = [
    "block_sparse_attention",
    "compute_bounds",
    "refresh_blocks",
    "select_blocks",
    "write_kv",
]
