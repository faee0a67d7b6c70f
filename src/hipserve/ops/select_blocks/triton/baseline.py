"""The baseline of a row: its best score among the keys that it reads regardless."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops._triton.pages import key_offsets
from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.queries import load_rows


@triton.jit
def best_read(q_tile, keys, begin, end, last, part, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[ROWS]`: the maximum of q k over the keys in [0, begin) and [end, last) of this part."""
    ROWS: tl.constexpr = TILING.rows
    KEYS: tl.constexpr = TILING.read_keys
    STEP: tl.constexpr = TILING.baseline_programs * TILING.read_keys
    best = tl.full([ROWS], -float("inf"), tl.float32)
    for start in tl.range(part * KEYS, begin + last - end, STEP, num_stages=TILING.stages):
        n = start + tl.arange(0, KEYS)
        there = n < begin + last - end
        positions = tl.where(n < begin, n, end + n - begin)
        rows = keys.start + key_offsets(keys, positions, there)
        k_tile = load_tile(rows, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [KEYS, DIM]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [ROWS, KEYS]
        best = tl.maximum(best, tl.max(tl.where(there[None, :], s, -float("inf")), axis=1))
    return best


@triton.jit
def store_baselines(queries, keys, begin, end, last, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Writes what this program finds of each row's baseline, over keys that all rows see.

    Of several programs each looks at its part of the keys. Rows that do not exist get +inf, so
    that they never win; without `relative_scores` the baseline is 0.
    """
    part = tl.program_id(0) % TILING.baseline_programs
    ROWS: tl.constexpr = TILING.rows
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q_tile, valid = load_rows(queries, tile, GEOMETRY, TILING)  # [ROWS, DIM], [ROWS]
        if GEOMETRY.spec.relative_scores:
            best = best_read(q_tile, keys, begin, end, last, part, GEOMETRY, TILING)
        else:
            best = tl.zeros([ROWS], tl.float32)
        row = (part * TILING.row_tiles + tile) * TILING.rows + tl.arange(0, TILING.rows)
        tl.store(queries.baselines + row, tl.where(valid, best, float("inf")))  # [ROWS]
