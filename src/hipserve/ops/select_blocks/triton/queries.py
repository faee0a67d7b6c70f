"""The sampled query rows of a query block and group of heads, stacked in tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.codes import load_query_code
from hipserve.ops.select_blocks.triton.far import see_from


class Queries(NamedTuple):
    """Where the rows of one query block and group of heads are."""

    start: Any
    """Pointer to the first row of the first head."""
    strides: Any
    """`RowStrides`."""
    num_rows: Any
    baselines: Any
    """Pointer to the baseline of each row; one list for each program that looks for them."""
    codes: Any
    """`QueryCodes`; None where codes of keys are the keys themselves."""
    far: Any
    """`FarKeys`."""
    turned: Any
    """Pointer to room for a tile of turned rows, of this program alone."""


class QueryTile(NamedTuple):
    """Rows of a tile, and what their scores are relative to."""

    rows: Any
    """`[ROWS, DIM]`."""
    baseline: Any
    """`[ROWS]`: the best score of each row among sinks and window."""


@triton.jit
def queries_of(q, strides, block, head, baselines, codes, far, turned, GEOMETRY: tl.constexpr):
    """The `Queries` of the `QueryBlock` and group of heads."""
    first_head = (head * GEOMETRY.group_size).to(tl.int64)
    start = q + block.first_row * strides.token + first_head * strides.head
    return Queries(start, strides, block.num_rows, baselines, codes, far, turned)


@triton.jit
def load_rows(queries, tile, shift, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[ROWS, DIM]` sampled rows, from the last one backwards; `[ROWS]`: which of them exist.

    They see keys `shift` positions nearer.
    """
    r = tile * TILING.rows + tl.arange(0, TILING.rows)
    at, valid = pointers(queries, r, GEOMETRY), exist(queries, r, GEOMETRY)
    rows = load_tile(at, valid, GEOMETRY.head_dim, GEOMETRY.dim)
    if GEOMETRY.streams:
        if shift != 0:
            if queries.far.eights:
                rows = see_from(rows, at, valid, shift, queries.far, GEOMETRY, True)
            else:
                turn_few_rows(queries, tile, shift, GEOMETRY, TILING)
                i, d = tl.arange(0, TILING.rows), tl.arange(0, GEOMETRY.dim)
                rows = tl.load(queries.turned + i[:, None] * GEOMETRY.dim + d[None, :])
    return rows, valid


@triton.jit
def exist(queries, r, GEOMETRY: tl.constexpr):
    """`[n]`: which of the r-th sampled rows exist."""
    return queries.num_rows - 1 - r // GEOMETRY.group_size * GEOMETRY.spec.query_stride >= 0


@triton.jit
def pointers(queries, r, GEOMETRY: tl.constexpr):
    """Pointers `[n]` to the r-th sampled rows."""
    row = queries.num_rows - 1 - r // GEOMETRY.group_size * GEOMETRY.spec.query_stride
    offset = row.to(tl.int64) * queries.strides.token
    return queries.start + offset + r % GEOMETRY.group_size * queries.strides.head


@triton.jit
def turn_few_rows(queries, tile, shift, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """Writes the rows of tile number `tile` as they see keys `shift` positions nearer to
    `queries.turned`, a few at a time: partners that are read one by one take registers."""
    FEW: tl.constexpr = 16
    i, d = tl.arange(0, FEW), tl.arange(0, GEOMETRY.dim)
    tl.debug_barrier()  # all warps have read what was there
    for first in tl.range(0, TILING.rows, FEW, num_stages=1):
        r = tile * TILING.rows + first + i
        rows, valid = pointers(queries, r, GEOMETRY), exist(queries, r, GEOMETRY)
        few = load_tile(rows, valid, GEOMETRY.head_dim, GEOMETRY.dim)  # [FEW, DIM]
        few = see_from(few, rows, valid, shift, queries.far, GEOMETRY, False)
        to = queries.turned + (first + i)[:, None] * GEOMETRY.dim + d[None, :]
        tl.store(to, few)  # [FEW, DIM]
    tl.debug_barrier()


@triton.jit
def load_baseline(queries, tile, TILING: tl.constexpr):
    """`[ROWS]`: the baseline of the rows of a tile, the maximum of what all programs found."""
    part = tl.arange(0, TILING.baseline_programs) * TILING.rows * TILING.row_tiles
    row = tile * TILING.rows + tl.arange(0, TILING.rows)
    found = tl.load(queries.baselines + part[:, None] + row[None, :])  # [PROGRAMS, ROWS]
    return tl.max(found, axis=0)


@triton.jit
def load_queries(queries, tile, shift, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `QueryTile` number `tile`, which sees keys `shift` positions nearer; the `QueryCode`
    beside short codes."""
    baseline = load_baseline(queries, tile, TILING)
    if GEOMETRY.spec.code_bits < 16:
        return load_query_code(queries.codes, baseline, tile, GEOMETRY, TILING)
    else:
        rows, _ = load_rows(queries, tile, shift, GEOMETRY, TILING)
        return QueryTile(rows, baseline)
