"""Limits of the native kernels' scratch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backends import every_tier, using
from hipserve import hip_attention


@every_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_heads_share_a_key_than_rows_are_stacked(tier: str, dtype: torch.dtype) -> None:
    """One token's heads stay together: 1,000 of them are more than an item stacks otherwise."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn((1, 70, 1000, 64), generator=g).to(dtype)
    k, v = (torch.randn((1, 70, 1, 64), generator=g).to(dtype) for _ in range(2))
    with using(f"cpu:{tier}") as backend:
        out = hip_attention(q, k, v, backend=backend)
    plain, exact = (attend(*(x.to(kind) for x in (q, k, v))) for kind in (dtype, torch.float64))
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    error, allowed = ((x.double() - exact).abs().max() for x in (out, plain))
    assert error <= 2 * allowed + rounding


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)
