"""Rotary positions (RoPE, arXiv 2104.09864) of rows that were turned before: the definition.

A model turns pairs of channels of a query or key at position p by p times their frequency. To see a
key as if it lay `by` positions later is one more turn, by the same frequencies. They are kept as
fractions of a whole turn in units of 2^-32, so that an angle is the low 32 bits of a product of
integers: exact for any position, the same on every backend, and never far from zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WHOLE_TURN = 2**32


def turn(x: Tensor, by: Tensor | int, rope: Tensor) -> Tensor:
    """Rows as they would be `by` positions later.

    Args:
        x: `[..., head_dim]`, rows at any position.
        by: int64 that broadcasts with x but for its channels, or a number; below 0: earlier.
        rope: `[2, head_dim]` int32: the partner of each channel, and how far a position turns it.

    Returns:
        like x: x cos + x[partner] sin, computed in float32 or more.
    """
    partner, step = rope.long()
    by = torch.as_tensor(by, device=x.device)
    turned = (by[..., None] * step + WHOLE_TURN // 2) % WHOLE_TURN - WHOLE_TURN // 2
    angle = turned.double() * (2 * math.pi / WHOLE_TURN)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    return (y * angle.cos().to(wide) + y[..., partner] * angle.sin().to(wide)).to(x.dtype)


def pack_rope(partner: Tensor, frequencies: Tensor) -> Tensor:
    """`[2, head_dim]` int32, as `turn` takes it.

    Args:
        partner: `[head_dim]` int64: the other channel of each pair; itself where nothing turns.
        frequencies: `[head_dim]` float64, radians a position: x cos + x[partner] sin is a turn
            forwards, so those of a pair are opposite; 0 where nothing turns.
    """
    step = (frequencies * (WHOLE_TURN / (2 * math.pi))).round().long()
    half = WHOLE_TURN // 2
    return torch.stack([partner.long(), (step + half) % WHOLE_TURN - half]).int()


def segment_length(trained_length: int) -> int:
    """Keys that a search beyond the trained length moves together: the largest power of two up to
    a quarter of it, so that what it sees stays within the other half."""
    return 1 << max((trained_length // 4).bit_length() - 1, 0)


def nearest_segment(position: int, window_start: int, trained_length: int) -> int:
    """Where the last segment begins that a query block sees where it is; earlier ones it sees as if
    they lay there. 0, and nothing moves, for a block that begins within the trained length.

    Args:
        position: of the block's first row.
        window_start: where what it searches ends.
    """
    if position < trained_length:
        return 0
    size = segment_length(trained_length)
    return max(window_start // size - 1, 0) * size
