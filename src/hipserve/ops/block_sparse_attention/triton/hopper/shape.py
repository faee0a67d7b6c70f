"""What the kernel is compiled for, and which calls it takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hipserve.ops._triton.constants import HashedOnce
from hipserve.ops.block_sparse_attention.triton.tiling import RUN, Call

BLOCK_ROWS = 64
FEW_ROWS = 16
"""Query blocks of up to so many rows would leave most of a tile empty."""


@dataclass(frozen=True, kw_only=True)
class Shape(HashedOnce):
    """What is read, and how the work is divided.

    Attributes:
        group_size: query heads that share a selection.
        heads: selections of a query block, one a group.
        kv_heads: heads of the KV cache; some groups may read the same one.
        head_dim: elements of a head.
        num_sink_tokens: keys at the start of a sequence that every block reads.
        key_block_size: keys of a chosen block.
        max_selected: entries of a list of chosen blocks.
        selected: blocks are chosen; otherwise everything is read.
        streams: sinks and chosen keys are read from those that were turned before.
        page_size: keys of a page.
        rows: query rows of a block; a group of warps computes them for one head.
        keys: keys of a tile.
        stages: tiles of keys, and of values, that shared memory holds.
        head_tiles: items of work of a query block and selection: two heads each.
    """

    __hash__ = HashedOnce.__hash__
    group_size: int
    heads: int
    kv_heads: int
    head_dim: int
    num_sink_tokens: int
    key_block_size: int
    max_selected: int
    selected: bool
    streams: bool
    page_size: int
    rows: int
    keys: int
    stages: int
    head_tiles: int


@functools.lru_cache(1024)
def make_shape(call: Call) -> Shape | None:
    """The shape of a call; None if it is not one that the kernel computes, or computes well."""
    _, num_q_heads, head_dim = call.q_shape
    _, page_size, kv_heads, _ = call.k_shape
    heads = max(call.selected[1] if call.selected else 0, kv_heads)
    group_size = num_q_heads // heads
    large = FEW_ROWS < call.max_rows <= BLOCK_ROWS and group_size > 1
    other = call.windowed or call.capped or call.tiled or call.converted
    plain = call.element_size == 2 and head_dim in (64, 128) and not other
    in_runs = page_size % RUN == 0 and page_size & (page_size - 1) == 0
    if call.selected:
        in_runs = in_runs and call.key_block_size % RUN == 0 and call.num_sink_tokens % RUN == 0
    if not (large and plain and in_runs):
        return None
    return Shape(
        group_size=group_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        num_sink_tokens=call.num_sink_tokens,
        key_block_size=call.key_block_size,
        max_selected=call.selected[2] if call.selected else 0,
        selected=call.selected is not None,
        streams=call.streams,
        page_size=page_size,
        rows=BLOCK_ROWS,
        keys=128,
        stages=3 * 128 // head_dim,
        head_tiles=-(-group_size // 2),
    )


def can_copy(*tensors: Tensor) -> bool:
    """The copy engine takes them: 16-bit numbers, rows at multiples of 16 bytes, none of it empty.

    tensors: each `[..., head_dim]`.
    """
    return all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 and 0 < stride < 2**31 for stride in x.stride()[:-1])
        and x.numel() > 0
        for x in tensors
    )
