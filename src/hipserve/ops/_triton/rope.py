"""Rows turned by positions, as `hipserve.ops.rope` defines it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cos_sin(turns):
    """cos and sin of 2^-32 `turns` of a whole turn, int32: of what is left of the nearest quarter,
    by Taylor."""
    STEP: tl.constexpr = 1.4629180792671596e-9  # 2 pi / 2^32
    quarter = (turns + (1 << 29)) >> 30
    x = (turns - (quarter << 30)).to(tl.float32) * STEP
    y = x * x
    s = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    odd = (quarter & 1) == 1
    a, b = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -a, a), tl.where((quarter & 2) == 2, -b, b)


@triton.jit
def spread(x, SIZE: tl.constexpr, DIM: tl.constexpr):
    """`[n * SIZE, DIM]`: each row of x `[n, DIM]` SIZE times."""
    N: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[:, None, :], [N, SIZE, DIM]), [N * SIZE, DIM])


@triton.jit
def in_eights(rope, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The partners of eight channels lie together: those of a row that turns in halves do."""
    d = tl.arange(0, DIM)
    inside = d < HEAD_DIM
    partner = tl.load(rope + d, mask=inside, other=0)  # [DIM]
    first = tl.load(rope + d // 8 * 8, mask=inside, other=0)  # [DIM]
    together = ((partner == first + d % 8) & (first % 8 == 0)) | ~inside
    return tl.min(together.to(tl.int32), axis=0) == 1


@triton.jit
def turn_tile(
    tile, rows, there, by, rope, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, EIGHTS: tl.constexpr
):
    """x cos + x[partner] sin: a tile `[n, DIM]` as it would be `by` positions later.

    rows: pointers `[n]` to what the tile was loaded from, where `there` `[n]`.
    by: `[m]` int32, of n / m rows each.
    rope: pointer to int32 `[2, HEAD_DIM]`, partners and turns of a position.
    EIGHTS: `in_eights`, so that eight partners are read at once.
    """
    N: tl.constexpr = tile.shape[0]
    M: tl.constexpr = by.shape[0]
    d = tl.arange(0, DIM)
    inside = d < HEAD_DIM
    step = tl.load(rope + HEAD_DIM + d, mask=inside, other=0)  # [DIM]
    if EIGHTS:
        partner = tl.load(rope + d // 8 * 8, mask=inside, other=0) + d % 8  # [DIM]
        partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
    else:
        partner = tl.load(rope + d, mask=inside, other=0)  # [DIM]
    keep = there[:, None] & inside[None, :]
    others = tl.load(rows[:, None] + partner[None, :], mask=keep, other=0.0)  # [N, DIM]
    cos, sin = cos_sin(by[:, None] * step[None, :])  # [M, DIM]
    if M > 1:
        cos, sin = spread(cos, N // M, DIM), spread(sin, N // M, DIM)
    return (tile.to(tl.float32) * cos + others.to(tl.float32) * sin).to(tile.dtype)
