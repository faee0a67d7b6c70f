"""Writing keys, values and their index in Triton.

The first kernel copies rows, codes keys and notes, for every run, the last slot that this call
wrote in it. The second recomputes a run's summary from its keys, once: by the token that wrote that
last slot. A page ends at the last slot written in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.ops._triton import pages, rows
from hipserve.ops._triton.codes import encode, pack_nibbles, rotate
from hipserve.ops._triton.tiles import load_tile, power_of_2
from hipserve.ops.codes import SUMMARY_BITS
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.plan import bound_levels, bound_offsets
from hipserve.types import KeyIndex, KeyPool


class SummaryRows(NamedTuple):
    """Where summaries go."""

    start: Any
    strides: Any
    """`SummaryStrides`, as those of the scales."""
    scales: Any
    """None where summaries are not coded."""
    scale_strides: Any


class CodeRows(NamedTuple):
    """Where codes go."""

    start: Any
    strides: Any
    """`CacheStrides`, as those of the scales."""
    scales: Any
    scale_strides: Any
    num_heads: Any


class Summary(NamedTuple):
    """What an index holds of a run, `[DIM]` each: float64 or float32."""

    center: Any
    radius: Any


@triton.jit
def moments_of_run(keys, stride, first, end, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The `Summary` of a run of the finest level, the keys in slots [first, end).

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
def box_of_run(keys, stride, first, end, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The `Summary` of a longer run: middle of minimum and maximum, and half their distance."""
    low = tl.full([16, DIM], float("inf"), tl.float32)
    high = tl.full([16, DIM], -float("inf"), tl.float32)
    for start in range(first, end, 16):
        slot = tl.minimum(start + tl.arange(0, 16), end - 1)  # the last one again, behind the end
        at = keys + slot.to(tl.int64) * stride
        tile = load_tile(at, slot < end, HEAD_DIM, DIM).to(tl.float32)  # [16, DIM]
        low, high = tl.minimum(low, tile), tl.maximum(high, tile)
    minimum, maximum = tl.min(low, axis=0), tl.max(high, axis=0)
    return Summary((minimum + maximum) / 2, (maximum - minimum) / 2)


@triton.jit
def summarize_run(
    keys,
    stride,
    first,
    end,
    FINEST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """The `Summary` of the keys in slots [first, end)."""
    if FINEST:
        return moments_of_run(keys, stride, first, end, HEAD_DIM, DIM)
    else:
        return box_of_run(keys, stride, first, end, HEAD_DIM, DIM)


@triton.jit
def store_side(at, scale_at, side, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes one `[DIM]` side of a summary to the pointer `at`: itself, or its code."""
    DIM: tl.constexpr = side.shape[0]
    d = tl.arange(0, DIM)
    row = side.to(tl.float32)
    if scale_at is None:
        tl.store(at + d, row.to(at.dtype.element_ty), mask=d < HEAD_DIM)
    else:
        code = encode(tl.reshape(row, [1, DIM]), BITS)
        numbers = tl.reshape(code.numbers, [DIM]).to(tl.int8)
        tl.store(at + d, numbers, mask=d < HEAD_DIM)
        tl.store(scale_at + tl.arange(0, 1), code.scale.to(tl.bfloat16))


@triton.jit
def store_summary(to, run, page, head, summary, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes the `Summary` of a run of a page and head to the `SummaryRows`."""
    strides, scale_strides = to.strides, to.scale_strides
    at = to.start + page * strides.page + run * strides.run + head * strides.head
    scale_at, next_scale = None, None
    if to.scales is not None:
        scale_at = to.scales + page * scale_strides.page + run * scale_strides.run
        scale_at += head * scale_strides.head
        next_scale = scale_at + scale_strides.side
    store_side(at, scale_at, summary.center, BITS, HEAD_DIM)
    store_side(at + strides.side, next_scale, summary.radius, BITS, HEAD_DIM)


@triton.jit
def store_codes(
    row,
    inside,
    to,
    page,
    slot,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
):
    """Writes the codes of keys `[HEADS, DIM]` of one slot; `inside`: the elements that exist."""
    HEADS: tl.constexpr = row.shape[0]
    strides, scale_strides = to.strides, to.scale_strides
    code = encode(rotate(tl.where(inside, row.to(tl.float32), 0.0), HEAD_DIM, DIM), BITS)
    packed = code.numbers.to(tl.int8)
    WIDTH: tl.constexpr = DIM * BITS // 8
    if BITS == 4:
        packed = pack_nibbles(code.numbers, DIM)
    head, byte = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, WIDTH)
    at = to.start + page * strides.page + slot * strides.slot + head[:, None] * strides.head
    there = head < to.num_heads
    mask = there[:, None] & (byte < HEAD_DIM * BITS // 8)[None, :]
    tl.store(at + byte[None, :], packed, mask=mask)
    at = to.scales + page * scale_strides.page + slot * scale_strides.slot
    tl.store(at + head * scale_strides.head, code.scale.to(tl.bfloat16), mask=there)


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
    places,
    page_size,
    num_heads,
    codes,
    codes_strides,
    scales,
    scales_strides,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Copies the rows of one token, all heads, to its slot, and writes the codes of its keys.

    A negative slot is padding. With `last_slots`, notes for the runs around the slot:
    last_slots[run] = max(., slot + 1). With `places`, page i of the index is page places[i] here.
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
    place = pages.place_of(page, places)
    to = k_cache + place * k_to.page + offset * k_to.slot
    tl.store(to + head * k_to.head + d, row, mask=inside)
    if BITS < 16:
        strides = pages.CacheStrides(*codes_strides)
        scale_strides = pages.CacheStrides(*scales_strides)
        rows_to = CodeRows(codes, strides, scales, scale_strides, num_heads)
        store_codes(row, inside, rows_to, page, offset, HEAD_DIM, DIM, BITS)
    at = v + token * v_strides.token + head * v_strides.head + d
    row = tl.load(at, mask=inside)  # [HEADS, DIM]
    to = v_cache + place * v_to.page + offset * v_to.slot
    tl.store(to + head * v_to.head + d, row, mask=inside)
    if last_slots is not None:
        RUNS: tl.constexpr = OFFSETS[-1]
        for level in tl.static_range(len(LENGTHS)):
            run = page * RUNS + OFFSETS[level] + offset // LENGTHS[level]
            tl.atomic_max(last_slots + run, offset.to(tl.int32) + 1)


@triton.jit
def codes_kernel(
    k,
    k_strides,
    codes,
    codes_strides,
    scales,
    scales_strides,
    num_heads,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
):
    """Writes the codes of the keys in one slot of a page, all heads."""
    k_strides = pages.CacheStrides(*k_strides)
    strides, scale_strides = pages.CacheStrides(*codes_strides), pages.CacheStrides(*scales_strides)
    slot, page = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, d = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, DIM)[None, :]
    inside = (head < num_heads) & (d < HEAD_DIM)
    at = k + page * k_strides.page + slot * k_strides.slot + head * k_strides.head + d
    row = tl.load(at, mask=inside)  # [HEADS, DIM]
    to = CodeRows(codes, strides, scales, scale_strides, num_heads)
    store_codes(row, inside, to, page, slot, HEAD_DIM, DIM, BITS)


@triton.jit
def summaries_kernel(
    k_cache,
    k_cache_strides,
    summaries,
    summaries_strides,
    scales,
    scales_strides,
    slot_mapping,
    last_slots,
    places,
    page_size,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Summarizes, for one token and head, the runs whose last new slot is the token's.

    A run reaches to its end, or to the last slot written in its page.
    """
    k_strides = pages.CacheStrides(*k_cache_strides)
    strides = pages.SummaryStrides(*summaries_strides)
    scale_strides = pages.SummaryStrides(*scales_strides)
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
    place = pages.place_of(page, places)
    keys = k_cache + place * k_strides.page + head * k_strides.head
    to = SummaryRows(summaries, strides, scales, scale_strides)
    for level in tl.static_range(len(LENGTHS)):
        run = offset // LENGTHS[level]
        index = OFFSETS[level] + run
        if tl.load(last_slots + page * RUNS + index) == offset + 1:
            first = run * LENGTHS[level]
            end = tl.minimum((run + 1) * LENGTHS[level], page_end)
            summary = summarize_run(
                keys, k_strides.slot, first, end, level == 0, HEAD_DIM, DIM
            )
            store_summary(to, index.to(tl.int64), page, head, summary, BITS, HEAD_DIM)


@triton.jit
def whole_summaries_kernel(
    k,
    k_strides,
    summaries,
    summaries_strides,
    scales,
    scales_strides,
    page_size,
    first_index,
    length,
    FINEST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
):
    """Summarizes one run of `length` keys of one head and page, all of whose slots are written.

    first_index: where the runs of this length start in a page.
    """
    k_strides = pages.CacheStrides(*k_strides)
    strides = pages.SummaryStrides(*summaries_strides)
    scale_strides = pages.SummaryStrides(*scales_strides)
    run = tl.program_id(0)
    head, page = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys = k + page * k_strides.page + head * k_strides.head
    end = tl.minimum((run + 1) * length, page_size)
    summary = summarize_run(keys, k_strides.slot, run * length, end, FINEST, HEAD_DIM, DIM)
    to = SummaryRows(summaries, strides, scales, scale_strides)
    store_summary(to, (first_index + run).to(tl.int64), page, head, summary, BITS, HEAD_DIM)


def summary_warps(dim: int) -> int:
    """Warps of a program that keeps sums of 16 keys in registers: 64 of each thread's."""
    return max(dim // 32, 4)


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides of x `[num_pages, ...]`; zeros where there is none."""
    return (0,) * count if x is None else x.stride()[:count]


def write_kv(k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.write_kv`; k, v `[num_tokens, num_kv_heads, head_dim]`, slot_mapping
    `[num_tokens]`."""
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    k_cache, v_cache, summaries = pool.k_cache, pool.v_cache, index.summaries
    dim, page_size = power_of_2(head_dim), pool.page_size
    num_runs = None if summaries is None else summaries.shape[1]
    lengths = bound_levels(page_size, index.run_size, num_runs)
    offsets = bound_offsets(page_size, index.run_size, num_runs)
    last_slots = None
    if summaries is not None:
        runs = summaries.shape[0] * offsets[-1]
        last_slots = torch.zeros(runs, dtype=torch.int32, device=k.device)
    write_kernel[(tokens,)](
        *(k, k.stride()[:2], v, v.stride()[:2]),
        *(k_cache, k_cache.stride()[:3], v_cache, v_cache.stride()[:3]),
        *(slot_mapping, last_slots, pool.places, page_size, heads),
        *(index.codes, index.codes.stride()[:3]),
        *(index.code_scales, strides_of(index.code_scales, 3)),
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=dim,
        LENGTHS=lengths,
        OFFSETS=offsets,
        BITS=index.code_bits,
        num_warps=2,
    )
    if summaries is not None:
        summaries_kernel[(tokens, heads)](
            *(k_cache, k_cache.stride()[:3], summaries, summaries.stride()[:4]),
            *(index.summary_scales, strides_of(index.summary_scales, 4)),
            *(slot_mapping, last_slots, pool.places, page_size),
            HEAD_DIM=head_dim,
            DIM=dim,
            LENGTHS=lengths,
            OFFSETS=offsets,
            BITS=SUMMARY_BITS,
            num_warps=summary_warps(dim),
        )


def build_index(k: Tensor, run_size: int | None, code_bits: int) -> KeyIndex:
    """See `hipserve.ops.build_index`; k `[num_pages, page_size, num_kv_heads, head_dim]`."""
    index = IndexLayout.of_whole(k, IndexForm(run_size, code_bits)).empty_like(k)
    if k.numel() and index.code_scales is not None:
        code_pages(k, index)
    if k.numel() and run_size is not None:
        summarize_pages(k, index)
    return index


def code_pages(k: Tensor, index: KeyIndex) -> None:
    """Writes the codes of k `[num_pages, page_size, num_kv_heads, head_dim]` to the index."""
    num_pages, page_size, heads, head_dim = k.shape
    codes_kernel[(page_size, num_pages)](
        *(k, k.stride()[:3], index.codes, index.codes.stride()[:3]),
        *(index.code_scales, strides_of(index.code_scales, 3), heads),
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=power_of_2(head_dim),
        BITS=index.code_bits,
        num_warps=2,
    )


def summarize_pages(k: Tensor, index: KeyIndex) -> None:
    """Writes the summaries of k `[num_pages, page_size, num_kv_heads, head_dim]` to the index."""
    summaries, scales = index.summaries, index.summary_scales
    assert summaries is not None
    num_pages, page_size, heads, head_dim = k.shape
    offsets = bound_offsets(page_size, index.run_size)
    for level, length in enumerate(bound_levels(page_size, index.run_size)):
        whole_summaries_kernel[(offsets[level + 1] - offsets[level], heads, num_pages)](
            k=k,
            k_strides=k.stride()[:3],
            summaries=summaries,
            summaries_strides=summaries.stride()[:4],
            scales=scales,
            scales_strides=strides_of(scales, 4),
            page_size=page_size,
            first_index=offsets[level],
            length=length,
            FINEST=level == 0,
            HEAD_DIM=head_dim,
            DIM=power_of_2(head_dim),
            BITS=SUMMARY_BITS,
            num_warps=summary_warps(power_of_2(head_dim)),
        )
