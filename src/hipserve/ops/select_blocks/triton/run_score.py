"""The score of a run from its summary: center and radius, channel by channel.

Nothing else knows what a summary is: another one is another version of this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.codes import load_run_query_code, run_code_scores
from hipserve.ops.select_blocks.triton.queries import load_baseline, load_rows


class RunQueries(NamedTuple):
    """A tile of query rows, made ready to score summaries."""

    rows: Any
    """`[ROWS, DIM]`: what multiplies the center of a run."""
    reached: Any
    """`[ROWS, DIM]`: what multiplies its radius."""
    baseline: Any
    """`[ROWS]`."""


class SummaryRows(NamedTuple):
    """Pointers `[RUNS]` to the centers of some runs; radii lie a side behind them."""

    summaries: Any
    scales: Any
    """Those of coded summaries."""


class Summaries(NamedTuple):
    """A tile of summaries."""

    center: Any
    radius: Any
    """`[RUNS, DIM]`, or `[RUNS, WIDTH]` int8."""
    center_scale: Any
    radius_scale: Any
    """`[RUNS]` float32, of coded summaries."""


@triton.jit
def reach_out(rows, REACH: tl.constexpr):
    """`[ROWS, DIM]`: REACH * |q|, which multiplies radii (`bound_reach`)."""
    return (tl.abs(rows.to(tl.float32)) * REACH).to(rows.dtype)


@triton.jit
def load_run_queries(queries, tile, shift, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `RunQueries` of tile number `tile`, which see runs `shift` positions nearer; the
    `RunQueryCode` beside coded summaries."""
    baseline = load_baseline(queries, tile, TILING)
    if GEOMETRY.spec.code_bits < 16:
        return load_run_query_code(queries.codes, baseline, tile, GEOMETRY, TILING)
    else:
        rows, _ = load_rows(queries, tile, shift, GEOMETRY, TILING)  # [ROWS, DIM]
        return RunQueries(rows, reach_out(rows, GEOMETRY.reach), baseline)


@triton.jit
def load_summaries(rows, bounds, there, GEOMETRY: tl.constexpr):
    """The `Summaries` of `SummaryRows` of `bounds`, zeros where not `there`."""
    at, next_at = rows.summaries, rows.summaries + bounds.strides.side
    DIM: tl.constexpr = GEOMETRY.head_dim
    if GEOMETRY.spec.code_bits < 16:
        center = load_tile(at, there, DIM, GEOMETRY.summary_width)  # [RUNS, WIDTH]
        radius = load_tile(next_at, there, DIM, GEOMETRY.summary_width)  # [RUNS, WIDTH]
        center_scale = tl.load(rows.scales, mask=there, other=0.0).to(tl.float32)  # [RUNS]
        side = rows.scales + bounds.scale_strides.side
        radius_scale = tl.load(side, mask=there, other=0.0).to(tl.float32)  # [RUNS]
    else:
        center = load_tile(at, there, DIM, GEOMETRY.dim)  # [RUNS, DIM]
        radius = load_tile(next_at, there, DIM, GEOMETRY.dim)  # [RUNS, DIM]
        center_scale, radius_scale = there, there
    return Summaries(center, radius, center_scale, radius_scale)


@triton.jit
def products(summaries, q, GEOMETRY: tl.constexpr):
    """`[RUNS, ROWS]`: q.center + reach |q|.radius."""
    if GEOMETRY.spec.code_bits < 16:
        return run_code_scores(summaries, q)
    else:
        center, radius = summaries.center.to(q.rows.dtype), summaries.radius.to(q.rows.dtype)
        s = tl.dot(center, tl.trans(q.rows), input_precision="ieee")
        return tl.dot(radius, tl.trans(q.reached), s, input_precision="ieee")


@triton.jit
def score_runs(first, queries, shift, summaries, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[RUNS]`: the maximum over rows of q.center + reach |q|.radius - baseline.

    first: the rows of tile 0, ready for summaries that are seen `shift` positions nearer; mostly
        there is no other.
    """
    best = tl.full([summaries.center.shape[0]], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q = first
        if TILES > 1:
            q = load_run_queries(queries, tile, shift, GEOMETRY, TILING)
        s = products(summaries, q, GEOMETRY)
        best = tl.maximum(best, tl.max(s - q.baseline[None, :], axis=1))
    return best
