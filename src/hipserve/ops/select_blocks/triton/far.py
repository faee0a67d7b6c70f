"""Far keys, which a query block beyond the trained length sees nearer than they are.

`hipserve.ops.rope` has the rule: keys before the nearest segment are seen as if their own segment
began there. To see a key later is to turn the query back, so one tile of keys or runs may meet the
queries several times, once for each segment in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton.rope import in_eights, turn_tile


class FarKeys(NamedTuple):
    """What a query block sees nearer."""

    rope: Any
    """Pointer to int32 `[2, head_dim]`."""
    nearest: Any
    """Where the nearest segment begins; 0 where nothing is moved."""
    eights: Any
    """The partners of eight channels lie together (`in_eights`)."""


class Shifts(NamedTuple):
    """How much nearer each of some keys or runs is seen."""

    each: Any
    """`[n]`, multiples of a segment; -1 for what is not there."""
    first: Any
    last: Any
    """The minimum and the maximum of those that are there."""


@triton.jit
def far_keys(rope, block, window_start, GEOMETRY: tl.constexpr):
    """The `FarKeys` of a `QueryBlock` whose window starts there."""
    nearest, eights = window_start * 0, False
    if GEOMETRY.streams:
        SEGMENT: tl.constexpr = GEOMETRY.segment
        begin = tl.maximum(window_start // SEGMENT - 1, 0) * SEGMENT
        nearest = tl.where(block.position >= GEOMETRY.spec.trained_length, begin, 0)
        eights = in_eights(rope, GEOMETRY.head_dim, GEOMETRY.dim)
    return FarKeys(rope, nearest, eights)


@triton.jit
def shift_of(far, position, GEOMETRY: tl.constexpr):
    """How much nearer what begins at `position` is seen, like it: a multiple of a segment."""
    SEGMENT: tl.constexpr = GEOMETRY.segment
    return tl.maximum(far.nearest - position // SEGMENT * SEGMENT, 0)


@triton.jit
def greatest_shift(far, positions, there, GEOMETRY: tl.constexpr):
    """That of the first of what begins at ascending `positions` `[n]`; -1 if nothing is there."""
    return tl.max(tl.where(there, shift_of(far, positions, GEOMETRY), -1), axis=0)


@triton.jit
def shifts_of(far, positions, there, GEOMETRY: tl.constexpr):
    """The `Shifts` of what begins at `positions` `[n]`."""
    shift = shift_of(far, positions, GEOMETRY)
    first = tl.min(tl.where(there, shift, 2**30), axis=0)
    each = tl.where(there, shift, -1)
    return Shifts(each, first, tl.max(each, axis=0))


@triton.jit
def see_from(tile, rows, there, shift, far, GEOMETRY: tl.constexpr, EIGHTS: tl.constexpr):
    """`[n, DIM]`: query rows, turned back to see keys `shift` positions nearer."""
    by = tl.zeros([1], tl.int32) - shift
    return turn_tile(tile, rows, there, by, far.rope, GEOMETRY.head_dim, GEOMETRY.dim, EIGHTS)
