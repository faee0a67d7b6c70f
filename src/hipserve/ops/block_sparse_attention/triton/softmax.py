"""The online softmax: tiles of keys and values, one after the other, into one running result.

Scores are in units of log2(e), so exponentials are powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.pages import key_offsets
from hipserve.ops._triton.tiles import load_tile
from hipserve.ops.block_sparse_attention.triton.key_list import list_positions


class Softmax(NamedTuple):
    """What the tiles so far amount to, for every row."""

    acc: Any
    """`[ROWS, DIM]` float32: sum of 2^(score - maximum) times value."""
    maximum: Any
    """`[ROWS]` float32: the maximum score, -inf before the first visible key."""
    total: Any
    """`[ROWS]` float32: sum of 2^(score - maximum)."""


class Scales(NamedTuple):
    """Factors of what pages hold."""

    scores: Any
    """Of q.k: sm_scale times that of keys."""
    outputs: Any
    """Of sums of values: that of values."""


class Reading(NamedTuple):
    """What all tiles of a program share."""

    q_tile: Any
    """`[ROWS, DIM]`."""
    k_pages: Any
    v_pages: Any
    """`PagedRows`, both."""
    key_list: Any
    end: Any
    """Where the program's part of the list ends."""
    last_seen: Any
    """`[ROWS]`: the last entry of the list that each row sees."""
    position: Any
    """`[ROWS]`: where each row stands in the sequence."""
    sm_scale: Any
    softcap: Any
    sliding_window: Any
    turned: Any
    """Pointer to the sinks and chosen keys as blocks beyond the trained length see them, in the
    order of the list; None where nothing is moved."""


@triton.jit
def score_tile(reading, k_tile, CAPPED: tl.constexpr):
    """`[ROWS, KEYS]` float32: log2(e) * sm_scale * q k^T, or softcap * tanh(that / softcap)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    s = tl.dot(reading.q_tile, tl.trans(k_tile), input_precision="ieee")  # [ROWS, KEYS]
    if CAPPED:
        e = tl.exp2(tl.abs(s) * (-2 * LOG2E * reading.sm_scale / reading.softcap))
        t = (1 - e) / (1 + e)
        return tl.where(s * reading.sm_scale < 0, -t, t) * (reading.softcap * LOG2E)
    return s * (reading.sm_scale * LOG2E)


@triton.jit
def visible_keys(reading, n, there, WINDOWED: tl.constexpr):
    """`[ROWS, KEYS]`: which rows see the n-th keys of the list."""
    visible = there[None, :] & (n[None, :] <= reading.last_seen[:, None])
    if WINDOWED:
        first = reading.position[:, None] - reading.sliding_window
        visible = visible & (reading.key_list.window + n[None, :] > first)
    return visible


@triton.jit
def load_key_tile(reading, k_rows, n, there, MASKED: tl.constexpr, GEOMETRY: tl.constexpr):
    """`[KEYS, DIM]`: the n-th keys of the list, turned ones or those of the rows `k_rows`."""
    HEAD_DIM: tl.constexpr = GEOMETRY.head_dim
    DIM: tl.constexpr = GEOMETRY.dim
    DTYPE: tl.constexpr = reading.q_tile.dtype
    if GEOMETRY.streams:
        moved = n < reading.key_list.sinks + reading.key_list.chosen
        turned = reading.turned + n * HEAD_DIM
        if k_rows.dtype == turned.dtype:
            k_tile = load_tile(tl.where(moved, turned, k_rows), there, HEAD_DIM, DIM, MASKED)
        else:
            k_tile = load_tile(k_rows, there & ~moved, HEAD_DIM, DIM).to(DTYPE)
            k_tile += load_tile(turned, there & moved, HEAD_DIM, DIM)
    else:
        k_tile = load_tile(k_rows, there, HEAD_DIM, DIM, MASKED).to(DTYPE)
    return k_tile


@triton.jit
def attend_tile(
    state, reading, start, MASKED: tl.constexpr, GEOMETRY: tl.constexpr, TILING: tl.constexpr
):
    """The `Softmax` after the keys [start, start + KEYS) of the list.

    m' = max(m, s);  l' = l 2^(m - m') + sum 2^(s - m');  acc' = acc 2^(m - m') + 2^(s - m') V
    """
    n = start + tl.arange(0, TILING.keys)
    there = n < reading.end
    if GEOMETRY.tiled:
        positions = n  # tiles follow each other as the keys of the list do
    else:
        positions = list_positions(reading.key_list, n, GEOMETRY.key_block_size)
    offsets = key_offsets(reading.k_pages, positions, there, MASKED)
    k_rows, v_rows = reading.k_pages.start + offsets, reading.v_pages.start + offsets
    if not GEOMETRY.same_strides:
        v_rows = reading.v_pages.start + key_offsets(reading.v_pages, positions, there, MASKED)
    k_tile = load_key_tile(reading, k_rows, n, there, MASKED, GEOMETRY)  # [KEYS, DIM]
    v_tile = load_tile(v_rows, there, GEOMETRY.head_dim, GEOMETRY.dim, MASKED)  # [KEYS, DIM]
    v_tile = v_tile.to(reading.q_tile.dtype)
    s = score_tile(reading, k_tile, GEOMETRY.capped)  # [ROWS, KEYS]
    if MASKED:
        s = tl.where(visible_keys(reading, n, there, GEOMETRY.windowed), s, -float("inf"))
    maximum = tl.maximum(state.maximum, tl.max(s, axis=1))
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(state.maximum - shift)
    total = state.total * shrink + tl.sum(p, axis=1)
    p = p.to(v_tile.dtype)  # [ROWS, KEYS]
    acc = tl.dot(p, v_tile, state.acc * shrink[:, None], input_precision="ieee")  # [ROWS, DIM]
    return Softmax(acc, maximum, total)
