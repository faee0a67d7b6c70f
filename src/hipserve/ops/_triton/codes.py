"""Codes in kernels: rows of numbers in few bits, as `hipserve.ops.codes` defines them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Code(NamedTuple):
    """Rows in few bits: a row is about `scale * numbers`."""

    numbers: Any
    """`[N, DIM]` float32 integers."""
    scale: Any
    """`[N]` float32."""


@triton.jit
def butterfly(x, STEP: tl.constexpr, DIM: tl.constexpr):
    """`[N, DIM]`: pairs of channels a, b of x `[N, DIM]`, STEP apart, become a + b, a - b."""
    N: tl.constexpr = x.shape[0]
    pairs = tl.reshape(x, [N, DIM // (2 * STEP), 2, STEP])
    a, b = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [N, DIM])


@triton.jit
def rotate(x, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """`[N, DIM]`: the Walsh-Hadamard transform of x `[N, DIM]` float32, zeros beyond HEAD_DIM."""
    SIZE: tl.constexpr = HEAD_DIM & -HEAD_DIM
    for step in tl.static_range(SIZE.bit_length() - 1):
        x = butterfly(x, 1 << step, DIM)
    return x


@triton.jit
def encode(x, BITS: tl.constexpr):
    """The `Code` of x `[N, DIM]` float32: integers up to 2^(BITS - 1) - 1 in size."""
    LIMIT: tl.constexpr = 2 ** (BITS - 1) - 1
    BELOW: tl.constexpr = (1 << (23 if BITS == 8 else 20)) - 1
    top = tl.max(tl.abs(x), axis=1)
    exact = tl.div_rn(top, tl.full(top.shape, LIMIT, tl.float32))
    bits = (exact.to(tl.int32, bitcast=True) + BELOW) & ~BELOW
    scale = bits.to(tl.float32, bitcast=True)
    divisor = tl.where(scale > 0, scale, 1.0)
    quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    numbers = tl.floor(tl.where(scale[:, None] > 0, quotient, 0.0) + 0.5)
    return Code(tl.clamp(numbers, -LIMIT, LIMIT), scale)


@triton.jit
def pack_nibbles(numbers, DIM: tl.constexpr):
    """`[N, DIM // 2]` int8 of integers `[N, DIM]` from -7 to 7: the first of a pair in low bits."""
    N: tl.constexpr = numbers.shape[0]
    low, high = tl.split(tl.reshape(numbers.to(tl.int32) + 8, [N, DIM // 2, 2]))
    return (low | (high << 4)).to(tl.int8)
