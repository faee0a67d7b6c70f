"""Writing keys, values and summaries by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.plan import bound_offsets


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    summaries: Tensor | None,
    slot_mapping: Tensor,
    run_size: int,
) -> None:
    """Appends `k` and `v`; see `hipserve.ops.write_kv`.

    Args:
        k, v: `[num_tokens, num_kv_heads, head_dim]`.
        k_cache, v_cache: `[num_pages, page_size, num_kv_heads, head_dim]`.
        summaries: `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`; None keeps none.
        slot_mapping: `[num_tokens]` int64.
        run_size: keys of the finest run.
    """
    torch.ops.hipserve_cpu.write_kv(k, v, k_cache, v_cache, summaries, slot_mapping, run_size)


def summarize(k: Tensor, run_size: int) -> Tensor:
    """The summaries of whole pages; see `hipserve.ops.build_index`.

    k: `[num_pages, page_size, num_kv_heads, head_dim]`.

    Returns:
        `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`, dtype of k.
    """
    pages, page_size, heads, head_dim = k.shape
    runs = bound_offsets(page_size, run_size)[-1]
    summaries = torch.empty((pages, runs, heads, 2, head_dim), dtype=k.dtype)
    torch.ops.hipserve_cpu.compute_bounds(k, summaries, run_size)
    return summaries
