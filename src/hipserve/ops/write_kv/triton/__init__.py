"""Writing keys, values and their index in Triton."""

from hipserve.ops.write_kv.triton.launch import build_index, write_kv, write_whole_runs

__all__ = ["build_index", "write_kv", "write_whole_runs"]
