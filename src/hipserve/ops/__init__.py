"""The operations: tensors in, tensors out, the same contract on every backend."""

from hipserve.ops.block_sparse_attention.api import block_sparse_attention
from hipserve.ops.load_tiles.api import load_tiles, store_rows
from hipserve.ops.select_blocks.api import refresh_blocks, select_blocks
from hipserve.ops.write_kv.api import build_index, write_kv
from hipserve.ops.write_kv.join_runs import join_runs

__all__ = [
    "block_sparse_attention",
    "build_index",
    "join_runs",
    "load_tiles",
    "refresh_blocks",
    "select_blocks",
    "store_rows",
    "write_kv",
]


def __getattr__(name: str) -> object:
    if name == "compute_bounds":
        raise AttributeError(
            "hipserve.ops.compute_bounds became build_index, which returns a KeyIndex: "
            "build_index(k, run_size=16)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
