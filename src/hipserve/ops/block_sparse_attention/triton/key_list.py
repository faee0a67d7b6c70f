"""The keys that a query block reads, as one list: sinks, chosen blocks, window.

The last `num_rows` keys of the list are the block's own. So its n-th key is visible to row i
exactly if n <= own + i, and only the tiles at the end need a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class KeyList(NamedTuple):
    """Where the parts of the list begin and end; all count keys."""

    sinks: Any
    """The list starts with the positions [0, sinks)."""
    chosen: Any
    """Keys in chosen blocks, which come next."""
    window: Any
    """Position of the first key after those."""
    own: Any
    """Where in the list the block's first row finds its own key."""
    blocks: Any
    """Pointer to the chosen blocks."""


class TileRange(NamedTuple):
    """The part [begin, end) of a list that a program reads; [begin, whole) needs no mask."""

    begin: Any
    whole: Any
    end: Any


@triton.jit
def count_chosen(blocks, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Keys in the chosen blocks, whose list ends at the first -1."""
    i = tl.arange(0, TILING.keys)
    chosen = 0
    for start in range(0, GEOMETRY.max_selected, TILING.keys):
        entry = start + i
        block = tl.load(blocks + entry, mask=entry < GEOMETRY.max_selected, other=-1)  # [KEYS]
        chosen += tl.sum((block >= 0).to(tl.int32)) * GEOMETRY.key_block_size
    return chosen


@triton.jit
def list_keys(
    blocks, window_start, block, rows, sliding_window, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """The `KeyList` of the query block number `block`; without a selection it is all window."""
    last = rows.position + rows.num_rows
    if GEOMETRY.selected:
        chosen = count_chosen(blocks, GEOMETRY, TILING)
        sinks = tl.minimum(GEOMETRY.num_sink_tokens, last)
        window = tl.maximum(tl.minimum(tl.load(window_start + block), last), sinks)
    else:
        sinks = 0
        chosen = 0
        window = tl.maximum(rows.position - sliding_window + 1, 0) if GEOMETRY.windowed else 0
    own = sinks + chosen + last - window - rows.num_rows
    return KeyList(sinks, chosen, window, own, blocks)


@triton.jit
def tile_range(key_list, row_tile, split, num_rows, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """What one split reads for one tile of rows: up to the last key that its last row sees."""
    lowest = row_tile * TILING.rows // GEOMETRY.group_size
    highest = ((row_tile + 1) * TILING.rows - 1) // GEOMETRY.group_size
    highest = tl.minimum(highest, num_rows - 1)
    end = key_list.own + highest + 1
    tiles = tl.cdiv(tl.cdiv(end, TILING.keys), TILING.splits)
    begin = split * tiles * TILING.keys
    end = tl.minimum(end, begin + tiles * TILING.keys)
    seen_by_all = (key_list.own + lowest + 1) // TILING.keys * TILING.keys
    whole = tl.minimum(seen_by_all, end // TILING.keys * TILING.keys)
    if GEOMETRY.windowed:
        whole = begin
    return TileRange(begin, whole, end)


@triton.jit
def list_positions(key_list, n, SIZE: tl.constexpr):
    """Positions of the n-th keys of the list, like `n`; a chosen block holds SIZE keys."""
    inside = (n >= key_list.sinks) & (n < key_list.sinks + key_list.chosen)
    block = tl.load(key_list.blocks + (n - key_list.sinks) // SIZE, mask=inside, other=0)  # [KEYS]
    behind = key_list.window + n - key_list.sinks - key_list.chosen
    outside = tl.where(n < key_list.sinks, n, behind)
    return tl.where(inside, block * SIZE + (n - key_list.sinks) % SIZE, outside)
