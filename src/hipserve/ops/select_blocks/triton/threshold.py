"""The best of a list without sorting it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_bits(scores):
    """uint32 that order as the float32 scores do; -0 and +0 are equal."""
    SIGN: tl.constexpr = 0x80000000
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits < SIGN, bits + SIGN, bits ^ 0xFFFFFFFF)


@triton.jit
def keep_best(scores, n, count, SIZE: tl.constexpr):
    """Which of the first `n` scores are the `count` best, and their indices among those kept.

    Both `[SIZE]`. Ties go to the lower index. The threshold is found by cutting its range in three,
    on integers that order as the scores do, until exactly `count` scores reach it; one sum of 32
    bits, which a warp does in one instruction, carries both counts.
    """
    i = tl.arange(0, SIZE)
    there = i < n
    bits = ordered_bits(tl.load(scores + i, mask=there, other=0.0))  # [SIZE]
    PAIR: tl.constexpr = tl.int32 if SIZE < 2**15 else tl.int64
    HALF: tl.constexpr = 16 if SIZE < 2**15 else 32
    wanted = tl.minimum(count, n)
    low = tl.min(tl.where(there, bits, 0xFFFFFFFF))  # the threshold lies in [low, low + span)
    span = tl.max(tl.where(there, bits, 0)) - low + 1
    reached = n
    while (reached > wanted) & (span > 1):
        third = (span + 1) // 3
        first, second = low + third, low + 2 * third
        counts = (there & (bits >= first)).to(PAIR)
        counts += (there & (bits >= second)).to(PAIR) << HALF
        counts = tl.sum(counts, axis=0)
        one, two = (counts & ((1 << HALF) - 1)).to(tl.int32), (counts >> HALF).to(tl.int32)
        low = tl.where(two >= wanted, second, tl.where(one >= wanted, first, low))
        span = tl.where(two >= wanted, span - 2 * third, third)
        reached = tl.where(two >= wanted, two, tl.where(one >= wanted, one, reached))
    kept = there & (bits >= low)
    if reached > wanted:
        equal = there & (bits == low)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        kept &= ~equal | (rank <= tl.sum(equal.to(tl.int32)) - (reached - wanted))
    return kept, tl.cumsum(kept.to(tl.int32), 0) - 1
