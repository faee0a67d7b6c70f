"""Block selection in Triton: the searches of `reference`, one launch a step, or one for all.

`baseline_kernel` finds the best score of each row among the keys that it reads regardless.
`search_kernel` takes the steps of the selector (`tree.py`, `bound.py`): in one launch for single
rows, otherwise in one a step. Where query blocks are few, several programs share the scores of
each; they wait for each other (`barrier.py`) and each keeps for itself. Every query block and head
has scratch of its own, which stays in cache. Nothing is sorted: `threshold.py` finds the count-th
best score by cutting ranges and compacts in position order.
"""

from hipserve.ops.select_blocks.triton.launch import SCRATCH_BYTES, refresh_blocks, select_blocks
from hipserve.ops.select_blocks.triton.tiling import SEARCHES

__all__ = ["SCRATCH_BYTES", "SEARCHES", "refresh_blocks", "select_blocks"]
