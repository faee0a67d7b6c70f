"""The kernels that write keys, values and their index.

The first kernel copies rows, codes keys and notes, for every run, the last slot that this call
wrote in it. The second recomputes a run's summary from its keys, once: by the token that wrote that
last slot. A page ends at the last slot written in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hipserve.ops._triton import pages, rows
from hipserve.ops._triton.codes import encode, pack_nibbles, rotate
from hipserve.ops._triton.fp8 import PageForm, to_pages
from hipserve.ops.write_kv.triton.summaries import SummaryRows, store_summary, summarize_run


class CodeRows(NamedTuple):
    """Where codes go."""

    start: Any
    strides: Any
    """`CacheStrides`, as those of the scales."""
    scales: Any
    scale_strides: Any
    num_heads: Any


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
    form,
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
    """Copies the rows of one token, all heads, to its slot, and writes the codes of what is there.

    A negative slot is padding. With `last_slots`, notes for the runs around the slot:
    last_slots[run] = max(., slot + 1). With `places`, page i of the index is page places[i] here.
    """
    k_strides, v_strides = rows.RowStrides(*k_strides), rows.RowStrides(*v_strides)
    k_to, v_to = pages.CacheStrides(*k_cache_strides), pages.CacheStrides(*v_cache_strides)
    form = PageForm(*form)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    page, offset = slot // form.size, slot % form.size
    head, d = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, DIM)[None, :]
    inside = (head < num_heads) & (d < HEAD_DIM)
    at = k + token * k_strides.token + head * k_strides.head + d
    row = to_pages(tl.load(at, mask=inside), form.k_scale, k_cache.dtype.element_ty)  # [HEADS, DIM]
    place = pages.place_of(page, places)
    to = k_cache + place * k_to.page + offset * k_to.slot
    tl.store(to + head * k_to.head + d, row, mask=inside)
    if BITS < 16:
        strides = pages.CacheStrides(*codes_strides)
        scale_strides = pages.CacheStrides(*scales_strides)
        rows_to = CodeRows(codes, strides, scales, scale_strides, num_heads)
        store_codes(row, inside, rows_to, page, offset, HEAD_DIM, DIM, BITS)
    at = v + token * v_strides.token + head * v_strides.head + d
    row = to_pages(tl.load(at, mask=inside), form.v_scale, v_cache.dtype.element_ty)  # [HEADS, DIM]
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
            summary = summarize_run(keys, k_strides.slot, first, end, level == 0, 16, HEAD_DIM, DIM)
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
    ROWS: tl.constexpr,
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
    summary = summarize_run(keys, k_strides.slot, run * length, end, FINEST, ROWS, HEAD_DIM, DIM)
    to = SummaryRows(summaries, strides, scales, scale_strides)
    store_summary(to, (first_index + run).to(tl.int64), page, head, summary, BITS, HEAD_DIM)
