"""Scores from codes: sums of integers, exact in any order, times scales of few bits.

`reference/scores.py` has the definition. Query rows are coded once, by the kernel that finds their
baselines; the kernels behind it load their codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.codes import (
    encode,
    hadamard,
    high_nibbles,
    low_nibbles,
    rotate,
    rotate_integers,
)
from hipserve.ops._triton.pages import CacheStrides, SummaryStrides
from hipserve.ops.codes import QUERY_BITS, REACH_STEPS, TURNED_BITS

SIDES = tl.constexpr(3)
"""Codes of a query row: of the rotated row, which meets keys; of the row itself, which meets
centers;
of `bound_reach` times its size, which meets radii."""
BITS, TURNED = tl.constexpr(QUERY_BITS), tl.constexpr(TURNED_BITS)
STEPS = tl.constexpr(REACH_STEPS)


class CodedRows(NamedTuple):
    """Codes of keys or of summaries of one KV head, as a sequence finds them."""

    start: Any
    strides: Any
    """`CacheStrides` or `SummaryStrides`, as those of the scales."""
    table: Any
    page_size: Any
    scales: Any
    """The scales of short codes; without these any pointer, as a kernel's record holds no None."""
    scale_strides: Any


class QueryCodes(NamedTuple):
    """Where the codes of the rows of one query block and group of heads are."""

    numbers: Any
    """Pointer to int8 `[rows, SIDES, query_width]`."""
    scales: Any
    """Pointer to float32 `[rows, SIDES]`: of the rotated row, of the row; the sum of the first."""


class QueryCode(NamedTuple):
    """A tile of rows that meets codes of keys."""

    low: Any
    """`[ROWS, WIDTH]` int8: all channels, or the even ones of codes of 4 bits."""
    high: Any
    """`[ROWS, WIDTH]` int8: the odd ones."""
    begin: Any
    """`[ROWS]` int32: what a sum begins with. Integers of 4 bits are stored plus 8."""
    scale: Any
    """`[ROWS]`."""
    baseline: Any
    """`[ROWS]`."""


class RunQueryCode(NamedTuple):
    """A tile of rows that meets codes of summaries."""

    rows: Any
    """`[ROWS, WIDTH]` int8."""
    reached: Any
    """`[ROWS, WIDTH]` int8."""
    scale: Any
    """`[ROWS]`."""
    baseline: Any
    """`[ROWS]`."""


@triton.jit
def coded_keys(start, strides, scales, scale_strides, kv_head, table, page_size):
    """The `CodedRows` of the keys of a KV head."""
    strides, scale_strides = CacheStrides(*strides), CacheStrides(*scale_strides)
    return coded_rows(start, strides, scales, scale_strides, kv_head, table, page_size)


@triton.jit
def coded_runs(start, strides, scales, scale_strides, kv_head, table, page_size):
    """The `CodedRows` of the summaries of a KV head."""
    strides, scale_strides = SummaryStrides(*strides), SummaryStrides(*scale_strides)
    return coded_rows(start, strides, scales, scale_strides, kv_head, table, page_size)


@triton.jit
def coded_rows(start, strides, scales, scale_strides, kv_head, table, page_size):
    """The `CodedRows` of a KV head, by records of strides."""
    start += kv_head * strides.head
    scales += kv_head * scale_strides.head
    return CodedRows(start, strides, table, page_size, scales, scale_strides)


@triton.jit
def rotation_matrix(GEOMETRY: tl.constexpr):
    """`[DIM, DIM]` of a rotation by tensor cores, or `[16]` of nothing where it would not fit."""
    if GEOMETRY.turns_by_matrix:
        return hadamard(GEOMETRY.head_dim, GEOMETRY.dim)
    else:
        return tl.arange(0, 16)


@triton.jit
def store_query_codes(codes, r, rows, matrix, GEOMETRY: tl.constexpr):
    """Codes the r-th sampled rows, `[n, DIM]`; `matrix`: as `rotation_matrix` makes it."""
    WIDTH: tl.constexpr = GEOMETRY.query_width
    row, d = rows.to(tl.float32), tl.arange(0, GEOMETRY.dim)
    at = codes.numbers + r[:, None] * (SIDES * WIDTH) + d[None, :]
    scale_at = codes.scales + r * SIDES
    plain = encode(row, BITS)
    reached = (tl.abs(plain.numbers).to(tl.int32) * GEOMETRY.reach_steps + STEPS // 2) // STEPS
    tl.store(at + WIDTH, plain.numbers.to(tl.int8))
    tl.store(at + 2 * WIDTH, reached.to(tl.int8))
    tl.store(scale_at + 1, plain.scale)
    exact = encode(row, TURNED)
    if GEOMETRY.turns_by_matrix:
        rotated = encode(rotate_integers(exact.numbers, matrix), BITS)
    else:
        rotated = encode(rotate(exact.numbers, GEOMETRY.head_dim, GEOMETRY.dim), BITS)
    SIZE: tl.constexpr = GEOMETRY.head_dim & -GEOMETRY.head_dim
    if GEOMETRY.spec.code_bits == 4:  # even channels first, then the odd ones
        at += (d // 2 + d % 2 * (WIDTH // 2) - d)[None, :]
    tl.store(at, rotated.numbers.to(tl.int8))
    tl.store(scale_at, exact.scale / SIZE * rotated.scale)
    tl.store(scale_at + 2, tl.sum(rotated.numbers, axis=1))


@triton.jit
def load_side(
    codes, tile, first, count, WIDTH: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """`[ROWS, WIDTH]` int8: `count` bytes of the coded rows of a tile, from byte `first` on."""
    r, d = tile * TILING.rows + tl.arange(0, TILING.rows), tl.arange(0, WIDTH)
    at = codes.numbers + r[:, None] * (SIDES * GEOMETRY.query_width) + first + d[None, :]
    return tl.load(at, mask=(d < count)[None, :], other=0)  # [ROWS, WIDTH]


@triton.jit
def load_query_code(codes, baseline, tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `QueryCode` of tile number `tile`."""
    at = codes.scales + (tile * TILING.rows + tl.arange(0, TILING.rows)) * SIDES
    scale = tl.load(at)  # [ROWS]
    HALF: tl.constexpr = GEOMETRY.query_width // 2
    if GEOMETRY.spec.code_bits == 4:
        COUNT: tl.constexpr = GEOMETRY.head_dim // 2
        low = load_side(codes, tile, 0, COUNT, HALF, GEOMETRY, TILING)
        high = load_side(codes, tile, HALF, COUNT, HALF, GEOMETRY, TILING)
        begin = (-8 * tl.load(at + 2)).to(tl.int32)
    else:
        low = load_side(codes, tile, 0, GEOMETRY.head_dim, GEOMETRY.code_width, GEOMETRY, TILING)
        high = low
        begin = tl.zeros_like(scale).to(tl.int32)
    return QueryCode(low, high, begin, scale, baseline)


@triton.jit
def load_run_query_code(codes, baseline, tile, GEOMETRY: tl.constexpr, TILING: tl.constexpr):
    """The `RunQueryCode` of tile number `tile`."""
    WIDTH: tl.constexpr = GEOMETRY.query_width
    COUNT: tl.constexpr = GEOMETRY.head_dim
    SUMMARY: tl.constexpr = GEOMETRY.summary_width
    rows = load_side(codes, tile, WIDTH, COUNT, SUMMARY, GEOMETRY, TILING)
    reached = load_side(codes, tile, 2 * WIDTH, COUNT, SUMMARY, GEOMETRY, TILING)
    at = codes.scales + (tile * TILING.rows + tl.arange(0, TILING.rows)) * SIDES
    return RunQueryCode(rows, reached, tl.load(at + 1), baseline)


@triton.jit
def key_code_scores(codes, scales, q, GEOMETRY: tl.constexpr):
    """`[KEYS, ROWS]`: q.scale * (scales * sum of q n), n the integers in codes `[KEYS, WIDTH]`."""
    if GEOMETRY.spec.code_bits == 4:
        begin = tl.broadcast_to(q.begin[None, :], [codes.shape[0], q.begin.shape[0]])
        sums = tl.dot(low_nibbles(codes), tl.trans(q.low), begin, out_dtype=tl.int32)
        sums = tl.dot(high_nibbles(codes), tl.trans(q.high), sums, out_dtype=tl.int32)
    else:
        sums = tl.dot(codes, tl.trans(q.low))
    return q.scale[None, :] * (scales[:, None] * sums.to(tl.float32))


@triton.jit
def run_code_scores(summaries, q):
    """`[RUNS, ROWS]`: q.scale * (center_scale * sum of q c + radius_scale * sum of reached r)."""
    near = tl.dot(summaries.center, tl.trans(q.rows)).to(tl.float32)
    far = tl.dot(summaries.radius, tl.trans(q.reached)).to(tl.float32)
    both = summaries.center_scale[:, None] * near + summaries.radius_scale[:, None] * far
    return q.scale[None, :] * both
