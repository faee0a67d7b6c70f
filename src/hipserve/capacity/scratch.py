"""What a step allocates besides weights and cache: arithmetic, without torch."""

from __future__ import annotations

from hipserve.config import HiPConfig

SEARCH_BYTES = 256 << 20
"""Scratch of a search on a GPU, as `SCRATCH_BYTES` of its kernels, which only GPUs import."""

TURNED_BYTES = 256 << 20
"""Turned keys of rows beyond the trained length, as `ROOM_BYTES` of the kernels that turn them."""

COPY_BYTES = 64 << 20
"""Keys that are copied at a time while the index of found blocks is built."""


def scratch_bytes(
    num_tokens: int, num_q_heads: int, head_dim: int, element_size: int, config: HiPConfig
) -> int:
    """What one layer of a step allocates at most: the search's scratch, a selection, output, lse,
    keys of blocks whose index is built, and keys that are turned."""
    blocks = num_tokens // config.query_block_size + 1
    selection = blocks * num_q_heads * config.max_selected * 4
    output = num_tokens * num_q_heads * (head_dim * element_size + 4)
    turned = TURNED_BYTES if config.streams else 0
    return SEARCH_BYTES + selection + output + 2 * COPY_BYTES + turned
