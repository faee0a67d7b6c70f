"""Rows in fp8, as `hipserve.ops.fp8` defines them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.platform import interpreting


class PageForm(NamedTuple):
    """How pages hold rows."""

    size: Any
    """Slots of a page."""
    k_scale: Any
    v_scale: Any
    """As `KeyPool` has them."""


@triton.jit
def to_pages(row, scale, dtype: tl.constexpr):
    """A row as pages of `dtype` hold it: in fp8 row / scale, rounded, and no larger than fp8 is."""
    if dtype.is_fp8():
        LARGEST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
        x = tl.div_rn(row.to(tl.float32), tl.full(row.shape, scale, tl.float32))
        return round_to(tl.clamp(x, -LARGEST, LARGEST, tl.PropagateNan.ALL), dtype)
    else:
        return row


if interpreting():  # whose own cast rounds otherwise

    @triton.jit
    def round_to(x, dtype: tl.constexpr):
        """x float32 in fp8, to nearest even."""
        BITS: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
        STEP: tl.constexpr = 2.0**-9 if dtype == tl.float8e4nv else 2.0**-16
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
        step = tl.maximum(((exponent - BITS) << 23).to(tl.float32, bitcast=True), STEP)
        n = x / step
        nearest = tl.floor(n + 0.5)
        odd = (nearest - n == 0.5) & (tl.floor(nearest / 2) * 2 != nearest)
        return (tl.where(odd, nearest - 1, nearest) * step).to(dtype)

else:

    @triton.jit
    def round_to(x, dtype: tl.constexpr):
        """x float32 in fp8, to nearest even."""
        return x.to(dtype)
