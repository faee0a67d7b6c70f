"""The score of a run from its summary: today a box, the minimum and maximum of its keys.

Nothing else knows what a summary is: another one is another version of this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.select_blocks.triton.queries import load_baseline, load_rows


class RunQueries(NamedTuple):
    """A tile of query rows, made ready to score boxes."""

    to_maximum: Any
    """`[ROWS, DIM]`: what multiplies the maximum of a box."""
    to_minimum: Any
    """`[ROWS, DIM]`: what multiplies its minimum."""
    baseline: Any
    """`[ROWS]`."""


class Summaries(NamedTuple):
    """A tile of boxes, `[RUNS, DIM]` both."""

    minimum: Any
    maximum: Any


@triton.jit
def weigh_sides(rows, REACH: tl.constexpr):
    """`[ROWS, DIM]` twice: q split into weights of the maximum and of the minimum of a box.

    q * (center + REACH * sign(q) * half width), with the center and half width of the box: at
    reach 1 the corner that is best for q, an upper bound; at 0 the center (`bound_reach`).
    """
    NEAR: tl.constexpr = (1 + REACH) / 2
    FAR: tl.constexpr = (1 - REACH) / 2
    x = rows.to(tl.float32)
    to_maximum = tl.where(x > 0, x * NEAR, x * FAR)
    to_minimum = tl.where(x > 0, x * FAR, x * NEAR)
    return to_maximum.to(rows.dtype), to_minimum.to(rows.dtype)


@triton.jit
def load_run_queries(queries, tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `RunQueries` of tile number `tile`."""
    rows, _ = load_rows(queries, tile, GEOMETRY, TILING)  # [ROWS, DIM]
    to_maximum, to_minimum = weigh_sides(rows, GEOMETRY.spec.bound_reach)
    return RunQueries(to_maximum, to_minimum, load_baseline(queries, tile, TILING))


@triton.jit
def load_summaries(at, side_stride, there, GEOMETRY: tl.constexpr):
    """The `Summaries` at the pointers `at` `[RUNS]`, zeros where not `there`."""
    minimum = load_tile(at, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [RUNS, DIM]
    maximum = load_tile(at + side_stride, there, GEOMETRY.head_dim, GEOMETRY.dim)  # [RUNS, DIM]
    return Summaries(minimum, maximum)


@triton.jit
def score_runs(first, queries, summaries, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """`[RUNS]`: the maximum over rows of q_max * maximum + q_min * minimum - baseline.

    first: the `RunQueries` of tile 0; mostly there is no other.
    """
    best = tl.full([summaries.maximum.shape[0]], -float("inf"), tl.float32)
    TILES: tl.constexpr = TILING.row_tiles
    for tile in tl.range(TILES, num_stages=1):
        q = first
        if TILES > 1:
            q = load_run_queries(queries, tile, GEOMETRY, TILING)
        s = tl.dot(summaries.maximum, tl.trans(q.to_maximum), input_precision="ieee")
        s = tl.dot(summaries.minimum, tl.trans(q.to_minimum), s, input_precision="ieee")
        best = tl.maximum(best, tl.max(s - q.baseline[None, :], axis=1))  # s: [RUNS, ROWS]
    return best
