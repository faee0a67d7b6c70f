"""Keys and values in fp8, as vLLM stores them: the definition, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.platform import FP8_DTYPES


def to_pages(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """x `[..., head_dim]` as pages of `dtype` hold it; in fp8 x / scale, computed in float32,
    rounded to nearest even, and no larger than the largest number."""
    if dtype not in FP8_DTYPES:
        return x
    largest = torch.finfo(dtype).max
    return (x.float() / torch.tensor(scale, device=x.device)).clamp(-largest, largest).to(dtype)
