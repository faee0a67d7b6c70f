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


class QueryTile(NamedTuple):
    """Rows of a tile, and what their scores are relative to."""

    rows: Any
    """`[ROWS, DIM]`."""
    baseline: Any
    """`[ROWS]`: the best score of each row among sinks and window."""


@triton.jit
def queries_of(q, strides, block, head, baselines, codes, far, GEOMETRY: tl.constexpr):
    """The `Queries` of the `QueryBlock` and group of heads."""
    first_head = (head * GEOMETRY.group_size).to(tl.int64)
    start = q + block.first_row * strides.token + first_head * strides.head
    return Queries(start, strides, block.num_rows, baselines, codes, far)


@triton.jit
def load_rows(queries, tile, shift, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[ROWS, DIM]` sampled rows, from the last one backwards; `[ROWS]`: which of them exist.

    They see keys `shift` positions nearer.
    """
    return rows_at(queries, tile * TILING.rows + tl.arange(0, TILING.rows), shift, GEOMETRY)


@triton.jit
def rows_at(queries, r, shift, GEOMETRY: tl.constexpr):
    """The r-th sampled rows, `[n, DIM]`, and `[n]`: which of them exist; `shift` as above."""
    row = queries.num_rows - 1 - r // GEOMETRY.group_size * GEOMETRY.spec.query_stride
    valid = row >= 0
    offset = row.to(tl.int64) * queries.strides.token
    rows = queries.start + offset + r % GEOMETRY.group_size * queries.strides.head
    tile = load_tile(rows, valid, GEOMETRY.head_dim, GEOMETRY.dim)
    if GEOMETRY.streams:
        tile = see_from(tile, rows, valid, shift, queries.far, GEOMETRY)
    return tile, valid


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
