"""Exact scores: of keys, and of blocks of keys. What the re-rank and the tree read of a key."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops._triton.pages import key_offsets
from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.queries import load_queries


@triton.jit
def key_rows(keys, positions, there):
    """Pointers `[KEYS]` to what is read of the keys at `positions`."""
    return keys.start + key_offsets(keys, positions, there)


@triton.jit
def load_keys(rows, there, GEOMETRY: tl.constexpr):
    """`[KEYS, DIM]` at the pointers `rows`, zeros where not `there`."""
    return load_tile(rows, there, GEOMETRY.head_dim, GEOMETRY.dim)


@triton.jit
def score_keys(first, queries, k_tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[KEYS]`: the maximum over rows of q k - baseline.

    first: the `QueryTile` number 0; mostly there is no other.
    """
    KEYS: tl.constexpr = TILING.keys
    best = tl.full([KEYS], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q = first
        if TILES > 1:
            q = load_queries(queries, tile, GEOMETRY, TILING)
        s = tl.dot(k_tile, tl.trans(q.rows), input_precision="ieee")  # [KEYS, ROWS]
        best = tl.maximum(best, tl.max(s - q.baseline[None, :], axis=1))
    return best


@triton.jit
def score_blocks(first, queries, k_tile, there, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[KEYS // key_block_size]`: the maximum score of each block of the keys in a tile."""
    best = score_keys(first, queries, k_tile, GEOMETRY, TILING)
    best = tl.where(there, best, -float("inf"))
    WIDTH: tl.constexpr = GEOMETRY.spec.key_block_size
    BLOCKS: tl.constexpr = TILING.keys // WIDTH
    return tl.max(tl.reshape(best, [BLOCKS, WIDTH]), axis=1)
