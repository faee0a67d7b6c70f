"""Codes: rows of numbers in few bits. The definition, in eager torch; kernels repeat it bit by bit.

A code of `bits` bits is integers n, at most 2^(bits - 1) - 1 in size, and a scale h; the row is
about h n. Scales have few significant bits, so that the product of h and a sum of n m, with the
integers m of a query, is exact in float32 in any order: every backend chooses the same blocks.

Keys are rotated before they are coded (Walsh-Hadamard, as in QuaRot, arXiv 2404.00456): a channel
that is far larger than the others would leave them no bits. Two rows rotated alike have the same
product, times the size of the rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUMMARY_BITS = QUERY_BITS = 8
TURNED_BITS = 14
"""Query rows are rotated as integers of so many bits: their sums are exact in any order, and a
tensor core can make them."""
REACH_STEPS = 64
"""Beside short codes, `bound_reach` is rounded to one of so many steps: integers stay integers."""


class Code(NamedTuple):
    """Rows of numbers, each about `scales * numbers`.

    Attributes:
        numbers: `[..., n]` float32 integers.
        scales: `[...]` float32.
    """

    numbers: Tensor
    scales: Tensor


def rotation_size(n: int) -> int:
    """Channels that are rotated together: the largest power of two that divides `n`."""
    return n & -n


def rotate(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of each `rotation_size(n)` channels of x `[..., n]`, float32.

    Not normalised. Every step adds and subtracts pairs, so its rounding has one order.
    """
    rows, step = x.float(), 1
    while step < rotation_size(x.shape[-1]):
        a, b = rows.unflatten(-1, (-1, 2, step)).unbind(-2)
        rows = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        step *= 2
    return rows


def encode_rotated(x: Tensor) -> Code:
    """Codes of query rows x `[..., n]` that meet codes of keys: rotated, and divided by the size of
    the rotation."""
    exact = encode(x, TURNED_BITS)
    turned = encode(rotate(exact.numbers), QUERY_BITS)
    return Code(turned.numbers, exact.scales / rotation_size(x.shape[-1]) * turned.scales)


def encode(x: Tensor, bits: int) -> Code:
    """Codes of x `[..., n]`."""
    x, limit = x.float(), 2 ** (bits - 1) - 1
    scales = round_scale(x.abs().amax(-1, keepdim=True) / limit, bits)
    numbers = torch.floor(torch.where(scales > 0, x / scales, 0.0) + 0.5)
    return Code(numbers.clamp(-limit, limit), scales.squeeze(-1))


def round_scale(scales: Tensor, bits: int) -> Tensor:
    """Rounds float32 `[...]` up, to a power of two, or to 4 significant bits for codes of 4 bits.

    Both are numbers of bfloat16.
    """
    below = (1 << (20 if bits == 4 else 23)) - 1
    return ((scales.view(torch.int32) + below) & ~below).view(torch.float32)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """`[..., n * bits / 8]` int8: the integers `[..., n]`; of 4 bits each, plus 8, two in a byte,
    the first of a pair in its low bits."""
    if bits == 8:
        return numbers.to(torch.int8)
    low, high = (numbers + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).view(torch.int8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """`[..., n]` float32: the integers that `pack` took."""
    if bits == 8:
        return packed.float()
    both = packed.contiguous().view(torch.uint8)
    return torch.stack([both & 15, both >> 4], dim=-1).flatten(-2).float() - 8
