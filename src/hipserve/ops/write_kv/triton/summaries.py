"""The summary of a run of keys, computed and stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.codes import encode
from hipserve.ops._triton.tiles import load_tile
from hipserve.plan.runs import BOX_RADIUS

RADIUS = tl.constexpr(BOX_RADIUS)
BOX_ROWS = tl.constexpr(16)
"""Keys of a tile of a longer run. Three tiles are on their way at a time."""


class SummaryRows(NamedTuple):
    """Where summaries go."""

    start: Any
    strides: Any
    """`SummaryStrides`, as those of the scales."""
    scales: Any
    """None where summaries are not coded."""
    scale_strides: Any


class Summary(NamedTuple):
    """What an index holds of a run, `[DIM]` each: float64 or float32."""

    center: Any
    radius: Any


@triton.jit
def moments_of_run(
    keys, stride, first, end, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):
    """The `Summary` of a run of the finest level, the keys in slots [first, end).

    mean = S1 / n and deviation = sqrt(n S2 - S1^2) / n, with the sums S1 of the keys and S2 of
    their squares: exact in float64 for keys of 16 bits, in any order.

    ROWS keys at a time: all of a run at once wait for memory least, few in one warp add up fastest.
    """
    totals = tl.zeros([ROWS, DIM], tl.float64)
    squares = tl.zeros([ROWS, DIM], tl.float64)
    for start in tl.range(first, end, ROWS, loop_unroll_factor=16 // ROWS):
        slot = start + tl.arange(0, ROWS)
        at = keys + slot.to(tl.int64) * stride
        tile = load_tile(at, slot < end, HEAD_DIM, DIM)  # [ROWS, DIM], else zeros
        tile = tile.to(tl.float32).to(tl.float64)  # no cast leads from fp8 to float64
        totals += tile
        squares += tile * tile
    total = tl.sum(totals, axis=0)
    n = (end - first).to(tl.float64)
    spread = tl.maximum(n * tl.sum(squares, axis=0) - total * total, 0.0)
    return Summary(total / n, tl.sqrt(spread) / n)


@triton.jit
def box_of_run(keys, stride, first, end, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The `Summary` of a longer run: middle of minimum and maximum, and RADIUS of half their
    distance."""
    low = tl.full([BOX_ROWS, DIM], float("inf"), tl.float32)
    high = tl.full([BOX_ROWS, DIM], -float("inf"), tl.float32)
    for start in tl.range(first, end, BOX_ROWS, num_stages=3):
        # Behind the end the last one again.
        slot = tl.minimum(start + tl.arange(0, BOX_ROWS), end - 1)
        at = keys + slot.to(tl.int64) * stride
        tile = load_tile(at, slot < end, HEAD_DIM, DIM).to(tl.float32)  # [BOX_ROWS, DIM]
        low, high = tl.minimum(low, tile), tl.maximum(high, tile)
    minimum, maximum = tl.min(low, axis=0), tl.max(high, axis=0)
    return Summary((minimum + maximum) / 2, (maximum - minimum) / 2 * RADIUS)


@triton.jit
def summarize_run(
    keys,
    stride,
    first,
    end,
    FINEST: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """The `Summary` of the keys in slots [first, end); of the finest level ROWS at a time."""
    if FINEST:
        return moments_of_run(keys, stride, first, end, ROWS, HEAD_DIM, DIM)
    else:
        return box_of_run(keys, stride, first, end, HEAD_DIM, DIM)


@triton.jit
def store_side(at, scale_at, side, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes one `[DIM]` side of a summary to the pointer `at`: itself, or its code."""
    DIM: tl.constexpr = side.shape[0]
    d = tl.arange(0, DIM)
    row = side.to(tl.float32)
    if scale_at is None:
        tl.store(at + d, row.to(at.dtype.element_ty), mask=d < HEAD_DIM)
    else:
        code = encode(tl.reshape(row, [1, DIM]), BITS)
        numbers = tl.reshape(code.numbers, [DIM]).to(tl.int8)
        tl.store(at + d, numbers, mask=d < HEAD_DIM)
        tl.store(scale_at + tl.arange(0, 1), code.scale.to(tl.bfloat16))


@triton.jit
def store_summary(to, run, page, head, summary, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes the `Summary` of a run of a page and head to the `SummaryRows`."""
    strides, scale_strides = to.strides, to.scale_strides
    at = to.start + page * strides.page + run * strides.run + head * strides.head
    scale_at, next_scale = None, None
    if to.scales is not None:
        scale_at = to.scales + page * scale_strides.page + run * scale_strides.run
        scale_at += head * scale_strides.head
        next_scale = scale_at + scale_strides.side
    store_side(at, scale_at, summary.center, BITS, HEAD_DIM)
    store_side(at + strides.side, next_scale, summary.radius, BITS, HEAD_DIM)
