"""Codes in kernels: rows of numbers in few bits, as `hipserve.ops.codes` defines them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.platform import interpreting


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
def hadamard(HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """`[DIM, DIM]` int8: what `rotate` multiplies rows by, 1 or -1 in its blocks, 0 elsewhere."""
    SIZE: tl.constexpr = HEAD_DIM & -HEAD_DIM
    i, j = tl.arange(0, DIM)[:, None], tl.arange(0, DIM)[None, :]
    bits = (i & j) & (SIZE - 1)
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.where(i // SIZE == j // SIZE, 1 - 2 * (bits & 1), 0).to(tl.int8)


@triton.jit
def rotate_integers(numbers, matrix):
    """`rotate` of integers of 14 bits `[N, DIM]`, by tensor cores: in two parts of 8 bits each."""
    whole = numbers.to(tl.int32)
    high = (whole + 64) >> 7
    low = whole - (high << 7)
    turned = tl.dot(high.to(tl.int8), matrix) * 128 + tl.dot(low.to(tl.int8), matrix)
    return turned.to(tl.float32)


@triton.jit
def encode(x, BITS: tl.constexpr):
    """The `Code` of x `[N, DIM]` float32: integers up to 2^(BITS - 1) - 1 in size."""
    LIMIT: tl.constexpr = 2 ** (BITS - 1) - 1
    BELOW: tl.constexpr = (1 << (20 if BITS == 4 else 23)) - 1
    top = tl.max(tl.abs(x), axis=1)
    exact = tl.div_rn(top, tl.full(top.shape, LIMIT, tl.float32))
    bits = (exact.to(tl.int32, bitcast=True) + BELOW) & ~BELOW
    scale = bits.to(tl.float32, bitcast=True)
    if BITS == 4:
        divisor = tl.where(scale > 0, scale, 1.0)
        quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    else:  # a power of two, whose reciprocal is exact; 0 meets a row of zeros
        reciprocal = (0x7F000000 - bits).to(tl.float32, bitcast=True)
        quotient = x * reciprocal[:, None]
    numbers = tl.floor(quotient + 0.5)
    return Code(tl.clamp(numbers, -LIMIT, LIMIT), scale)


@triton.jit
def pack_nibbles(numbers, DIM: tl.constexpr):
    """`[N, DIM // 2]` int8 of integers `[N, DIM]` from -7 to 7: the first of a pair in low bits."""
    N: tl.constexpr = numbers.shape[0]
    low, high = tl.split(tl.reshape(numbers.to(tl.int32) + 8, [N, DIM // 2, 2]))
    return (low | (high << 4)).to(tl.int8)


# Codes of four bytes at a time: a byte by itself would be widened, masked and narrowed again.
if interpreting():

    @triton.jit
    def low_nibbles(packed):
        """The low four bits of each byte, like `packed` int8."""
        return packed & 15

    @triton.jit
    def high_nibbles(packed):
        """The high four bits of each byte, like `packed` int8."""
        return (packed >> 4) & 15

else:

    @triton.jit
    def low_nibbles(packed):
        """The low four bits of each byte, like `packed` int8."""
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )

    @triton.jit
    def high_nibbles(packed):
        """The high four bits of each byte, like `packed` int8."""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
