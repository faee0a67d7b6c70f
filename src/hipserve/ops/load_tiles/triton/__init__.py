"""Loading tiles in Triton: one launch decides what to load, one copies it."""

from hipserve.ops.load_tiles.triton.launch import load_tiles, store_rows

__all__ = ["load_tiles", "store_rows"]
