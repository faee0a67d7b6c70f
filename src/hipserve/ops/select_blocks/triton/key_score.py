"""Scores of keys and of blocks of keys. What the re-rank and the tree read of a key."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.pages import PagedRows, key_offsets
from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.codes import key_code_scores
from hipserve.ops.select_blocks.triton.far import shifts_of
from hipserve.ops.select_blocks.triton.queries import load_queries


class KeyRows(NamedTuple):
    """Pointers `[KEYS]` to what is read of some keys."""

    codes: Any
    scales: Any
    """Those of short codes."""


class KeyTile(NamedTuple):
    """What is read of some keys."""

    codes: Any
    """`[KEYS, DIM]`, or bytes of short codes `[KEYS, WIDTH]`."""
    scales: Any
    """`[KEYS]` float32, of short codes."""


@triton.jit
def key_rows(keys, positions, there, GEOMETRY: tl.constexpr):
    """The `KeyRows` of the keys at `positions` `[KEYS]`."""
    codes = keys.start + key_offsets(keys, positions, there)
    scales = codes
    if GEOMETRY.spec.code_bits < 16:
        rows = PagedRows(keys.scales, keys.scale_strides, keys.table, keys.page_size)
        scales = rows.start + key_offsets(rows, positions, there)
    return KeyRows(codes, scales)


@triton.jit
def load_keys(rows, there, GEOMETRY: tl.constexpr):
    """The `KeyTile` of `KeyRows`, zeros where not `there`."""
    BITS: tl.constexpr = GEOMETRY.spec.code_bits
    if BITS < 16:
        codes = load_tile(rows.codes, there, GEOMETRY.head_dim * BITS // 8, GEOMETRY.code_width)
        scales = tl.load(rows.scales, mask=there, other=0.0).to(tl.float32)  # [KEYS]
    else:
        codes = load_tile(rows.codes, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [KEYS, DIM]
        scales = rows.scales
    return KeyTile(codes, scales)


@triton.jit
def products(k_tile, q, GEOMETRY: tl.constexpr):
    """`[KEYS, ROWS]`: q k of the keys of a `KeyTile` and the rows of a tile."""
    if GEOMETRY.spec.code_bits < 16:
        return key_code_scores(k_tile.codes, k_tile.scales, q, GEOMETRY)
    else:
        return tl.dot(k_tile.codes.to(q.rows.dtype), tl.trans(q.rows), input_precision="ieee")


@triton.jit
def score_keys(first, queries, shift, k_tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[KEYS]`: the maximum over rows of q k - baseline.

    first: the tile of rows number 0, which see the keys `shift` positions nearer; mostly there is
        no other.
    """
    KEYS: tl.constexpr = TILING.keys
    best = tl.full([KEYS], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q = first
        if TILES > 1:
            q = load_queries(queries, tile, shift, GEOMETRY, TILING)
        s = products(k_tile, q, GEOMETRY)
        best = tl.maximum(best, tl.max(s - q.baseline[None, :], axis=1))
    return best


@triton.jit
def score_far_keys(shifts, queries, k_tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`score_keys` of keys that are seen nearer, segment by segment, by their `Shifts`."""
    best = tl.full([TILING.keys], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for shift in tl.range(shifts.first, shifts.last + 1, GEOMETRY.segment, num_stages=1):
        for tile in tl.range(TILES, num_stages=1):
            q = load_queries(queries, tile, shift, GEOMETRY, TILING)
            s = products(k_tile, q, GEOMETRY)
            found = tl.maximum(best, tl.max(s - q.baseline[None, :], axis=1))
            best = tl.where(shifts.each == shift, found, best)
    return best


@triton.jit
def score_blocks(
    first, queries, k_tile, positions, there, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """`[KEYS // key_block_size]`: the maximum score of each block of the keys in a tile, which are
    at `positions` `[KEYS]`. What moves a key is where its block begins."""
    if GEOMETRY.streams:
        blocks = positions // GEOMETRY.spec.key_block_size * GEOMETRY.spec.key_block_size
        shifts = shifts_of(queries.far, blocks, there, GEOMETRY)
        best = score_far_keys(shifts, queries, k_tile, GEOMETRY, TILING)
    else:
        best = score_keys(first, queries, 0, k_tile, GEOMETRY, TILING)
    return best_of_blocks(best, there, GEOMETRY, TILING)


@triton.jit
def best_of_blocks(best, there, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[KEYS // key_block_size]`: the maximum over each block of the scores `best` `[KEYS]`."""
    best = tl.where(there, best, -float("inf"))
    WIDTH: tl.constexpr = GEOMETRY.spec.key_block_size
    BLOCKS: tl.constexpr = TILING.keys // WIDTH
    return tl.max(tl.reshape(best, [BLOCKS, WIDTH]), axis=1)
