"""The union of two ascending lists."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_bound(ascending, n, x, LOG: tl.constexpr):
    """How many of the first `n` entries of `ascending` are less than each x, by bisection."""
    low = tl.zeros_like(x)
    high = low + n
    for _ in range(LOG + 1):
        middle = (low + high) // 2
        less = tl.load(ascending + middle, mask=middle < n, other=0) < x  # like x
        go = low < high
        low = tl.where(go & less, middle + 1, low)
        high = tl.where(go & ~less, middle, high)
    return low


@triton.jit
def unite(a, n, b, m, ranks, out, SIZE: tl.constexpr):
    """Writes the union of `a` (n entries) and `b` (m), ascending and without repeats.

    An entry's index is its own plus the number of smaller ones that the other list adds. `ranks`
    (SIZE entries) keeps how many entries of b before each are not in a.
    """
    LOG: tl.constexpr = SIZE.bit_length()
    i = tl.arange(0, SIZE)
    from_b = tl.load(b + i, mask=i < m, other=0)  # [SIZE]
    below = lower_bound(a, n, from_b, LOG)
    twin = tl.load(a + below, mask=below < n, other=-1) == from_b  # [SIZE]
    only_b = (i < m) & ~twin
    rank = tl.cumsum(only_b.to(tl.int32), 0)
    tl.store(ranks + i, rank - only_b.to(tl.int32))
    tl.store(out + below + rank - 1, from_b, mask=only_b)
    tl.debug_barrier()
    from_a = tl.load(a + i, mask=i < n, other=0)  # [SIZE]
    above = lower_bound(b, m, from_a, LOG)
    all_only_b = tl.sum(only_b.to(tl.int32))
    rank = tl.load(ranks + above, mask=(i < n) & (above < m), other=0)  # [SIZE]
    tl.store(out + i + tl.where(above < m, rank, all_only_b), from_a, mask=i < n)
