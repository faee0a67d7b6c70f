"""The kernels of steps in which a run is summarised once: by the token that completes it."""

from __future__ import annotations

import triton
import triton.language as tl

from hipserve.ops._triton import pages, rows
from hipserve.ops._triton.fp8 import PageForm, to_pages
from hipserve.ops.write_kv.triton.kernels import CodeRows, store_codes
from hipserve.ops.write_kv.triton.summaries import SummaryRows, store_summary, summarize_run


@triton.jit
def append_kernel(
    k,
    k_strides,
    v,
    v_strides,
    k_cache,
    k_cache_strides,
    v_cache,
    v_cache_strides,
    slot_mapping,
    places,
    form,
    codes,
    codes_strides,
    scales,
    scales_strides,
    summaries,
    summaries_strides,
    summary_scales,
    summary_scales_strides,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BITS: tl.constexpr,
    SUMMARY_BITS: tl.constexpr,
):
    """Writes the row of one token and head, its code, and the summaries of runs that it completes.

    No other program writes keys of these runs. A negative slot is padding; `places` as in
    `write_kernel`.
    """
    k_strides, v_strides = rows.RowStrides(*k_strides), rows.RowStrides(*v_strides)
    k_to, v_to = pages.CacheStrides(*k_cache_strides), pages.CacheStrides(*v_cache_strides)
    form = PageForm(*form)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    page, offset = slot // form.size, (slot % form.size).to(tl.int32)
    place = pages.place_of(page, places)
    d = tl.arange(0, DIM)[None, :]
    inside = d < HEAD_DIM
    keys = k_cache + place * k_to.page + head * k_to.head
    row = tl.load(k + token * k_strides.token + head * k_strides.head + d, mask=inside)  # [1, DIM]
    row = to_pages(row, form.k_scale, k_cache.dtype.element_ty)
    tl.store(keys + offset.to(tl.int64) * k_to.slot + d, row, mask=inside)
    if BITS < 16:
        code_strides = pages.CacheStrides(*codes_strides)
        scale_strides = pages.CacheStrides(*scales_strides)
        code, scale = codes + head * code_strides.head, scales + head * scale_strides.head
        coded = CodeRows(code, code_strides, scale, scale_strides, 1)
        store_codes(row, inside, coded, page, offset.to(tl.int64), HEAD_DIM, DIM, BITS)
    row = tl.load(v + token * v_strides.token + head * v_strides.head + d, mask=inside)  # [1, DIM]
    row = to_pages(row, form.v_scale, v_cache.dtype.element_ty)
    values = v_cache + place * v_to.page + head * v_to.head
    tl.store(values + offset.to(tl.int64) * v_to.slot + d, row, mask=inside)
    end = offset + 1
    strides = pages.SummaryStrides(*summaries_strides)
    side_strides = pages.SummaryStrides(*summary_scales_strides)
    to = SummaryRows(summaries, strides, summary_scales, side_strides)
    for level in tl.static_range(len(LENGTHS)):
        if (end % LENGTHS[level] == 0) | (end == form.size):
            tl.debug_barrier()  # other threads of this program read what it has written
            run = offset // LENGTHS[level]
            first = run * LENGTHS[level]
            made = summarize_run(keys, k_to.slot, first, end, level == 0, 16, HEAD_DIM, DIM)
            store_summary(
                to, (OFFSETS[level] + run).to(tl.int64), page, head, made, SUMMARY_BITS, HEAD_DIM
            )


@triton.jit(do_not_specialize=["tokens"])
def completed_kernel(
    k_cache,
    k_cache_strides,
    summaries,
    summaries_strides,
    scales,
    scales_strides,
    slot_mapping,
    tokens,
    places,
    page_size,
    first_index,
    LENGTH: tl.constexpr,
    FINEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
):
    """Summarizes, of one head, the runs of LENGTH keys that GROUP tokens in a row have completed.

    first_index: where the runs of this length start in a page. All keys are written.
    """
    k_strides = pages.CacheStrides(*k_cache_strides)
    strides = pages.SummaryStrides(*summaries_strides)
    scale_strides = pages.SummaryStrides(*scales_strides)
    to = SummaryRows(summaries, strides, scales, scale_strides)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    slots = tl.load(slot_mapping + token, mask=token < tokens, other=-1)
    ends = slots % page_size + 1
    completes = (slots >= 0) & ((ends % LENGTH == 0) | (ends == page_size))
    slots = tl.where(completes, slots, -1)
    slot = tl.max(slots, axis=0)
    while slot >= 0:
        page, end = slot // page_size, (slot % page_size).to(tl.int32) + 1
        run = (end - 1) // LENGTH
        place = pages.place_of(page, places)
        keys = k_cache + place * k_strides.page + head * k_strides.head
        made = summarize_run(keys, k_strides.slot, run * LENGTH, end, FINEST, ROWS, HEAD_DIM, DIM)
        store_summary(to, (first_index + run).to(tl.int64), page, head, made, BITS, HEAD_DIM)
        slots = tl.where(slots == slot, -1, slots)
        slot = tl.max(slots, axis=0)
