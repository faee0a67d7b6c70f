"""Tiles of rows, padded to a power of two."""

from __future__ import annotations

import functools

import triton
import triton.language as tl


@functools.cache
def power_of_2(n: int) -> int:
    """The next power of two, remembered: Triton's own function takes microseconds."""
    return triton.next_power_of_2(n)


@triton.jit
def load_tile(rows, mask, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr = True):
    """`[n, DIM]` from row pointers `[n]`, zeros where `mask` is off or beyond HEAD_DIM."""
    d = tl.arange(0, DIM)
    if MASKED:
        keep = mask[:, None] & (d < HEAD_DIM)[None, :]
        return tl.load(rows[:, None] + d[None, :], mask=keep, other=0.0)  # [n, DIM]
    if DIM != HEAD_DIM:
        return tl.load(rows[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(rows[:, None] + d[None, :])  # [n, DIM]
