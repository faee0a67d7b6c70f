"""The definition of `write_kv` and of the summaries of a page's runs: eager torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.plan import bound_levels, bound_offsets


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
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    page, slot = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[page, slot] = k[written]
    v_cache[page, slot] = v[written]
    if summaries is None:
        return
    sizes = (k_cache.shape[1], run_size, summaries.shape[1])
    offsets = bound_offsets(*sizes)
    for level, length in enumerate(bound_levels(*sizes)):
        runs_per_page = offsets[level + 1] - offsets[level]
        run = page * runs_per_page + slot // length
        for touched in run.unique().tolist():
            of_page, index = divmod(touched, runs_per_page)
            page_end = int(slot[page == of_page].max()) + 1
            keys = k_cache[of_page, index * length : min((index + 1) * length, page_end)]
            summaries[of_page, offsets[level] + index] = summary(keys, dim=0)


def summarize(k: Tensor, run_size: int) -> Tensor:
    """The summaries of whole pages; see `hipserve.ops.build_index`.

    k: `[num_pages, page_size, num_kv_heads, head_dim]`.

    Returns:
        `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`, dtype of k.
    """
    levels = bound_levels(k.shape[1], run_size)
    return torch.cat([run_summaries(k, length) for length in levels], dim=1)


def run_summaries(k: Tensor, length: int) -> Tensor:
    """`[pages, runs, heads, 2, head_dim]` of every run of `length` keys, the last one partial."""
    return torch.stack([summary(run, dim=1) for run in k.split(length, dim=1)], dim=1)


def summary(keys: Tensor, dim: int) -> Tensor:
    """`[..., heads, 2, head_dim]`: mean and standard deviation of the keys along axis `dim`.

    Sums of 16-bit numbers are exact in float64, whatever their order, so all backends agree to the
    bit.
    """
    x, n = keys.double(), keys.shape[dim]
    total, squares = x.sum(dim), x.square().sum(dim)
    deviation = (n * squares - total.square()).clamp(min=0).sqrt() / n
    return torch.stack([total / n, deviation], dim=-2).to(keys.dtype)
