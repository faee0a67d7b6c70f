"""The score of a run from its summary, the mean and standard deviation of its keys.

Nothing else knows what a summary is: another one is another version of this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.queries import load_baseline, load_rows


class RunQueries(NamedTuple):
    """A tile of query rows, made ready to score summaries."""

    rows: Any
    """`[ROWS, DIM]`: what multiplies the mean of a run."""
    reached: Any
    """`[ROWS, DIM]`: what multiplies its deviation."""
    baseline: Any
    """`[ROWS]`."""


class Summaries(NamedTuple):
    """A tile of summaries, `[RUNS, DIM]` both."""

    mean: Any
    deviation: Any


@triton.jit
def reach_out(rows, REACH: tl.constexpr):
    """`[ROWS, DIM]`: REACH * |q|, which multiplies deviations (`bound_reach`)."""
    return (tl.abs(rows.to(tl.float32)) * REACH).to(rows.dtype)


@triton.jit
def load_run_queries(queries, tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `RunQueries` of tile number `tile`."""
    rows, _ = load_rows(queries, tile, GEOMETRY, TILING)  # [ROWS, DIM]
    reached = reach_out(rows, GEOMETRY.options.bound_reach)
    return RunQueries(rows, reached, load_baseline(queries, tile, TILING))


@triton.jit
def load_summaries(at, side_stride, there, GEOMETRY: tl.constexpr):
    """The `Summaries` at the pointers `at` `[RUNS]`, zeros where not `there`."""
    mean = load_tile(at, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [RUNS, DIM]
    deviation = load_tile(at + side_stride, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [RUNS, DIM]
    return Summaries(mean, deviation)


@triton.jit
def score_runs(first, queries, summaries, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[RUNS]`: the maximum over rows of q.mean + REACH |q|.deviation - baseline.

    first: the `RunQueries` of tile 0; mostly there is no other.
    """
    best = tl.full([summaries.mean.shape[0]], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q = first
        if TILES > 1:
            q = load_run_queries(queries, tile, GEOMETRY, TILING)
        s = tl.dot(summaries.mean, tl.trans(q.rows), input_precision="ieee")
        s = tl.dot(summaries.deviation, tl.trans(q.reached), s, input_precision="ieee")
        best = tl.maximum(best, tl.max(s - q.baseline[None, :], axis=1))  # s: [RUNS, ROWS]
    return best
