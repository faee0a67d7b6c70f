"""Writing keys, values and summaries in Triton.

The first kernel copies rows and notes, for every run, the last slot that this call wrote in it. The
second recomputes a run's summary from its keys, once: by the token that wrote that last slot. A
page ends at the last slot written in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipserve.ops._triton import pages, rows
from hipserve.ops._triton.tiles import load_tile, power_of_2
from hipserve.plan import bound_levels, bound_offsets


class Summary(NamedTuple):
    """What an index holds of a run, `[DIM]` float64 each."""

    mean: Any
    deviation: Any


@triton.jit
def summarize_run(keys, stride, first, end, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The `Summary` of the keys in slots [first, end), channel by channel.

    mean = S1 / n and deviation = sqrt(n S2 - S1^2) / n, with the sums S1 of the keys and S2 of
    their squares: exact in float64 for keys of 16 bits, in any order.
    """
    totals = tl.zeros([16, DIM], tl.float64)
    squares = tl.zeros([16, DIM], tl.float64)
    for start in range(first, end, 16):
        slot = start + tl.arange(0, 16)
        at = keys + slot.to(tl.int64) * stride
        tile = load_tile(at, slot < end, HEAD_DIM, DIM).to(tl.float64)  # [16, DIM], else zeros
        totals += tile
        squares += tile * tile
    total = tl.sum(totals, axis=0)
    n = (end - first).to(tl.float64)
    spread = tl.maximum(n * tl.sum(squares, axis=0) - total * total, 0.0)
    return Summary(total / n, tl.sqrt(spread) / n)


@triton.jit
def store_summary(at, side_stride, summary, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Writes a `Summary`: the mean to the pointer `at`, the deviation `side_stride` behind it."""
    d = tl.arange(0, DIM)
    kind = at.dtype.element_ty
    tl.store(at + d, summary.mean.to(tl.float32).to(kind), mask=d < HEAD_DIM)
    tl.store(at + side_stride + d, summary.deviation.to(tl.float32).to(kind), mask=d < HEAD_DIM)


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
    """Copies the rows of one token, all heads, to its slot; a negative slot is padding.

    With `last_slots`, notes for the runs around the slot: last_slots[run] = max(., slot + 1).
    """
    k_strides, v_strides = rows.RowStrides(*k_strides), rows.RowStrides(*v_strides)
    k_to, v_to = pages.CacheStrides(*k_cache_strides), pages.CacheStrides(*v_cache_strides)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    page, offset = slot // page_size, slot % page_size
    head, d = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, DIM)[None, :]
    inside = (head < num_heads) & (d < HEAD_DIM)
    at = k + token * k_strides.token + head * k_strides.head + d
    row = tl.load(at, mask=inside)  # [HEADS, DIM]
    to = k_cache + page * k_to.page + offset * k_to.slot
    tl.store(to + head * k_to.head + d, row, mask=inside)
    at = v + token * v_strides.token + head * v_strides.head + d
    row = tl.load(at, mask=inside)  # [HEADS, DIM]
    to = v_cache + page * v_to.page + offset * v_to.slot
    tl.store(to + head * v_to.head + d, row, mask=inside)
    if last_slots is not None:
        RUNS: tl.constexpr = OFFSETS[-1]
        for level in tl.static_range(len(LENGTHS)):
            run = page * RUNS + OFFSETS[level] + offset // LENGTHS[level]
            tl.atomic_max(last_slots + run, offset.to(tl.int32) + 1)


@triton.jit
def summaries_kernel(
    k_cache,
    k_cache_strides,
    summaries,
    summaries_strides,
    slot_mapping,
    last_slots,
    page_size,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Summarizes, for one token and head, the runs whose last new slot is the token's.

    A run reaches to its end, or to the last slot written in its page.
    """
    k_strides, strides = (
        pages.CacheStrides(*k_cache_strides),
        pages.SummaryStrides(*summaries_strides),
    )
    slot = tl.load(slot_mapping + tl.program_id(0))
    if slot < 0:
        return
    head = tl.program_id(1).to(tl.int64)
    page, offset = slot // page_size, (slot % page_size).to(tl.int32)
    RUNS: tl.constexpr = OFFSETS[-1]
    COARSEST: tl.constexpr = OFFSETS[-2]
    page_end = 0
    for run in range(COARSEST, RUNS):
        page_end = tl.maximum(page_end, tl.load(last_slots + page * RUNS + run))
    keys = k_cache + page * k_strides.page + head * k_strides.head
    to = summaries + page * strides.page + head * strides.head
    for level in tl.static_range(len(LENGTHS)):
        run = offset // LENGTHS[level]
        index = OFFSETS[level] + run
        if tl.load(last_slots + page * RUNS + index) == offset + 1:
            first = run * LENGTHS[level]
            end = tl.minimum((run + 1) * LENGTHS[level], page_end)
            summary = summarize_run(keys, k_strides.slot, first, end, HEAD_DIM, DIM)
            store_summary(to + index * strides.run, strides.side, summary, HEAD_DIM, DIM)


@triton.jit
def whole_summaries_kernel(
    k,
    k_strides,
    summaries,
    summaries_strides,
    page_size,
    first_index,
    length,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Summarizes one run of `length` keys of one head and page, all of whose slots are written.

    first_index: where the runs of this length start in a page.
    """
    k_strides, strides = pages.CacheStrides(*k_strides), pages.SummaryStrides(*summaries_strides)
    run = tl.program_id(0)
    head, page = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys = k + page * k_strides.page + head * k_strides.head
    end = tl.minimum((run + 1) * length, page_size)
    summary = summarize_run(keys, k_strides.slot, run * length, end, HEAD_DIM, DIM)
    index = (first_index + run).to(tl.int64)
    to = summaries + page * strides.page + index * strides.run + head * strides.head
    store_summary(to, strides.side, summary, HEAD_DIM, DIM)


def summary_warps(dim: int) -> int:
    """Warps of a program that keeps sums of 16 keys in registers: 64 of each thread's."""
    return max(dim // 32, 4)


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
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    dim, page_size = power_of_2(head_dim), k_cache.shape[1]
    num_runs = None if summaries is None else summaries.shape[1]
    lengths = bound_levels(page_size, run_size, num_runs)
    offsets = bound_offsets(page_size, run_size, num_runs)
    last_slots = None
    if summaries is not None:
        runs = k_cache.shape[0] * offsets[-1]
        last_slots = torch.zeros(runs, dtype=torch.int32, device=k.device)
    write_kernel[(tokens,)](
        *(k, k.stride()[:2], v, v.stride()[:2]),
        *(k_cache, k_cache.stride()[:3], v_cache, v_cache.stride()[:3]),
        *(slot_mapping, last_slots, page_size, heads),
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=dim,
        LENGTHS=lengths,
        OFFSETS=offsets,
        num_warps=2,
    )
    if summaries is not None:
        summaries_kernel[(tokens, heads)](
            *(k_cache, k_cache.stride()[:3], summaries, summaries.stride()[:4]),
            *(slot_mapping, last_slots, page_size),
            HEAD_DIM=head_dim,
            DIM=dim,
            LENGTHS=lengths,
            OFFSETS=offsets,
            num_warps=summary_warps(dim),
        )


def summarize(k: Tensor, run_size: int) -> Tensor:
    """The summaries of whole pages; see `hipserve.ops.build_index`.

    k: `[num_pages, page_size, num_kv_heads, head_dim]`.

    Returns:
        `[num_pages, runs_per_page, num_kv_heads, 2, head_dim]`, dtype of k.
    """
    num_pages, page_size, heads, head_dim = k.shape
    offsets = bound_offsets(page_size, run_size)
    summaries = torch.empty(
        (num_pages, offsets[-1], heads, 2, head_dim), dtype=k.dtype, device=k.device
    )
    for level, length in enumerate(bound_levels(page_size, run_size)):
        runs = offsets[level + 1] - offsets[level]
        if num_pages * runs:
            whole_summaries_kernel[(runs, heads, num_pages)](
                k=k,
                k_strides=k.stride()[:3],
                summaries=summaries,
                summaries_strides=summaries.stride()[:4],
                page_size=page_size,
                first_index=offsets[level],
                length=length,
                HEAD_DIM=head_dim,
                DIM=power_of_2(head_dim),
                num_warps=summary_warps(power_of_2(head_dim)),
            )
    return summaries
