"""The definition of `write_kv` and of the bounds of a page's runs: eager torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.plan import bound_levels, bound_offsets


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
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    page, slot = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[page, slot] = k[written]
    v_cache[page, slot] = v[written]
    if k_bounds is None:
        return
    sizes = (k_cache.shape[1], bound_block_size, k_bounds.shape[1])
    offsets = bound_offsets(*sizes)
    for level, length in enumerate(bound_levels(*sizes)):
        runs_per_page = offsets[level + 1] - offsets[level]
        run = page * runs_per_page + slot // length
        for touched in run.unique().tolist():
            of_page, index = divmod(touched, runs_per_page)
            page_end = int(slot[page == of_page].max()) + 1
            keys = k_cache[of_page, index * length : min((index + 1) * length, page_end)]
            bounds = torch.stack([keys.amin(dim=0), keys.amax(dim=0)], dim=1)
            k_bounds[of_page, offsets[level] + index] = bounds


def compute_bounds(k: Tensor, bound_block_size: int) -> Tensor:
    """See `hipserve.ops.compute_bounds`."""
    levels = bound_levels(k.shape[1], bound_block_size)
    return torch.cat([run_bounds(k, length) for length in levels], dim=1)


def run_bounds(k: Tensor, length: int) -> Tensor:
    """`[pages, runs, heads, 2, head_dim]` of every run of `length` keys, the last one partial."""
    runs = [torch.stack([r.amin(1), r.amax(1)], dim=2) for r in k.split(length, dim=1)]
    return torch.stack(runs, dim=1)
