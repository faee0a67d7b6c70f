"""Writing keys, values and bounds in Triton.

The first kernel copies rows and notes, for every run, the last slot that this call wrote in it. The
second recomputes a run's bounds from its keys, once: by the token that wrote that last slot. A page
ends at the last slot written in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipserve.ops._triton.tiles import load_tile, power_of_2
from hipserve.plan import bound_levels, bound_offsets

Levels = tuple[int, ...]


@triton.jit
def write_kernel(
    k,
    k_strides,
    v,
    v_strides,
    k_cache,
    k_cache_strides,
    v_cache,
    v_cache_strides,
    slot_mapping,
    last_slots,
    page_size,
    num_heads,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    page, offset = slot // page_size, slot % page_size
    head, d = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, DIM)[None, :]
    inside = (head < num_heads) & (d < HEAD_DIM)
    row = tl.load(k + token * k_strides[0] + head * k_strides[1] + d, mask=inside)
    to = k_cache + page * k_cache_strides[0] + offset * k_cache_strides[1]
    tl.store(to + head * k_cache_strides[2] + d, row, mask=inside)
    row = tl.load(v + token * v_strides[0] + head * v_strides[1] + d, mask=inside)
    to = v_cache + page * v_cache_strides[0] + offset * v_cache_strides[1]
    tl.store(to + head * v_cache_strides[2] + d, row, mask=inside)
    if last_slots is not None:
        RUNS: tl.constexpr = OFFSETS[-1]
        for level in tl.static_range(len(LENGTHS)):
            run = page * RUNS + OFFSETS[level] + offset // LENGTHS[level]
            tl.atomic_max(last_slots + run, offset.to(tl.int32) + 1)


@triton.jit
def _box(keys, stride, first, end, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Elementwise minimum and maximum `[DIM]` of the keys in slots [first, end)."""
    low = tl.full([DIM], float("inf"), tl.float32)
    high = tl.full([DIM], -float("inf"), tl.float32)
    for start in range(first, end, 16):
        slot = start + tl.arange(0, 16)
        there = slot < end
        tile = load_tile(keys + slot.to(tl.int64) * stride, there, HEAD_DIM, DIM).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(there[:, None], tile, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(there[:, None], tile, -float("inf")), axis=0))
    return low, high


@triton.jit
def _store_box(place, stride, box, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    low, high = box
    d = tl.arange(0, DIM)
    tl.store(place + d, low.to(place.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(place + stride + d, high.to(place.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def bounds_kernel(
    k_cache,
    k_cache_strides,
    bounds,
    bounds_strides,
    slot_mapping,
    last_slots,
    page_size,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    slot = tl.load(slot_mapping + tl.program_id(0))
    if slot < 0:
        return
    head = tl.program_id(1).to(tl.int64)
    page, offset = slot // page_size, (slot % page_size).to(tl.int32)
    RUNS: tl.constexpr = OFFSETS[-1]
    TOP: tl.constexpr = OFFSETS[-2]
    page_end = 0
    for run in range(TOP, RUNS):
        page_end = tl.maximum(page_end, tl.load(last_slots + page * RUNS + run))
    keys = k_cache + page * k_cache_strides[0] + head * k_cache_strides[2]
    to = bounds + page * bounds_strides[0] + head * bounds_strides[2]
    for level in tl.static_range(len(LENGTHS)):
        run = offset // LENGTHS[level]
        place = OFFSETS[level] + run
        if tl.load(last_slots + page * RUNS + place) == offset + 1:
            end = tl.minimum((run + 1) * LENGTHS[level], page_end)
            box = _box(keys, k_cache_strides[1], run * LENGTHS[level], end, HEAD_DIM, DIM)
            _store_box(to + place * bounds_strides[1], bounds_strides[3], box, HEAD_DIM, DIM)


@triton.jit
def run_bounds_kernel(
    k,
    k_strides,
    bounds,
    bounds_strides,
    page_size,
    first_place,
    length,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    run = tl.program_id(0)
    head, page = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys = k + page * k_strides[0] + head * k_strides[2]
    end = tl.minimum((run + 1) * length, page_size)
    box = _box(keys, k_strides[1], run * length, end, HEAD_DIM, DIM)
    place = (first_place + run).to(tl.int64)
    to = bounds + page * bounds_strides[0] + place * bounds_strides[1] + head * bounds_strides[2]
    _store_box(to, bounds_strides[3], box, HEAD_DIM, DIM)


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
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    dim, page_size = power_of_2(head_dim), k_cache.shape[1]
    num_runs = None if k_bounds is None else k_bounds.shape[1]
    lengths = bound_levels(page_size, bound_block_size, num_runs)
    offsets = bound_offsets(page_size, bound_block_size, num_runs)
    last_slots = None
    if k_bounds is not None:
        runs = k_cache.shape[0] * offsets[-1]
        last_slots = torch.zeros(runs, dtype=torch.int32, device=k.device)
    write_kernel[(tokens,)](
        k,
        k.stride()[:2],
        v,
        v.stride()[:2],
        k_cache,
        k_cache.stride()[:3],
        v_cache,
        v_cache.stride()[:3],
        slot_mapping,
        last_slots,
        page_size,
        heads,
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=dim,
        LENGTHS=lengths,
        OFFSETS=offsets,
        num_warps=2,
    )
    if k_bounds is not None:
        bounds_kernel[(tokens, heads)](
            k_cache,
            k_cache.stride()[:3],
            k_bounds,
            k_bounds.stride()[:4],
            slot_mapping,
            last_slots,
            page_size,
            HEAD_DIM=head_dim,
            DIM=dim,
            LENGTHS=lengths,
            OFFSETS=offsets,
            num_warps=2,
        )


def compute_bounds(k: Tensor, bound_block_size: int) -> Tensor:
    """See `hipserve.ops.compute_bounds`."""
    pages, page_size, heads, head_dim = k.shape
    offsets = bound_offsets(page_size, bound_block_size)
    bounds = torch.empty((pages, offsets[-1], heads, 2, head_dim), dtype=k.dtype, device=k.device)
    for level, length in enumerate(bound_levels(page_size, bound_block_size)):
        runs = offsets[level + 1] - offsets[level]
        if pages * runs:
            run_bounds_kernel[(runs, heads, pages)](
                k,
                k.stride()[:3],
                bounds,
                bounds.stride()[:4],
                page_size,
                offsets[level],
                length,
                HEAD_DIM=head_dim,
                DIM=power_of_2(head_dim),
                num_warps=2,
            )
    return bounds
