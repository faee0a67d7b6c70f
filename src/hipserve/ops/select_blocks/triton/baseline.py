"""The baseline of a row: its best score among the keys that it reads regardless."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.codes import (
    key_code_scores,
    load_query_code,
    rotation_matrix,
    store_query_codes,
)
from hipserve.ops.select_blocks.triton.far import shifts_of
from hipserve.ops.select_blocks.triton.key_score import key_rows, load_keys
from hipserve.ops.select_blocks.triton.queries import exist, load_rows, pointers


@triton.jit
def best_read(
    q, queries, tile, keys, begin, end, last, part, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """`[ROWS]`: the maximum of q k over the keys in [0, begin) and [end, last) of this part.

    q: the rows of tile number `tile`, where nothing is seen nearer.
    """
    ROWS: tl.constexpr = TILING.rows
    KEYS: tl.constexpr = TILING.read_keys
    STEP: tl.constexpr = TILING.baseline_programs * TILING.read_keys
    best = tl.full([ROWS], -float("inf"), tl.float32)
    for start in tl.range(part * KEYS, begin + last - end, STEP, num_stages=TILING.stages):
        n = start + tl.arange(0, KEYS)
        there = n < begin + last - end
        positions = tl.where(n < begin, n, end + n - begin)
        k_tile = load_keys(key_rows(keys, positions, there, GEOMETRY), there, GEOMETRY)
        if GEOMETRY.spec.code_bits < 16:
            s = key_code_scores(k_tile.codes, k_tile.scales, q, GEOMETRY)  # [KEYS, ROWS]
            best = tl.maximum(best, tl.max(tl.where(there[:, None], s, -float("inf")), axis=0))
        elif GEOMETRY.streams:
            shifts = shifts_of(queries.far, positions, there, GEOMETRY)
            for shift in tl.range(shifts.first, shifts.last + 1, GEOMETRY.segment, num_stages=1):
                seeing = q
                if shift != 0:
                    seeing, _ = load_rows(queries, tile, shift, GEOMETRY, TILING)
                codes = k_tile.codes.to(seeing.dtype)  # [KEYS, DIM]
                s = tl.dot(seeing, tl.trans(codes), input_precision="ieee")
                s = tl.where((shifts.each == shift)[None, :], s, -float("inf"))  # [ROWS, KEYS]
                best = tl.maximum(best, tl.max(s, axis=1))
        else:
            codes = k_tile.codes.to(q.dtype)  # [KEYS, DIM]
            s = tl.dot(q, tl.trans(codes), input_precision="ieee")  # [ROWS, KEYS]
            best = tl.maximum(best, tl.max(tl.where(there[None, :], s, -float("inf")), axis=1))
    return best


@triton.jit
def store_baselines(queries, keys, begin, end, last, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Writes what this program finds of each row's baseline, over keys that all rows see.

    Beside short codes it codes the rows first. Of several programs each looks at its part of the
    keys. Rows that do not exist get +inf, so
    that they never win; without `relative_scores` the baseline is 0.
    """
    part = tl.program_id(0) % TILING.baseline_programs
    ROWS: tl.constexpr = TILING.rows
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q, valid = load_rows(queries, tile, 0, GEOMETRY, TILING)  # [ROWS, DIM], [ROWS]
        if GEOMETRY.spec.code_bits < 16:
            matrix = rotation_matrix(GEOMETRY)
            for first in tl.range(0, ROWS, 16, num_stages=1):
                r = tile * ROWS + first + tl.arange(0, 16)
                few = pointers(queries, r, GEOMETRY)
                there = exist(queries, r, GEOMETRY)
                rows = load_tile(few, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [16, DIM]
                store_query_codes(queries.codes, r, rows, matrix, GEOMETRY)
            tl.debug_barrier()
            q = load_query_code(queries.codes, valid, tile, GEOMETRY, TILING)
        if GEOMETRY.spec.relative_scores:
            best = best_read(q, queries, tile, keys, begin, end, last, part, GEOMETRY, TILING)
        else:
            best = tl.zeros([ROWS], tl.float32)
        row = (part * TILING.row_tiles + tile) * TILING.rows + tl.arange(0, TILING.rows)
        tl.store(queries.baselines + row, tl.where(valid, best, float("inf")))  # [ROWS]
