"""Block-sparse attention in Triton: one kernel for prefill and decode, one to join split keys.

A program takes some stacked rows of one query block (query rows times the heads of the group) and
walks the keys that the block reads, sinks + chosen + window in position order, as one list
(`key_list.py`), a tile at a time through the online softmax (`softmax.py`).
"""

from hipserve.ops.block_sparse_attention.triton.launch import block_sparse_attention

__all__ = ["block_sparse_attention"]
