"""Writing keys, values and their index on a GPU: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from hipserve.config import IndexForm
from hipserve.ops._triton.tiles import power_of_2
from hipserve.ops.codes import SUMMARY_BITS
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.ops.write_kv.triton.kernels import (
    codes_kernel,
    summaries_kernel,
    whole_summaries_kernel,
    write_kernel,
)
from hipserve.ops.write_kv.triton.whole_runs import append_kernel, completed_kernel
from hipserve.plan.runs import WRITTEN_LEVELS, bound_levels, bound_offsets
from hipserve.types import KeyIndex, KeyPool

MOMENT_ROWS = 4
"""Keys at a time of a program of its own for a run of the finest level: one warp adds up a channel
without the others (955 us for 131,072 keys of 8 heads with four warps, 93 so, on one H200)."""


def summary_warps(dim: int, rows: int = 16) -> int:
    """Warps of a program that keeps sums of so many keys in registers: 64 of each thread's."""
    return max(dim * rows // 512, 4 if rows == 16 else 1)


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides of x `[num_pages, ...]`; zeros where there is none."""
    return (0,) * count if x is None else x.stride()[:count]


def write_kv(k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex, slot_mapping: Tensor) -> None:
    """See `hipserve.ops.write_kv`; k, v `[num_tokens, num_kv_heads, head_dim]`, slot_mapping
    `[num_tokens]`."""
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    k_cache, summaries, page_size = pool.k_cache, index.summaries, pool.page_size
    last_slots = None
    if summaries is not None:
        lengths, offsets = _written_levels(index, page_size)
        runs = summaries.shape[0] * offsets[-1]
        last_slots = torch.zeros(runs, dtype=torch.int32, device=k.device)
    _write_rows(k, v, pool, index, slot_mapping, last_slots)
    if summaries is not None:
        dim = power_of_2(head_dim)
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


def _written_levels(index: KeyIndex, page_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Keys of the runs that are summarised with the keys of a page, and where each level starts."""
    num_runs = None if index.summaries is None else index.summaries.shape[1]
    lengths = bound_levels(page_size, index.run_size, num_runs)[:WRITTEN_LEVELS]
    return lengths, bound_offsets(page_size, index.run_size, num_runs)[: len(lengths) + 1]


def _write_rows(
    k: Tensor,
    v: Tensor,
    pool: KeyPool,
    index: KeyIndex,
    slot_mapping: Tensor,
    last_slots: Tensor | None,
) -> None:
    """Keys and values `[num_tokens, num_kv_heads, head_dim]` and codes; last_slots `[num_runs]`
    int32 as in `write_kernel`."""
    tokens, heads, head_dim = k.shape
    lengths, offsets = _written_levels(index, pool.page_size)
    write_kernel[(tokens,)](
        *(k, k.stride()[:2], v, v.stride()[:2]),
        *(pool.k_cache, pool.k_cache.stride()[:3], pool.v_cache, pool.v_cache.stride()[:3]),
        *(slot_mapping, last_slots, pool.places),
        *((pool.page_size, pool.k_scale, pool.v_scale), heads),
        *(index.codes, index.codes.stride()[:3]),
        *(index.code_scales, strides_of(index.code_scales, 3)),
        HEADS=power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM=power_of_2(head_dim),
        LENGTHS=lengths,
        OFFSETS=offsets,
        BITS=index.code_bits,
        num_warps=2,
    )


def write_whole_runs(
    k: Tensor, v: Tensor, pool: KeyPool, index: KeyIndex, slot_mapping: Tensor, apart: bool
) -> None:
    """See `whole_runs` and `apart` in `hipserve.ops.write_kv`; k, v `[num_tokens, num_kv_heads,
    head_dim]`, slot_mapping `[num_tokens]`."""
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    k_cache, v_cache, summaries = pool.k_cache, pool.v_cache, index.summaries
    dim, page_size = power_of_2(head_dim), pool.page_size
    lengths, offsets = _written_levels(index, page_size)
    kept = (summaries, strides_of(summaries, 4))
    kept += (index.summary_scales, strides_of(index.summary_scales, 4))
    if apart:
        append_kernel[(tokens, heads)](
            *(k, k.stride()[:2], v, v.stride()[:2]),
            *(k_cache, k_cache.stride()[:3], v_cache, v_cache.stride()[:3]),
            *(slot_mapping, pool.places, (page_size, pool.k_scale, pool.v_scale)),
            *(index.codes, index.codes.stride()[:3]),
            *(index.code_scales, strides_of(index.code_scales, 3), *kept),
            HEAD_DIM=head_dim,
            DIM=dim,
            LENGTHS=lengths,
            OFFSETS=offsets,
            BITS=index.code_bits,
            SUMMARY_BITS=SUMMARY_BITS,
            num_warps=summary_warps(dim),
        )
        return
    _write_rows(k, v, pool, index, slot_mapping, None)
    for level, length in enumerate(lengths):
        group = power_of_2(length)
        completed_kernel[(-(-tokens // group), heads)](
            *(k_cache, k_cache.stride()[:3], *kept),
            *(slot_mapping, tokens, pool.places, page_size, offsets[level]),
            LENGTH=length,
            FINEST=level == 0,
            ROWS=MOMENT_ROWS,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM=dim,
            BITS=SUMMARY_BITS,
            num_warps=summary_warps(dim, 16 if level else MOMENT_ROWS),
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
    for level, length in enumerate(bound_levels(page_size, index.run_size)[:WRITTEN_LEVELS]):
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
            ROWS=MOMENT_ROWS,
            HEAD_DIM=head_dim,
            DIM=power_of_2(head_dim),
            BITS=SUMMARY_BITS,
            num_warps=summary_warps(power_of_2(head_dim), 16 if level else MOMENT_ROWS),
        )
