"""What the Triton kernels share: rows of a packed batch, keys in pages, launches in a chain."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for other GPUs, whose kernels are never chained
    gdc_launch_dependents = gdc_wait = None


@functools.cache
def power_of_2(n: int) -> int:
    """The next power of two, remembered: Triton's own function takes microseconds."""
    return triton.next_power_of_2(n)


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Waits for all that earlier kernels wrote: the first thing that a chained kernel does.

    Hopper's programmatic dependent launch starts a kernel while the one before it ends. Every
    program waits, so that each kernel ends after all those before it.
    """
    if CHAINED:
        gdc_wait()


@triton.jit
def lead(CHAINED: tl.constexpr):
    """Lets the next kernel take its places as soon as all programs of this one have theirs.

    For a kernel that leaves room: otherwise programs that wait keep out programs that work.
    """
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def load_tile(rows, mask, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr = True):
    """`[n, DIM]` from row pointers `[n]`, zeros where `mask` is off or beyond HEAD_DIM."""
    d = tl.arange(0, DIM)
    if MASKED:
        keep = mask[:, None] & (d < HEAD_DIM)[None, :]
        return tl.load(rows[:, None] + d[None, :], mask=keep, other=0.0)
    if DIM != HEAD_DIM:
        return tl.load(rows[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(rows[:, None] + d[None, :])


@triton.jit
def key_offsets(strides, table, page_size, keys, mask, MASKED: tl.constexpr = True):
    """Offsets `[n]` int64 of the keys at positions `keys` of the sequence with page ids `table`."""
    if MASKED:
        page = tl.load(table + keys // page_size, mask=mask, other=0).to(tl.int64)
    else:
        page = tl.load(table + keys // page_size).to(tl.int64)
    return page * strides[0] + (keys % page_size).to(tl.int64) * strides[1]
