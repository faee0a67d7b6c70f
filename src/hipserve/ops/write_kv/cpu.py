"""Writing keys, values and bounds by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.plan import bound_offsets


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor | None,
    slot_mapping: Tensor,
    bound_block_size: int,
) -> None:
    """See `hipserve.ops.write_kv`."""
    torch.ops.hipserve_cpu.write_kv(
        k, v, k_cache, v_cache, k_bounds, slot_mapping, bound_block_size
    )


def compute_bounds(k: Tensor, bound_block_size: int) -> Tensor:
    """See `hipserve.ops.compute_bounds`."""
    pages, page_size, heads, head_dim = k.shape
    runs = bound_offsets(page_size, bound_block_size)[-1]
    bounds = torch.empty((pages, runs, heads, 2, head_dim), dtype=k.dtype)
    torch.ops.hipserve_cpu.compute_bounds(k, bounds, bound_block_size)
    return bounds
